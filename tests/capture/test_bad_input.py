"""Bad input: a clear error of the tree, before work is lost, with a remedy that exists."""

from __future__ import annotations

import errno
import inspect
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import actstore
from actstore import cli, durable
from actstore.capturing import Limits, Settings, run_capture
from actstore.errors import (
    ActstoreError,
    ArgumentError,
    BudgetExceeded,
    CorpusError,
    ModelError,
    NonFiniteActivation,
    NotEnoughDisk,
    SiteNotFound,
    StoreMismatch,
    StoreNotFound,
)
from actstore.models import LanguageModel, load
from actstore.store import CoreStore
from tests.captured import DOCUMENTS, Captured, all_tokens, capture, counted, stored_bytes
from tests.toys import TEXT, toy_model


def refused(
    kind: type[ActstoreError], message: str, call: Callable[[], Any], remedies: str = ""
) -> str:
    """Fail unless a call is refused with a message, whose remedies are arguments that exist."""
    with pytest.raises(kind, match=message) as caught:
        call()
    text = str(caught.value)
    arguments = inspect.signature(actstore.capture).parameters
    options = {o for p in cli.main.commands["capture"].params for o in p.opts}
    named = re.findall(r"\b([a-z_]+)=", text)
    flags = re.findall(r"--[a-z-]+", text)
    assert set(named) <= {*arguments, "path", "model"}, text
    assert set(flags) <= options, text
    for remedy in remedies.split():
        assert remedy in text, text
    return text


def test_a_model_directory_that_does_not_exist(tmp_path: Path) -> None:
    """The path is named, and nothing is made for a store."""
    refused(
        ModelError,
        r"model '.*/none' does not exist; expected a directory with config.json",
        lambda: run_capture(tmp_path / "none", text="the war", path=tmp_path / "store"),
    )
    assert not (tmp_path / "store").exists()


def test_a_corpus_that_matches_no_file(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """A text given where a path is meant is recognised for what it is."""
    refused(
        CorpusError,
        r"corpus = 'The keys to the cabinet' matches no file \(looked from /.*\)\. Did you mean te",
        lambda: run_capture(toy_bert, "The keys to the cabinet", tmp_path / "store"),
        "text=",
    )
    refused(
        CorpusError,
        "give either a corpus or text=",
        lambda: run_capture(toy_bert, "a.txt", tmp_path / "store", text="a"),
        "text=",
    )
    refused(CorpusError, "give either", lambda: run_capture(toy_bert))
    # Too long for the name of a file, or no name at all: still a text, not a crash.
    for text in (TEXT, "a\0b", "a\nb"):
        refused(CorpusError, "matches no file", lambda text=text: run_capture(toy_bert, text))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_that_is_not_utf8(suffix: str, toy_bert: LanguageModel, tmp_path: Path) -> None:
    """File, byte and offset are named; encoding= reads it, errors= replaces what it cannot."""
    path = tmp_path / f"speech{suffix}"
    text = '{"text": "the war"}\n{"text": "caf\xe9"}' if suffix == ".jsonl" else "the caf\xe9"
    path.write_bytes(text.encode("latin-1"))
    offset = text.index("\xe9")
    refused(
        CorpusError,
        rf"{path} is not utf-8: byte 0xe9 at offset {offset} does not decode",
        lambda: capture(toy_bert, path, tmp_path / "store"),
        "encoding= --encoding errors= --errors",
    )
    read = capture(toy_bert, path, tmp_path / "latin", encoding="latin-1").store
    assert read.document(read.n_documents - 1)["text"].endswith("café")
    read = capture(toy_bert, path, tmp_path / "replaced", errors="replace").store
    assert read.document(read.n_documents - 1)["text"].endswith("caf\ufffd")
    refused(
        CorpusError,
        r"cannot be decoded: unknown encoding: utf9.*'latin-1' and 'replace'",
        lambda: capture(toy_bert, path, tmp_path / "other", encoding="utf9"),
        "encoding= errors=",
    )


def test_an_empty_document_is_kept(toy_capture: Callable[..., Captured]) -> None:
    """It has its number and no rows; so has a file without text."""
    store = toy_capture(["", "the war", " \n "]).store
    assert [store.document(i)["n_tokens"] for i in range(3)] == [0, 2, 0]
    assert [store.document(i)["text"] for i in range(3)] == ["", "the war", " \n "]
    assert set(all_tokens(store)["document"].to_pylist()) == {1}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"context": 16}, r"another context: it has 24, now it would be 16"),
        ({"overlap": 3}, r"another overlap: it has 0, now it would be 3"),
        ({"batch_tokens": 50}, r"another batch_tokens: it has 96, now it would be 50"),
        ({"sites": "mlp_post.1"}, r"another sites: it has .*, now it would be mlp_post.1\."),
        ({"dtype": "float32"}, r"another dtype of resid_pre.0: it has float16, now .* float32"),
        ({"limits": Limits(max_tokens=50)}, r"another corpus: max_tokens was null, now it is 50"),
    ],
)
def test_a_store_of_another_plan(
    change: dict[str, Any], what: str, toy_capture: Callable[..., Captured]
) -> None:
    """The difference is named, and what is there is not touched."""
    store = toy_capture().store
    before = stored_bytes(store)
    refused(StoreMismatch, what, lambda: toy_capture(**change))
    assert stored_bytes(store) == before
    assert toy_capture().windows_fed == 0


