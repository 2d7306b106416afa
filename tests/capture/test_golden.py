"""Every stored row against what an independent path gets from transformers itself.

The reference tokenises with the tokenizer's own call, cuts windows by itself, runs one window at a
time with ``output_hidden_states=True`` and hooks the down-projection under the name its
architecture gives it.  It shares no code with actstore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers

from actstore.capturing import Limits
from actstore.models import LanguageModel, load
from actstore.store import FIRST, SPECIAL, CoreStore
from tests.captured import DOCUMENTS, Captured, all_tokens, capture, counted, small_segments
from tests.toys import TEXT, toy_model

Activations = dict[str, npt.NDArray[np.float32]]


@dataclass
class Reference:
    """A transformers model and tokenizer, and where its parts are."""

    model: Any
    tokenizer: Any
    blocks: Any
    projection: Callable[[Any], Any]
    prefix: list[int]
    suffix: list[int]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return ids and offsets of a text, without special tokens."""
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], [tuple(span) for span in found["offset_mapping"]]

    def run(self, input_ids: Any, mask: Any = None) -> Activations:
        """Return all activations of a batch by the names of their sites."""
        found: Activations = {}
        last = len(self.blocks) - 1

        def pre(name: str) -> Callable[..., None]:
            return lambda _, args: found.update({name: args[0].detach().numpy()})

        def post(_: Any, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            found[f"resid_post.{last}"] = value.detach().numpy()

        handles = [
            self.projection(block).register_forward_pre_hook(pre(f"mlp_post.{i}"))
            for i, block in enumerate(self.blocks)
        ]
        # The last of hidden_states is normed in most models; the block's own output is not.
        handles.append(self.blocks[last].register_forward_hook(post))
        try:
            with torch.no_grad():
                output = self.model(
                    input_ids=input_ids, attention_mask=mask, output_hidden_states=True
                )
        finally:
            for handle in handles:
                handle.remove()
        for i, hidden in enumerate(output.hidden_states[: last + 1]):
            found[f"resid_pre.{i}"] = hidden.numpy()
            if i:
                found[f"resid_post.{i - 1}"] = hidden.numpy()
        return found


def bert(model: Any, tokenizer: Any) -> Reference:
    """Return the reference of a BERT."""
    ends = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    return Reference(model, tokenizer, model.encoder.layer, lambda b: b.output.dense, *ends)


def gpt2(model: Any, tokenizer: Any) -> Reference:
    """Return the reference of a GPT-2."""
    return Reference(model, tokenizer, model.h, lambda b: b.mlp.c_proj, [], [])


def llama(model: Any, tokenizer: Any, prefix: list[int]) -> Reference:
    """Return the reference of a Llama."""
    return Reference(model, tokenizer, model.layers, lambda b: b.mlp.down_proj, prefix, [])


def expected_windows(
    reference: Reference, documents: list[str], context: int, overlap: int
) -> Iterator[dict[str, Any]]:
    """Yield every window: document, first token, ids fed, and what each fed token is."""
    n_prefix, n_suffix = len(reference.prefix), len(reference.suffix)
    for number, text in enumerate(documents):
        ids, spans = reference.encode(text)
        start = 0
        while start < len(ids):
            back = overlap if start > 0 else 0
            stop = min(len(ids), start - back + context - n_prefix - n_suffix)
            body = list(range(start - back, stop))
            places = [None] * n_prefix + body + [None] * n_suffix
            yield {
                "document": number,
                "start": start,
                "ids": reference.prefix + [ids[i] for i in body] + reference.suffix,
                "rows": [
                    (position, place, (0, 0) if place is None else spans[place])
                    for position, place in enumerate(places)
                    if place is None or place >= start
                ],
            }
            start = stop


def assert_within_one_unit(stored: npt.NDArray[Any], exact: npt.NDArray[np.float32]) -> None:
    """Fail unless values are within one unit of float16 and 1e-5 of the size of the site."""
    rms = float(np.sqrt(np.mean(exact.astype(np.float64) ** 2)))
    largest = np.finfo(np.float16).max
    unit = np.abs(np.spacing(np.clip(exact, -largest, largest).astype(np.float16)))
    off = np.abs(stored.astype(np.float64) - exact.astype(np.float64))
    assert (off <= unit + 1e-5 * max(1.0, rms)).all(), float((off - unit).max())


def check_rows(store: CoreStore, reference: Reference, documents: list[str]) -> int:
    """Compare ids, places, text and values of every row with the reference; return the rows."""
    tokens = all_tokens(store).to_pylist()
    windows: dict[int, list[dict[str, Any]]] = {}
    for token in tokens:
        windows.setdefault(token["window_id"], []).append(token)
    by_place = {
        (
            rows[0]["document"],
            max(0, min(r["doc_position"] for r in rows if r["doc_position"] >= 0)),
        ): rows
        for rows in windows.values()
    }
    meta = store.meta
    n_rows = 0
    exact: dict[str, list[npt.NDArray[np.float32]]] = {str(site): [] for site in store.sites}
    stored: dict[str, list[npt.NDArray[Any]]] = {str(site): [] for site in store.sites}
    for window in expected_windows(reference, documents, meta.context, meta.overlap):
        rows = by_place.pop((window["document"], window["start"]))
        text = documents[window["document"]]
        found = [
            (
                row["position"],
                None if row["doc_position"] < 0 else row["doc_position"],
                (row["char_start"], row["char_end"]),
            )
            for row in rows
        ]
        assert found == window["rows"]
        assert [row["token_id"] for row in rows] == [window["ids"][p] for p, _, _ in found]
        assert store.document(window["document"])["text"] == text
        for row, (position, place, span) in zip(rows, found, strict=True):
            is_special = row["token_id"] in reference.tokenizer.all_special_ids and place is None
            assert bool(row["flags"] & SPECIAL) == is_special
            assert bool(row["flags"] & FIRST) == (position == 0)
            if place is not None:
                check_text(reference.tokenizer, row["token_id"], text[slice(*span)])
        activations = reference.run(torch.tensor([window["ids"]]))
        ids = [row["row_id"] for row in rows]
        for site in exact:
            exact[site].append(activations[site][0, [p for p, _, _ in found]])
            stored[site].append(store[site][ids])
        n_rows += len(rows)
    assert not by_place, "windows that no document has"
    assert n_rows == len(tokens) == store.n_rows()
    for site in exact:
        assert_within_one_unit(np.concatenate(stored[site]), np.concatenate(exact[site]))
    return n_rows


def check_text(tokenizer: Any, token_id: int, text: str) -> None:
    """Fail unless a token says what the text at its offsets says."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if token_id == tokenizer.unk_token_id or not text.isascii():
        return
    if piece.startswith("##"):
        assert piece[2:] == text.lower()
    elif "Ġ" in piece or "Ċ" in piece or not tokenizer.cls_token:
        assert tokenizer.decode([token_id]).strip() == text.strip()
    else:
        assert piece == text.lower()


def check_bits(store: CoreStore, reference: Reference, pad_id: int) -> None:
    """Compare bits with the reference run over the same windows, padded alike."""
    for segment in store.planned:
        first = segment * store.meta.segment_rows
        token_ids = store.tokens(segment)["token_id"].to_numpy()
        windows = store.windows(segment).to_pylist()
        n_prefix = len(reference.prefix)
        while windows:
            longest = windows[0]["context_tokens"] + windows[0]["rows"]
            n_windows = max(1, store.meta.batch_tokens // longest)
            batch, windows = windows[:n_windows], windows[n_windows:]
            input_ids = torch.full((len(batch), longest), pad_id)
            mask = torch.zeros((len(batch), longest), dtype=torch.long)
            for i, window in enumerate(batch):
                start = window["first_row"] - first
                own = token_ids[start : start + window["rows"]].tolist()
                fed = own[:n_prefix] + window["context_ids"] + own[n_prefix:]
                input_ids[i, : len(fed)] = torch.tensor(fed)
                mask[i, : len(fed)] = 1
            exact = reference.run(input_ids, mask)
            for i, window in enumerate(batch):
                head = n_prefix if window["context_tokens"] else 0
                length = window["context_tokens"] + window["rows"]
                keep = [*range(head), *range(head + window["context_tokens"], length)]
                rows = slice(window["first_row"], window["first_row"] + window["rows"])
                for site in store.sites:
                    values = store[site][rows]
                    wanted = exact[str(site)][i, keep].astype(values.dtype)
                    assert np.array_equal(values.view(np.uint8), wanted.view(np.uint8)), site


TOYS: dict[str, tuple[int, Callable[..., Reference]]] = {
    "bert": (3, bert),
    "gpt2": (12, gpt2),
    "llama": (3, lambda model, tokenizer: llama(model, tokenizer, [tokenizer.bos_token_id])),
}


@pytest.mark.parametrize("architecture", TOYS)
@pytest.mark.parametrize(
    ("context", "overlap", "batch_tokens"), [(24, 0, 24), (24, 7, 100), (200, 0, 1000)]
)
def test_toy_rows_equal_those_of_transformers(
    architecture: str, context: int, overlap: int, batch_tokens: int, tmp_path: Path
) -> None:
    """Random models of three families: ids, places, text and values of every row."""
    n_layers, make = TOYS[architecture]
    module, tokenizer = toy_model(architecture, n_layers=n_layers)
    reference = make(module, tokenizer)
    found = capture(
        load(module, tokenizer),
        DOCUMENTS,
        tmp_path / "store",
        context=context,
        overlap=overlap,
        batch_tokens=batch_tokens,
        sites=["mlp_post", "resid_pre", "resid_post"],
        segment_rows=256,
        chunk_rows=32,
    )
    assert len(found.store.sites) == 3 * n_layers
    assert check_rows(found.store, reference, DOCUMENTS) > 400
    check_bits(found.store, reference, found.model.pad_id)


def test_minilm_rows_equal_those_of_transformers(minilm_store: Captured, minilm_path: Path) -> None:
    """The real MiniLM: ids, places, text and values of every row."""
    reference = bert(
        transformers.AutoModel.from_pretrained(minilm_path).eval(),
        transformers.AutoTokenizer.from_pretrained(minilm_path),
    )
    store = minilm_store.store
    assert len(store.sites) == 6 + 1 + 6
    assert check_rows(store, reference, DOCUMENTS) > 300
    check_bits(store, reference, minilm_store.model.pad_id)


@pytest.mark.slow
def test_smollm2_rows_equal_those_of_transformers(smollm2_path: Path, tmp_path: Path) -> None:
    """The real SmolLM2: ids, places, text and values of every row."""
    folder, name = smollm2_path.parent, smollm2_path.name
    module = transformers.AutoModel.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
    documents = [TEXT[:200], "", DOCUMENTS[3]]
    found = capture(
        load(smollm2_path, device="cpu"),
        documents,
        tmp_path / "store",
        context=32,
        overlap=5,
        sites=[
            "embed",
            "mlp_post.0",
            "mlp_post.13",
            "mlp_post.29",
            "resid_post.0",
            "resid_post.29",
        ],
    )
    assert found.store.site("resid_post.29").dtype == "float32", "it has channels beyond 1,000"
    reference = llama(module, tokenizer, [])
    assert check_rows(found.store, reference, documents) > 80
    check_bits(found.store, reference, found.model.pad_id)


def test_batch_sizes_agree_to_rounding(toy_gpt2: LanguageModel, tmp_path: Path) -> None:
    """Other batch shapes give the same tokens and, to rounding, the same values."""
    stores = [
        capture(toy_gpt2, DOCUMENTS, tmp_path / str(n), context=32, batch_tokens=n).store
        for n in (32, 96, 4096)
    ]
    for store in stores[1:]:
        assert all_tokens(store).equals(all_tokens(stores[0]))
        for site in store.sites:
            exact = stores[0][site][:].astype(np.float32)
            assert_within_one_unit(store[site][:], exact)


def test_layer_eleven_is_layer_eleven(tmp_path: Path) -> None:
    """Layers sort and are stored as integers: 2 comes before 10, and 11 holds what 11 computed."""
    module, tokenizer = toy_model("gpt2", n_layers=12, hidden=16, ffn=32)
    model, path = load(module, tokenizer), tmp_path / "store"
    found = capture(model, [TEXT[:99]], path, sites="mlp_post", context=48)
    names = [str(site) for site in found.store.sites]
    assert names == [f"mlp_post.{i}" for i in range(12)]
    ids = found.store["mlp_post.11"].row_ids()
    tokens = all_tokens(found.store)["token_id"].to_pylist()
    exact = gpt2(module, tokenizer).run(torch.tensor([tokens]))
    stored = found.store["mlp_post.11"][ids]
    assert_within_one_unit(stored, exact["mlp_post.11"][0])
    for other in (1, 10):
        assert np.abs(stored - exact[f"mlp_post.{other}"][0]).max() > 0.05


@pytest.mark.parametrize("overlap", [0, 5])
def test_each_window_goes_through_the_model_once(
    overlap: int, toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """One forward for all sites and layers; only the dtype probe feeds one window more."""
    options: dict[str, Any] = {"context": 24, "overlap": overlap, "batch_tokens": 100}
    with counted(toy_bert) as fed:
        given = capture(toy_bert, DOCUMENTS, tmp_path / "given", dtype="float16", **options)
    windows = [w for s in given.store.planned for w in given.store.windows(s).to_pylist()]
    assert len(fed) == given.windows_fed == len(windows)
    assert sorted(map(len, fed)) == sorted(w["context_tokens"] + w["rows"] for w in windows)
    probed = capture(toy_bert, DOCUMENTS, tmp_path / "probed", **options)
    assert probed.windows_fed == len(windows) + 1
    again = capture(toy_bert, DOCUMENTS, tmp_path / "probed", **options)
    assert again.windows_fed == 0


def test_padding_is_never_stored(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """Rows are the tokens of the documents and their special ones, though batches were padded."""
    found = capture(
        toy_bert, DOCUMENTS, tmp_path / "store", context=200, batch_tokens=2000, segment_rows=512
    )
    store = found.store
    lengths = [w["rows"] for s in store.planned for w in store.windows(s).to_pylist()]
    assert len(set(lengths)) > 3, "some batch was padded"
    ids = all_tokens(store)["token_id"].to_numpy()
    assert found.model.pad_id not in ids
    text = sum(len(toy_bert.encode(document).ids) for document in DOCUMENTS)
    assert len(ids) == text + 2 * len(lengths) == store.n_rows()
    for site in store.sites:
        assert np.isfinite(store[site][:]).all()


def test_a_row_id_of_a_table_is_that_tokens_row(toy_store: Captured) -> None:
    """Rows are found by the row_id of the token table, one, several or a slice of them."""
    store, module = toy_store.store, toy_store.model.module
    reference = bert(module, toy_store.model.tokenizer)
    table = all_tokens(store)
    rng = np.random.default_rng(0)
    for token in table.take(rng.integers(0, len(table), 12)).to_pylist():
        window = [t for t in table.to_pylist() if t["window_id"] == token["window_id"]]
        exact = reference.run(torch.tensor([[t["token_id"] for t in window]]))
        row = token["row_id"]
        for site in ("mlp_post.1", "resid_post.2"):
            value = store[site][row]
            assert_within_one_unit(value[None], exact[site][0, token["position"]][None])
            assert np.array_equal(store[site][[row]][0], value)
            assert np.array_equal(store[site][row : row + 1][0], value)
            assert np.array_equal(store[site][np.int64(row)], value)


def test_a_store_of_one_prompt_needs_no_path(toy_gpt2: LanguageModel) -> None:
    """Without a path the store is temporary, and goes when nobody holds it."""
    found = capture(toy_gpt2, None, None, text="The keys to the cabinet")
    folder = found.store.path
    rows = found.store["mlp_post.1"][found.store["mlp_post.1"].row_ids()]
    assert rows.shape == (len(toy_gpt2.encode("The keys to the cabinet").ids), 64)
    del found
    assert not folder.exists()


def test_limits_cut_documents_and_their_text(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """max_document_tokens keeps the first rows of each document, and the text that they span."""
    found = capture(
        toy_bert,
        DOCUMENTS,
        tmp_path / "store",
        context=24,
        limits=Limits(max_tokens=None, max_document_tokens=30),
    )
    tokens = all_tokens(found.store).to_pylist()
    for number, text in enumerate(DOCUMENTS):
        mine = [t for t in tokens if t["document"] == number]
        assert len(mine) <= 30
        stored = found.store.document(number)
        full = len(toy_bert.encode(text).ids)
        assert stored["n_tokens"] == sum(t["doc_position"] >= 0 for t in mine)
        if stored["n_tokens"] < full:
            assert text.startswith(stored["text"])
            assert len(stored["text"]) == max(t["char_end"] for t in mine)
        else:
            assert stored["text"] == text


def test_small_segments_of_the_tests_are_as_small_as_they_say(toy_store: Captured) -> None:
    """The stores of these tests have many segments, holes at their ends, and several chunks."""
    with small_segments():
        meta = toy_store.store.meta
    assert (meta.segment_rows, meta.chunk_rows) == (64, 16)
    rows = [segment.rows[""] for segment in toy_store.store.planned.values()]
    assert len(rows) > 5
    assert min(rows) < 64
