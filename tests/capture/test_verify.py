"""Verify: sound stores pass, and what is wrong though its checksums are right is found.

Faults are made on the way to the writer, so that every checksum belongs to what was written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner

import actstore
from actstore import durable
from actstore.capturing import Limits, Verification
from actstore.capturing.batches import batches
from actstore.cli import main
from actstore.errors import ArgumentError, StoreMismatch
from actstore.models import LanguageModel, load
from actstore.site import Site
from actstore.store import SegmentWriter, SiteInfo
from tests.captured import DOCUMENTS, Captured, capture
from tests.toys import TEXT, toy_model

ALL = 10**9
Band = npt.NDArray[Any]


def verified(made: Captured, n_rows: int = ALL, **options: Any) -> Verification:
    """Return what `Store.verify` finds in a store, by default in all of its rows."""
    return actstore.open(made.store.path).verify(n_rows, model=made.model, **options)


@contextmanager
def bands_changed(change: Callable[[int, SiteInfo, Band], tuple[SiteInfo, Band]]) -> Iterator[None]:
    """Let `change` have its way with each band of a segment and site before it is written."""
    write_band = SegmentWriter.write_band

    def changed(self: SegmentWriter, info: SiteInfo, band: Band) -> None:
        write_band(self, *change(self.segment.segment, info, band.copy()))

    with mock.patch.object(SegmentWriter, "write_band", changed):
        yield


@contextmanager
def tables_changed(start: str, end: str, change: Callable[[pa.Table], pa.Table]) -> Iterator[None]:
    """Let `change` have its way with the tables under some names before they are written."""
    start_writer, write = durable.TableWriter.__init__, durable.TableWriter.write
    mine: list[durable.TableWriter] = []

    def started(self: durable.TableWriter, path: Path, *rest: Any) -> None:
        start_writer(self, path, *rest)
        if f"/{start}" in str(path) and str(path).endswith(end):
            mine.append(self)

    def changed(self: durable.TableWriter, table: pa.Table) -> None:
        write(self, change(table) if self in mine else table)

    with mock.patch.multiple(durable.TableWriter, __init__=started, write=changed):
        yield
    assert mine, "nothing was written under these names"


def test_a_sound_store_passes(toy_store: Captured) -> None:
    """All rows of a store: every window, value and exemplar is looked at, nothing is wrong."""
    store = toy_store.store
    found = verified(toy_store)

    assert found.ok
    assert found.mismatches == ()
    assert found.n_rows == store.n_rows()
    assert found.n_windows == sum(part.n_windows for part in store.parts)
    assert found.n_documents == sum(bool(text.strip()) for text in DOCUMENTS)
    assert found.n_values == store.n_rows() * sum(info.width for info in store.meta.sites)
    assert found.n_columns == 4
    generation = store.index()
    assert generation is not None
    names = [name for name in generation.files if name.endswith("exemplars.parquet")]
    assert found.n_exemplars == sum(len(pa.parquet.read_table(store.path / n)) for n in names)
    assert found.largest <= 1
    assert "mismatches  none" in str(found)


@pytest.mark.parametrize(
    ("architecture", "overlap", "dtype"), [("gpt2", 7, "auto"), ("llama", 5, "float32")]
)
def test_sound_stores_of_other_families_pass(
    architecture: str, overlap: int, dtype: str, tmp_path: Path
) -> None:
    """Prefix tokens or none at all, context that is fed but not stored, either stored type."""
    model = load(*toy_model(architecture))
    options: dict[str, Any] = {"overlap": overlap, "dtype": dtype, "batch_tokens": 96}
    made = capture(model, DOCUMENTS, tmp_path / "store", **options)

    assert verified(made).mismatches == ()


def test_the_real_minilm_passes(minilm_store: Captured) -> None:
    """The real model: other batches change some values, and stay within the tolerance."""
    found = verified(minilm_store)

    assert found.mismatches == ()
    assert 0 < found.largest <= 1


def test_a_16_bit_model_passes(tmp_path: Path) -> None:
    """A bfloat16 model: its roundings stay within its own, wider tolerance."""
    module, tokenizer = toy_model("llama", dtype=torch.bfloat16)
    made = capture(load(module, tokenizer), DOCUMENTS, tmp_path / "store", batch_tokens=96)

    assert verified(made).mismatches == ()


def test_a_text_that_a_limit_cut_passes(toy_gpt2: LanguageModel, tmp_path: Path) -> None:
    """Documents of which only the first tokens were wanted, one cut inside a character."""
    documents = [*DOCUMENTS, "🎉🎉🎉🎉"]
    made = capture(toy_gpt2, documents, tmp_path / "store", limits=Limits(None, 11))
    last = made.store.document(len(documents) - 1)
    assert (last["n_tokens"], last["text"]) == (11, "🎉🎉🎉"), "three of the last four bytes"

    assert verified(made).mismatches == ()


@pytest.mark.parametrize("keep", ["none", "1/4", {"mlp_post": "1/2", "resid_post": "none"}])
def test_stores_that_keep_less_pass(keep: Any, toy_capture: Callable[..., Captured]) -> None:
    """Of what is stored all is compared; exemplars are compared in any case."""
    made = toy_capture(keep=keep)
    found = verified(made)

    assert found.mismatches == ()
    sites = [made.store[site] for site in made.store.sites]
    assert found.n_values == sum(len(site.row_ids()) * site.info.width for site in sites)
    assert found.n_exemplars > 10_000


def test_windows_hold_stored_rows_where_few_are_stored(
    toy_capture: Callable[..., Captured],
) -> None:
    """However few rows are kept, whatever is drawn has some to compare."""
    made = toy_capture(keep="1/64", sites="mlp_post.1")
    assert len(made.store["mlp_post.1"].row_ids()) == len(made.store.planned)

    for seed in range(20):
        assert verified(made, 20, seed=seed).n_values > 0


def test_nan_and_saturated_values_pass(tmp_path: Path) -> None:
    """What a model cannot help is stored as it came, and comes again."""
    module, tokenizer = toy_model("gpt2", n_layers=2)
    with torch.no_grad():
        module.wte.weight[tokenizer("work")["input_ids"][-1]] = torch.nan
        module.h[1].mlp.c_fc.weight *= 1e5
    model = load(module, tokenizer)
    options: dict[str, Any] = {"dtype": "float16", "on_nan": "count", "batch_tokens": 96}
    made = capture(model, DOCUMENTS, tmp_path / "store", **options)
    values = made.store["mlp_post.1"][made.store["mlp_post.1"].row_ids()]
    assert 0 < np.isnan(values).sum() < values.size
    assert (values == 65504).any()

    assert verified(made).mismatches == ()


def test_windows_are_drawn_until_the_rows_are_there(toy_store: Captured) -> None:
    """About as many rows as asked for; the seed says which, and they differ."""
    few = verified(toy_store, 60)
    assert 60 <= few.n_rows < 60 + 24
    assert few == verified(toy_store, 60)
    assert few.n_exemplars != verified(toy_store, 60, seed=1).n_exemplars


def test_windows_are_run_in_other_batches(toy_capture: Callable[..., Captured]) -> None:
    """Every window is run again, and none among the same others as when it was captured."""

    def windows_in(input_ids: Any, lengths: Any) -> tuple[bytes, ...]:
        rows = zip(input_ids, lengths, strict=True)
        return tuple(ids[:n].numpy().tobytes() for ids, n in rows)

    made = toy_capture(segment_rows=512)
    store, model = made.store, made.model
    forward, again = model.forward, []

    def recording(input_ids: Any, lengths: Any, *rest: Any) -> None:
        again.append(windows_in(input_ids, lengths))
        forward(input_ids, lengths, *rest)

    with mock.patch.object(model, "forward", recording):
        verified(made)
    captured = {
        windows_in(batch.input_ids, batch.lengths)
        for segment in store.planned
        for batch in batches(store, model, segment)
    }
    assert sum(map(len, again)) == sum(part.n_windows for part in store.parts)
    assert not {batch for batch in again if len(batch) > 1} & captured


def test_one_flipped_value_is_found(toy_capture: Callable[..., Captured]) -> None:
    """One bit of one value, a sign or a high bit of the fraction, is told with its place."""

    def flip(segment: int, info: SiteInfo, band: Band) -> tuple[SiteInfo, Band]:
        if segment == 3 and str(info.site) == "mlp_post.1" and not flipped:
            row, column = 5, int(np.abs(band[0, 5]).argmax())
            flipped.append((row, column, float(band[0, row, column])))
            band.view(np.uint16)[0, row, column] ^= 1 << 7
        return info, band

    flipped: list[tuple[int, int, float]] = []
    with bands_changed(flip):
        made = toy_capture()
    ((row, column, value),) = flipped

    found = verified(made)

    assert not found.ok
    values = [m for m in found.mismatches if m.what == "value"]
    assert [(m.site, m.row_id, m.neuron) for m in values] == [
        ("mlp_post.1", 3 * made.store.meta.segment_rows + row, column)
    ]
    assert values[0].computed == pytest.approx(value, rel=1e-3)
    assert abs(values[0].stored - value) > 0.02 * abs(value)
    assert found.largest > 20


@pytest.mark.parametrize("keep", ["all", "1/4"])
def test_one_shifted_row_is_found(keep: str, toy_capture: Callable[..., Captured]) -> None:
    """Rows of one site that stand one place too late in one segment."""

    def shift(segment: int, info: SiteInfo, band: Band) -> tuple[SiteInfo, Band]:
        if segment == 2 and str(info.site) == "resid_post.1":
            band = np.ascontiguousarray(np.roll(band, 1, axis=1))
        return info, band

    with bands_changed(shift):
        made = toy_capture(keep=keep)

    found = verified(made)

    assert not found.ok
    assert {(m.site, m.row_id // 64) for m in found.mismatches if m.what == "value"} == {
        ("resid_post.1", 2)
    }
    stored = sum(len(made.store[site].row_ids(slice(128, 192))) for site in ["resid_post.1"])
    assert found.n_mismatches > stored * 32 // 2


def test_one_swapped_layer_is_found(toy_capture: Callable[..., Captured]) -> None:
    """The arrays of two layers exchanged, each whole and in order."""

    def swap(segment: int, info: SiteInfo, band: Band) -> tuple[SiteInfo, Band]:
        other = {"mlp_post.0": "mlp_post.2", "mlp_post.2": "mlp_post.0"}.get(str(info.site))
        return info if other is None else replace(info, site=Site.parse(other)), band

    with bands_changed(swap):
        made = toy_capture()

    found = verified(made, 60)

    assert {m.site for m in found.mismatches if m.what == "value"} == {"mlp_post.0", "mlp_post.2"}
    assert found.n_mismatches > 0.5 * 60 * 2 * 64


COLUMNS = {
    "token_id": lambda column: [*column[:30], column[31], column[30], *column[32:]],
    "position": lambda column: [*column[:30], column[30] + 1, *column[31:]],
    "doc_position": lambda column: [*column[:30], column[30] + 1, *column[31:]],
    "char_start": lambda column: [*column[:30], column[30] - 1, *column[31:]],
    "char_end": lambda column: [*column[:30], column[30] + 1, *column[31:]],
    "flags": lambda column: [*column[:30], column[30] ^ 1, *column[31:]],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_wrong_token_is_found(name: str, toy_capture: Callable[..., Captured]) -> None:
    """Two swapped tokens, or a wrong place, span or flag of one: the text says otherwise."""

    def change(table: pa.Table) -> pa.Table:
        column = pa.array(
            COLUMNS[name](table.column(name).to_pylist()), table.schema.field(name).type
        )
        return table.set_column(table.schema.get_field_index(name), name, column)

    with tables_changed("tokens/", ".parquet", change):
        made = toy_capture(["It was the war, and the people went back to work in 1947. " * 3])

    found = verified(made)

    wrong = [m for m in found.mismatches if m.what == name]
    rows = made.store["mlp_post.0"].row_ids()
    assert [m.row_id for m in wrong] == rows[[30, 31] if name == "token_id" else [30]].tolist()
    assert all(m.site is None for m in wrong)
    assert all(m.stored != m.computed for m in wrong)


def test_another_text_is_found(toy_capture: Callable[..., Captured]) -> None:
    """A stored text that is not what the tokens came from."""

    def change(table: pa.Table) -> pa.Table:
        texts = [text.replace("war", "car") for text in table.column("text").to_pylist()]
        column = pa.array(texts, table.schema.field("text").type)
        return table.set_column(table.schema.get_field_index("text"), "text", column)

    with tables_changed("documents/", ".parquet", change):
        made = toy_capture([TEXT])

    assert not verified(made).ok


def _set(table: pa.Table, row: int, name: str, change: Callable[[Any], Any]) -> pa.Table:
    column = table.column(name).to_pylist()
    column[row] = change(column[row])
    array = pa.array(column, table.schema.field(name).type)
    return table.set_column(table.schema.get_field_index(name), name, array)


def _without(table: pa.Table, side: str) -> pa.Table:
    """Return exemplars without the third of a list of neuron 5."""
    columns = (table.column(name).to_pylist() for name in ("side", "neuron", "rank"))
    return table.filter([place != (side, 5, 3) for place in zip(*columns, strict=True)])


FAULTS: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "value": (lambda t: _set(t, 3, "value", lambda v: v * 1.1 + 0.1), "exemplar"),
    "row": (lambda t: _set(t, 3, "row_id", lambda r: r + 1), "exemplar"),
    "token": (lambda t: _set(t, 3, "token_id", lambda i: i + 1), "token_id of an exemplar"),
    "no top": (lambda t: _without(t, "top"), "exemplar, top"),
    "no bottom": (lambda t: _without(t, "bottom"), "exemplar, bottom"),
    "no window": (lambda t: _without(t, "window"), "exemplar, window"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_index_is_found(fault: str, toy_capture: Callable[..., Captured]) -> None:
    """A wrong value, row or token of one exemplar, or one that is missing, without stored rows."""
    change, what = FAULTS[fault]
    with tables_changed("exemplars/hook=mlp_post/layer=1", ".parquet", change):
        made = toy_capture([TEXT], keep="none", sites="mlp_post")

    found = verified(made)

    wrong = [m for m in found.mismatches if m.what.startswith(what)]
    assert wrong
    assert {m.site for m in found.mismatches} == {"mlp_post.1"}


def test_whole_columns_of_the_index_are_compared(toy_capture: Callable[..., Captured]) -> None:
    """Statistics and lists of whole columns are wrong where no row of the list was run again."""

    def shift(table: pa.Table) -> pa.Table:
        for name in ("mean", "max", "n"):
            i = table.schema.get_field_index(name)
            column = pa.compute.add(table.column(name), pa.scalar(1, table.schema.field(name).type))
            table = table.set_column(i, name, column)
        return table

    def swap(table: pa.Table) -> pa.Table:
        # The second and third place of each list: no threshold and no value betrays it.
        ranks = table.column("rank").to_numpy()
        order = np.arange(len(ranks))
        second = np.flatnonzero(ranks == 2)
        order[second], order[second + 1] = second + 1, second
        swapped = table.take(order)
        i = table.schema.get_field_index("rank")
        return swapped.set_column(i, "rank", table.column("rank"))

    with tables_changed("index/", "neurons.parquet", shift):
        made = toy_capture(name="statistics")
    kinds = {m.what for m in verified(made, 24).mismatches}
    assert kinds == {"n of a neuron", "mean of a neuron", "max of a neuron"}

    with tables_changed("index/", "exemplars.parquet", swap):
        made = toy_capture(name="lists")
    found = verified(made)
    assert found.n_mismatches >= 4
    assert {m.what for m in found.mismatches} <= {
        f"{side} list, rank 2" for side in ("top", "bottom", "window")
    }


def test_a_store_without_rows_or_of_another_model_is_refused(
    toy_store: Captured, toy_capture: Callable[..., Captured]
) -> None:
    """Nothing to verify, another model, and a count that is none are errors, not mismatches."""
    with pytest.raises(StoreMismatch, match="with weights"):
        actstore.open(toy_store.store.path).verify(model=load(*toy_model("bert", seed=1)))
    with pytest.raises(ArgumentError, match="n_rows = 0"):
        verified(toy_store, 0)
    made = toy_capture(["war"])
    (made.store.path / "commits/00000000.json").unlink()
    with pytest.raises(ArgumentError, match="no row yet"):
        verified(made)


def test_the_command_prints_what_it_checked_and_exits_1_on_a_mismatch(
    model_folder: Path, tmp_path: Path
) -> None:
    """A sound store exits 0; a wrong one exits 1 and tells site, row, neuron and both values."""

    def run(store: Path, code: int, *more: str) -> str:
        command = ["verify", str(store), "--model", str(model_folder), *more]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == code, result.output
        return result.stdout

    def negate(segment: int, info: SiteInfo, band: Band) -> tuple[SiteInfo, Band]:
        return info, -band if str(info.site) == "resid_post.2" else band

    sound, wrong = tmp_path / "sound", tmp_path / "wrong"
    actstore.capture(model_folder, text=TEXT, store=sound, context=32)
    with bands_changed(negate):
        actstore.capture(model_folder, text=TEXT, store=wrong, context=32)

    said = run(sound, 0, "--rows", "40", "--format", "table")
    assert "mismatches  none" in said
    assert "2 of 1 document, 64 rows" in said
    said = run(wrong, 1, "--format", "table")
    place = r"value, resid_post\.2, row_id = (\d+), neuron = (\d+): stored (\S+), computed (\S+)\n"
    match = re.search(place, said)
    assert match
    value = actstore.open(wrong)["resid_post.2"][int(match[1])][int(match[2])]
    assert float(match[3]) == pytest.approx(float(value), rel=1e-5)
    assert float(match[4]) == pytest.approx(-float(value), rel=1e-2)
    facts = json.loads(run(wrong, 1))
    assert facts["n_mismatches"] > 1000
    assert facts["mismatches"][0]["what"] == "value"