def test_a_store_of_another_model_or_tokenizer(
    toy_capture: Callable[..., Captured], toy_bert: LanguageModel
) -> None:
    """Weights and tokenizer are told apart by what they are, not by their names."""
    path = toy_capture().store.path
    other = load(*toy_model("bert", seed=1))
    assert other.name == toy_bert.name
    options = {"context": 24, "batch_tokens": 96}
    refused(
        StoreMismatch,
        r"from toy-bert with another model: it has toy-bert \(BertModel, .* name a new store",
        lambda: capture(other, DOCUMENTS, path, **options),
    )
    module, tokenizer = toy_model("bert")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = None
    refused(
        StoreMismatch,
        "another tokenizer",
        lambda: capture(load(module, tokenizer), DOCUMENTS, path, **options),
    )


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("mlp_pots", r"'mlp_pots' is not in toy-bert; it has .*mlp_post.0–2.* mean 'mlp_post'\?"),
        ("mlp_post.3", r"'mlp_post.3' is not in toy-bert; it has resid_pre.0–2, mlp_post.0–2, "),
        (["mlp_post", "attn_out.1"], r"'attn_out.1' is not in toy-bert"),
        ([], "no site was named"),
    ],
)
def test_a_site_or_layer_the_model_lacks(
    sites: Any, message: str, toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """What there is, and the nearest name; nothing is made."""
    refused(
        SiteNotFound, message, lambda: capture(toy_bert, DOCUMENTS, tmp_path / "s", sites=sites)
    )
    assert not (tmp_path / "s").exists()


def test_too_little_free_disk(
    toy_bert: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before the model runs, with the bytes needed and free; later it goes on."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12_345))
    with counted(toy_bert) as fed:
        text = refused(
            NotEnoughDisk,
            r"needs ([\d,]+) bytes and 12,345 are free there\.",
            lambda: capture(toy_bert, DOCUMENTS, tmp_path / "store", dtype="float16"),
            "max_tokens",
        )
    assert not fed
    with pytest.raises(OSError, match="are free there"):
        capture(toy_bert, DOCUMENTS, tmp_path / "store", dtype="float16")
    monkeypatch.undo()
    store = capture(toy_bert, DOCUMENTS, tmp_path / "store", dtype="float16").store
    needed = int(re.search(r"needs ([\d,]+)", text)[1].replace(",", ""))
    shards = [p.stat().st_size for p in store.path.glob("activations/**/c/*/0")]
    columns = sum(info.width for info in store.meta.sites)
    index = (14_000 + 900 * len(store.planned)) * columns
    assert needed == sum(shards) + index, "the bytes of shards, and of index and partials"


def test_a_disk_that_fills_up_leaves_a_store_that_goes_on(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the disk in the writer thread reaches the caller; what was committed stands."""
    from actstore.store import SegmentWriter

    whole = toy_capture(name="whole")
    commit = SegmentWriter.commit

    def full(writer: SegmentWriter, *rest: Any) -> Any:
        if writer.segment.segment == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return commit(writer, *rest)

    monkeypatch.setattr(SegmentWriter, "commit", full)
    with pytest.raises(NotEnoughDisk, match=r"is full: .* run the same capture again"):
        toy_capture()
    path = whole.store.path.with_name("store")
    assert CoreStore(path).committed == (0, 1, 2)
    monkeypatch.undo()
    assert stored_bytes(toy_capture().store) == stored_bytes(whole.store)


def test_a_disk_that_fills_up_in_the_middle_of_a_shard_leaves_no_lock_behind(
    toy_capture: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written is not tried again on the way out, and the same process goes on."""
    whole = toy_capture(name="whole")
    flush, calls = durable.StreamFile._flush, itertools.count()

    def full(file: durable.StreamFile, n_bytes: int) -> None:
        if next(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(file, n_bytes)

    monkeypatch.setattr(durable.StreamFile, "_flush", full)
    with pytest.raises(NotEnoughDisk, match="run the same capture again"):
        toy_capture()
    monkeypatch.undo()
    assert stored_bytes(toy_capture().store) == stored_bytes(whole.store)


def poisoned(value: float) -> LanguageModel:
    """Return a toy model in which the token "union" starts as one value in all channels."""
    module, tokenizer = toy_model("bert")
    with torch.no_grad():
        embeddings = module.embeddings.word_embeddings.weight
        embeddings[tokenizer.convert_tokens_to_ids("union")] = value
    return load(module, tokenizer)


def test_nan_names_site_token_and_document(tmp_path: Path) -> None:
    """NaN stops the capture by default; what was committed before stands."""
    documents = [{"text": "the war was over", "source": "1945"}] * 4
    documents.append({"text": "the state of the union", "source": "1946"})
    text = refused(
        NonFiniteActivation,
        r"resid_pre.0 of toy-bert has 32 NaN, the first at row_id = \d+, neuron = 0 \(token 'union'"
        r" of document '1946'\)\. Segment 0 is not stored",
        lambda: capture(poisoned(float("nan")), documents, tmp_path / "store"),
        "on_nan= --on-nan",
    )
    store = CoreStore(tmp_path / "store")
    row_id = int(re.search(r"row_id = (\d+)", text)[1])
    token = store.tokens_of([row_id]).to_pylist()[0]
    assert token["document"] == 4
    assert store.n_rows() == 0
    with pytest.raises(FloatingPointError):
        capture(poisoned(float("nan")), documents, tmp_path / "store")


def test_a_special_token_is_named_by_its_piece(tmp_path: Path) -> None:
    """[CLS] has no text in the document; the vocabulary has its name."""
    module, tokenizer = toy_model("bert")
    with torch.no_grad():
        module.embeddings.word_embeddings.weight[tokenizer.cls_token_id] = float("nan")
    with pytest.raises(NonFiniteActivation, match=r"\(token '\[CLS\]' of document 'document 0'\)"):
        capture(load(module, tokenizer), ["the war"], tmp_path / "store")


def hot(neuron: int = 3) -> LanguageModel:
    """Return a toy model with a neuron of layer 1 that no float16 can hold."""
    module, tokenizer = toy_model("bert")
    with torch.no_grad():
        module.encoder.layer[1].intermediate.dense.bias[neuron] = 1e6
    return load(module, tokenizer)


def test_overflow_is_saturated_and_counted(tmp_path: Path) -> None:
    """By default the largest float16 is stored, and every commit says how often and where."""
    store = capture(hot(), DOCUMENTS, tmp_path / "store").store
    largest = float(np.finfo(np.float16).max)
    assert (store["mlp_post.1"][:][:, 3] == largest).all()
    for segment in store.committed:
        counts = store.commit_of(segment).counts
        assert set(counts) == {"mlp_post.1"}
        rows = store.planned[segment].rows[""]
        assert (counts["mlp_post.1"].n_overflow, counts["mlp_post.1"].n_nan) == (rows, 0)
        first = segment * store.meta.segment_rows
        assert counts["mlp_post.1"].places[:2] == ((first, 3), (first + 1, 3))
    others = np.delete(store["mlp_post.1"][:], 3, axis=1)
    assert np.abs(others).max() < 1000


def test_overflow_can_stop_the_capture(tmp_path: Path) -> None:
    """With on_overflow="error" site, token and document are named; float32 holds the values."""
    refused(
        NonFiniteActivation,
        r"mlp_post.1 of toy-bert has \d+ values outside float16, .*neuron = 3 \(token .* of docum",
        lambda: capture(hot(), DOCUMENTS, tmp_path / "store", on_overflow="error"),
        "dtype= --dtype on_overflow= --on-overflow",
    )
    store = capture(hot(), DOCUMENTS, tmp_path / "wide", dtype="float32", on_overflow="error").store
    assert store["mlp_post.1"][:][:, 3].min() > 9e5


def test_residual_sites_beyond_float16_are_probed(tmp_path: Path) -> None:
    """Of a float32 model, a residual site that exceeds 1,000 in the probe is stored as float32."""
    module, tokenizer = toy_model("gpt2", n_layers=2)
    with torch.no_grad():
        module.h[1].mlp.c_proj.bias[5] = 2000.0
    store = capture(load(module, tokenizer), [TEXT], tmp_path / "store").store
    assert {str(i.site): i.dtype for i in store.meta.sites} == {
        "resid_pre.0": "float16",
        "mlp_post.0": "float16",
        "mlp_post.1": "float16",
        "resid_post.0": "float16",
        "resid_post.1": "float32",
    }
    assert store["resid_post.1"][:].dtype == np.float32
    assert store["resid_post.1"][:][:, 5].min() > 1900


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_sixteen_bits_keep_theirs(dtype: torch.dtype, tmp_path: Path) -> None:
    """A 16-bit model is stored bit by bit as it computes; a 64-bit one as one of 32."""
    module, tokenizer = toy_model("gpt2", n_layers=1, dtype=dtype)
    store = capture(load(module, tokenizer), [TEXT[:80]], tmp_path / "store").store
    stored = {info.dtype for info in store.meta.sites}
    assert stored == {"float16" if dtype == torch.float64 else str(dtype).removeprefix("torch.")}


def test_a_folder_that_is_no_store(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """A folder with other files is refused before the model is loaded, and is not touched."""
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(
        StoreNotFound,
        r"with its zarr.json, and .* is a folder without a store",
        lambda: run_capture("no/such/model/at/all", text="the war", path=tmp_path),
    )
    refused(StoreNotFound, "without a store", lambda: capture(toy_bert, DOCUMENTS, tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    refused(
        StoreNotFound,
        r"thesis.tex is a file; name a folder for the store\.",
        lambda: capture(toy_bert, DOCUMENTS, tmp_path / "thesis.tex"),
    )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("settings", "message", "remedies"),
    [
        ({"context": 2}, r"context = 2 cannot be: toy-bert takes at most 512", "context="),
        ({"context": 513}, r"context = 513 cannot be", "context= --context"),
        ({"context": 0}, r"context = 0 cannot be", ""),
        (
            {"context": 24, "overlap": 22},
            r"overlap = 22 must be at least 0 and less than the 22",
            "",
        ),
        ({"overlap": -1}, r"overlap = -1 must be at least 0", ""),
        ({"context": 24, "batch_tokens": 23}, r"batch_tokens = 23 must hold", "--batch-tokens"),
        ({"batch_tokens": -5}, r"batch_tokens = -5 must hold", ""),
        ({"dtype": "int8"}, r"dtype = 'int8' is not one of auto, float16, float32, bfloat16", ""),
        ({"limits": Limits(0, None)}, r"max_tokens = 0 leaves no token of text: 2 of a window", ""),
        ({"limits": Limits(None, 2)}, r"max_document_tokens = 2 leaves no token of text", ""),
    ],
)
def test_settings_that_cannot_be(
    settings: dict[str, Any], message: str, remedies: str, toy_bert: LanguageModel, tmp_path: Path
) -> None:
    """Numbers that leave no room for text are refused before anything is made."""
    refused(
        ArgumentError,
        message,
        lambda: run_capture(toy_bert, DOCUMENTS, tmp_path / "s", settings=Settings(**settings)),
        remedies,
    )
    assert not (tmp_path / "s").exists()


def test_a_budget_that_holds_no_band(toy_bert: LanguageModel, tmp_path: Path) -> None:
    """What the fewest bands take is named beside the budget."""
    refused(
        BudgetExceeded,
        r"needs [\d,]+ MB \(a batch of 4096 tokens, .* bands of 4096 rows, .* the budget is 67 MB",
        lambda: capture(
            load(*toy_model("bert", n_layers=12, hidden=256, ffn=1024)),
            [TEXT * 9],
            tmp_path / "s",
            budget=64 * 2**20,
            segment_rows=4096,
            chunk_rows=4096,
            batch_tokens=4096,
        ),
        "budget= --budget",
    )
