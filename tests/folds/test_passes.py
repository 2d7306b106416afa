"""Passes over bands are equal to the folds' definitions, and mend what they should.

Each test runs the compiled pass of the CPU and that of devices, which torch's CPU stands for, and a
GPU where there is one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actstore.errors import ArgumentError
from actstore.folds import Gram, Histogram, Moments, Sample, TopK, WindowTop, Zones, cpu, device
from actstore.folds.cpu import BandFolds
from actstore.folds.device import DeviceFolds
from actstore.folds.device import band as device_band
from actstore.folds.device import folds as device_run
from actstore.folds.device import lists as device_lists
from actstore.folds.moments import MomentsState
from actstore.folds.passes import SiteFolds, SiteThresholds
from actstore.folds.topk import Ranked, Thresholds, TopKState
from actstore.folds.window_top import WindowThresholds
from actstore.shard import DTYPES
from actstore.store.stored_rows import hash_rows

LARGEST = {"float16": 65504.0, "bfloat16": 3.3895313892515355e38, "float32": 3.4028234663852886e38}

MakeFolds = Callable[..., Any]
"""Makes the folds of a segment: called as `BandFolds` is."""

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, no_gpu])]


class FoldsOnDevice(DeviceFolds):
    """Device folds that take NumPy bands, which go to the device and come back mended."""

    def __init__(self, *args: Any, n_threads: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)

    def update(self, site_index: int, band: np.ndarray, *rest: Any, **named: Any) -> Any:
        """Add a band."""
        is_bits = band.dtype.kind in "iuV"  # ml_dtypes' kinds are V
        here = torch.from_numpy(band.view(f"i{band.itemsize}") if is_bits else band)
        if band.dtype == DTYPES["bfloat16"]:
            here = here.view(torch.bfloat16)
        there = here.to(self._device)
        found = super().update(site_index, there, *rest, **named)
        here.copy_(there)
        return found


@pytest.fixture(scope="module", params=["compiled", *DEVICES, "cpu in small parts"])
def make_folds(request: pytest.FixtureRequest) -> Iterator[MakeFolds]:
    """Return what makes the folds of one pass after the other."""
    if request.param == "compiled":
        yield BandFolds
        return
    device_name, *small = request.param.split(maxsplit=1)
    with ExitStack() as changed:
        if small:  # as bands are in which a block, a look or a merge does not take all at once
            for module, name, n in (
                (device_band, "BLOCK_VALUES", 64),
                (device_run, "_LOOK_VALUES", 400),
                (device_run, "_HELD_ROWS", 5),
                (device_lists, "_MERGED_KEYS", 400),
                (device_lists, "_MOST_ADDED", 8),
                (device_lists, "_MOST_SETTLED", 1),
            ):
                changed.enter_context(mock.patch.object(module, name, n))
        yield partial(FoldsOnDevice, device=torch.device(device_name))


def to_bands(block: np.ndarray, chunk_rows: int, chunk_columns: int) -> list[np.ndarray]:
    """Lay rows out as bands; what no row or column fills is infinite, so that using it shows."""
    n_chunks = -(-block.shape[1] // chunk_columns)
    bands = []
    for first in range(0, len(block), chunk_rows):
        rows = block[first : first + chunk_rows]
        padded = np.full((chunk_rows, n_chunks * chunk_columns), np.inf, block.dtype)
        padded[: len(rows), : block.shape[1]] = rows
        parts = padded.reshape(chunk_rows, n_chunks, chunk_columns)
        bands.append(np.ascontiguousarray(parts.transpose(1, 0, 2)))
    return bands


def windows_of(n: int, seed: int = 0, longest: int = 60) -> np.ndarray:
    """Windows of any lengths, their ids in no order."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, n)
    return np.repeat(rng.permutation(n), lengths)[:n]


def fold_bands(
    make_folds: MakeFolds,
    block: np.ndarray,
    dtype: str,
    is_content: np.ndarray,
    *,
    chunk_rows: int,
    chunk_columns: int,
    k: int,
    windows: np.ndarray | None = None,
    first_row_id: int = 0,
    n_threads: int = 1,
    sample: Sample | None = None,
    with_gram: bool = False,
    thresholds: Any = None,
) -> SiteFolds:
    """Fold a block band by band; without windows all rows are one."""
    windows = np.zeros(len(block), np.int64) if windows is None else windows
    folds = make_folds(
        [block.shape[1]],
        [dtype],
        first_row_id=first_row_id,
        k=k,
        sample=sample,
        gram_sites=[0] if with_gram else [],
        n_threads=n_threads,
    )
    for i, band in enumerate(to_bands(block, chunk_rows, chunk_columns)):
        mine = slice(i * chunk_rows, (i + 1) * chunk_rows)
        content, others = np.flatnonzero(is_content[mine]), np.flatnonzero(~is_content[mine])
        folds.update(0, band, content, others, windows[mine][content], i * chunk_rows, thresholds)
    return folds.finish(0)


def saturated(block: np.ndarray, dtype: str) -> np.ndarray:
    """The block as float32 with the largest finite value for infinities."""
    with np.errstate(invalid="ignore"):  # a NaN may be a signalling one
        x = block.astype(np.float32)
    return np.where(np.isinf(x), np.copysign(np.float32(LARGEST[dtype]), x), x)


def of_all(fold: Any, block: np.ndarray, first_row_id: int = 0, *windows: np.ndarray) -> Any:
    """What a fold's definition says of rows."""
    rows = np.arange(len(block)) + first_row_id
    return fold.update(fold.start(block.shape[1]), block, rows, *windows)


def definition(
    block: np.ndarray,
    dtype: str,
    is_content: np.ndarray,
    k: int,
    first_row_id: int = 0,
    windows: np.ndarray | None = None,
) -> tuple[MomentsState, MomentsState, TopKState, Ranked]:
    """What the definitions of moments and lists say of the block."""
    x = saturated(block, dtype)
    rows = np.arange(len(block)) + first_row_id
    windows = np.zeros(len(block), np.int64) if windows is None else windows
    moments, topk, window_top = Moments(), TopK(k), WindowTop(k)
    width = block.shape[1]
    mine = x[is_content], rows[is_content]
    return (
        moments.update(moments.start(width), *mine),
        moments.update(moments.start(width), x[~is_content], rows[~is_content]),
        topk.update(topk.start(width), *mine),
        window_top.update(window_top.start(width), *mine, windows[is_content]),
    )


def assert_moments(got: MomentsState, want: MomentsState) -> None:
    """Counts and extremes exactly; sums to 1e-9 of the sum of their terms' magnitudes."""
    for name in ("n", "n_positive", "min", "max"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        assert getattr(got, name).dtype == getattr(want, name).dtype
    size = np.where(want.n > 0, np.maximum(np.abs(want.min), np.abs(want.max)), 0.0)
    assert (np.abs(got.mean - want.mean) <= 1e-9 * size).all()
    np.testing.assert_allclose(got.energy_positive, want.energy_positive, rtol=1e-9)
    np.testing.assert_allclose(got.m2, want.m2, rtol=1e-9)
    np.testing.assert_allclose(got.m4, want.m4, rtol=1e-9)
    # The third is a difference of terms no larger together than this (Cauchy-Schwarz).
    assert (np.abs(got.m3 - want.m3) <= 1e-9 * np.sqrt(want.m2 * want.m4)).all()


def assert_list(a: Ranked, b: Ranked) -> None:
    """The same list bit for bit."""
    np.testing.assert_array_equal(a.counts, b.counts)
    np.testing.assert_array_equal(a.row_ids, b.row_ids)
    np.testing.assert_array_equal(
        a.values.view(np.uint32)[a.taken], b.values.view(np.uint32)[b.taken]
    )
    np.testing.assert_array_equal(a.values, b.values)


def assert_lists(got: TopKState, want: TopKState) -> None:
    """The same lists bit for bit."""
    assert_list(got.top, want.top)
    assert_list(got.bottom, want.bottom)


def assert_state(fold: Any, got: Any, want: Any) -> None:
    """The same state bit for bit, NaN of any bits."""
    a, b = fold.to_arrays(got), fold.to_arrays(want)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def activations(n: int, width: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Rows like an FFNN's, with columns that are constant, mostly zero, tiny and tied."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.normal(0, 2, width), rng.gamma(1.0, 2.0, width), (n, width))
    x[:, 1::11] = 0.1
    x[:, 2::11] = np.maximum(x[:, 2::11], 0)
    x[:, 3::11] *= 1e-6
    x[:, 4::11] = np.round(x[:, 4::11])
    x[:, 5::11] = np.where(rng.random((n, 1)) < 0.5, -0.0, 0.0)
    x[:, 6::11] += 1000 * (np.arange(n)[:, None] > n // 2)
    x[: n // 7, 7::11] = 3000.0
    return x.astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("width", "chunk_columns"), [(37, 37), (514, 128), (384, 192), (1, 1), (256, 256)]
)
def test_the_pass_is_the_definition(
    make_folds: MakeFolds, dtype: str, width: int, chunk_columns: int
) -> None:
    """Lists, counts and extremes are exact and moments right, for every dtype and layout."""
    block = activations(1511, width, dtype)
    block[5, 0] = block[700, width // 2] = np.inf
    block[6, 0] = block[800, width - 1] = -np.inf
    block[7, 0] = block[900, width // 3] = np.nan
    is_content = np.random.default_rng(1).random(1511) > 0.03
    windows, sample = windows_of(1511), Sample(n_rows=101)
    got = fold_bands(
        make_folds,
        block,
        dtype,
        is_content,
        chunk_rows=512,
        chunk_columns=chunk_columns,
        k=31,
        windows=windows,
        n_threads=2,
        sample=sample,
    )
    moments, others, topk, window_top = definition(block, dtype, is_content, 31, 0, windows)
    assert_moments(got.moments, moments)
    assert_moments(got.moments_others, others)
    assert_lists(got.topk, topk)
    assert_list(got.window_top, window_top)
    rows, x = np.flatnonzero(is_content), saturated(block, dtype)[is_content]
    for fold, values, name in (
        (Histogram(), x, "histogram"),
        (Zones(512), x, "zones"),
        (sample, x.astype(DTYPES[dtype]), "sample"),
    ):
        want = fold.update(fold.start(width), values, rows)
        assert_state(fold, getattr(got, name), want)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bands_of_any_size_give_the_definition(make_folds: MakeFolds, data: st.DataObject) -> None:
    """Any rows, bands, k and content give the definition: ties, zeros, subnormals, faults."""
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    values = [0.0, -0.0, 1.0, -1.0, 2.5, 6e-8, -6e-8, 1e-40, 3e4, np.inf, -np.inf, np.nan]
    n, width = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 5))
    seed, k = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([1, 2, 7, 40]))
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        block = rng.choice(values, (n, width)).astype(DTYPES[dtype])
    is_content = rng.random(n) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    windows = windows_of(n, seed, data.draw(st.sampled_from([1, 4, 11, 90])))
    chunk_rows, sample = data.draw(st.sampled_from([1, 2, 8, 64])), Sample(7)
    got = fold_bands(
        make_folds,
        block,
        dtype,
        is_content,
        chunk_rows=chunk_rows,
        chunk_columns=data.draw(st.integers(1, 6)),
        k=k,
        windows=windows,
        first_row_id=128,
        sample=sample,
    )
    moments, others, topk, window_top = definition(block, dtype, is_content, k, 128, windows)
    assert_moments(got.moments, moments)
    assert_moments(got.moments_others, others)
    assert_lists(got.topk, topk)
    assert_list(got.window_top, window_top)
    rows, x = np.flatnonzero(is_content) + 128, saturated(block, dtype)[is_content]
    histogram, zones = Histogram(), Zones(chunk_rows)
    assert_state(histogram, got.histogram, histogram.update(histogram.start(width), x, rows))
    assert_state(zones, got.zones, zones.update(zones.start(width), x, rows))
    if len(rows):
        values = x.astype(DTYPES[dtype])
        assert_state(sample, got.sample, sample.update(sample.start(width), values, rows))
    assert got.nan.n == np.isnan(block).sum()
    assert got.overflow.n == np.isinf(block.astype(np.float64)).sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_pattern_is_read_right(make_folds: MakeFolds, dtype: str) -> None:
    """All 65,536 patterns, subnormals included, have NumPy's value, order and bin."""
    block = np.arange(65536, dtype=np.uint16).view(DTYPES[dtype]).reshape(4096, 16)
    content = np.ones(4096, bool)
    got = fold_bands(make_folds, block, dtype, content, chunk_rows=4096, chunk_columns=16, k=4096)
    assert_lists(got.topk, definition(block, dtype, content, k=4096)[2])
    x = saturated(block, dtype)
    assert_state(Histogram(), got.histogram, of_all(Histogram(), x))
    exponent = {"float16": 0x7C00, "bfloat16": 0x7F80}[dtype]
    assert got.nan.n == (np.arange(65536) & 0x7FFF > exponent).sum() > 0


def test_what_the_lower_half_of_a_float32_holds_is_seen(make_folds: MakeFolds) -> None:
    """Tiny values are not 0 and a NaN is no infinity, where only the lower bits say so."""
    bits = np.uint32([1, 0x80000001, 0x7FFF, 0x7F800001, 0xFF800001, 0, 0x80000000, 0x37800001])
    block, content = bits.view(np.float32)[:, None], np.ones(8, bool)
    got = fold_bands(make_folds, block, "float32", content, chunk_rows=8, chunk_columns=1, k=8)
    assert got.moments.n_positive.tolist() == [3]
    assert (got.nan.n, got.overflow.n) == (2, 0)
    assert_state(Histogram(), got.histogram, of_all(Histogram(), saturated(block, "float32")))
    assert_lists(got.topk, definition(block, "float32", content, 8)[2])


def test_the_number_of_threads_changes_no_bit() -> None:
    """One, two and three threads give the same bits, faults and their places included."""
    block = activations(777, 514, "float16")
    block[::3, ::7] = np.inf
    block[1::5, ::11] = np.nan
    is_content = np.arange(777) % 13 > 0
    results = [
        fold_bands(
            BandFolds,
            block,
            "float16",
            is_content,
            chunk_rows=256,
            chunk_columns=128,
            k=19,
            windows=windows_of(777),
            n_threads=n,
        )
        for n in (1, 2, 3)
    ]
    for other in results[1:]:
        for name in ("moments", "moments_others"):
            for key, array in Moments().to_arrays(getattr(results[0], name)).items():
                assert array.tobytes() == getattr(getattr(other, name), key).tobytes(), key
        assert_lists(other.topk, results[0].topk)
        assert_list(other.window_top, results[0].window_top)
        for fold in (Histogram(), Zones(), Sample()):
            assert_state(fold, getattr(other, fold.name), getattr(results[0], fold.name))
        assert other.nan == results[0].nan
        assert other.overflow == results[0].overflow


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_replaced_in_the_band_and_nothing_else_is(
    make_folds: MakeFolds, dtype: str
) -> None:
    """Infinities of named rows become the largest finite value; all other bits stay."""
    rng = np.random.default_rng(2)
    band = rng.normal(size=(2, 32, 4)).astype(DTYPES[dtype])
    band[0, 3, 1], band[1, 4, 2], band[1, 5, 0] = np.inf, -np.inf, np.nan
    band[0, 20, 0] = np.inf  # of no named row
    band[1, 3, 3] = np.inf  # of no column
    want = band.copy()
    want[0, 3, 1], want[1, 4, 2] = LARGEST[dtype], -LARGEST[dtype]
    folds = make_folds([7], [dtype], first_row_id=100, k=3)
    assert folds.update(0, band, np.arange(0, 16), np.arange(0), np.zeros(16)) == (1, 2)
    assert band.tobytes() == want.tobytes()
    got = folds.finish(0)
    assert (got.overflow.n, got.overflow.places) == (2, ((103, 1), (104, 6)))
    assert (got.nan.n, got.nan.places) == (1, ((105, 4),))
    assert got.moments.n.tolist() == [16, 16, 16, 16, 15, 16, 16]
    assert got.topk.top.row_ids[1, 0] == 103
    assert got.topk.bottom.row_ids[6, 0] == 104
    assert got.window_top.row_ids[1].tolist() == [103, -1, -1]
    assert got.sample.values[3, 1] == DTYPES[dtype].type(LARGEST[dtype])


def test_other_rows_are_mended_too_but_enter_no_list(make_folds: MakeFolds) -> None:
    """An infinity of a first row is replaced and counted, and no list names the row."""
    band = np.ones((1, 8, 3), np.float32)
    band[0, 0] = np.inf
    folds = make_folds([3], ["float32"], first_row_id=0, k=8)
    assert folds.update(0, band, np.arange(1, 8), np.arange(1), np.zeros(7)) == (0, 3)
    got = folds.finish(0)
    assert np.isfinite(band).all()
    assert got.moments_others.max.tolist() == [LARGEST["float32"]] * 3
    assert got.moments.max.tolist() == [1.0] * 3
    assert 0 not in got.topk.top.row_ids
    assert got.window_top.values[:, 0].tolist() == [1.0] * 3
    assert got.histogram.counts.sum(axis=1).tolist() == [7] * 3
    assert got.zones.extremes.tolist() == [[[1.0] * 3] * 2]
    assert 0 not in got.sample.row_ids
    assert got.topk.top.counts.tolist() == [7] * 3


def test_only_the_first_places_are_remembered(make_folds: MakeFolds) -> None:
    """Of many faults the sixteen first, by row, then column, are remembered, across bands."""
    folds = make_folds([70], ["float16"], first_row_id=0, k=3, n_threads=2)
    for i in range(3):
        band = np.zeros((1, 16, 70), np.float16)
        band[0, 3, ::11] = np.nan
        folds.update(0, band, np.arange(16), np.arange(0), np.zeros(16), 16 * i)
    got = folds.finish(0).nan
    assert got.n == 21
    every = [(16 * i + 3, column) for i in range(3) for column in range(0, 70, 11)]
    assert got.places == tuple(every[:16])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_thresholds_of_committed_segments_lose_no_row(
    make_folds: MakeFolds, data: st.DataObject
) -> None:
    """Segments done in any order, each under the lists of those before, give the lists of all."""
    k, n_segments = data.draw(st.sampled_from([1, 3, 9])), 4
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    # Few different values: the thresholds are nearly always tied with.
    levels = data.draw(st.sampled_from([2, 5, 50]))
    block = rng.integers(0, levels, (n_segments * 32, 3)).astype(np.float16)
    content = rng.random(len(block)) < 0.9
    windows = windows_of(32, longest=7)
    fold, window_fold, sample = TopK(k), WindowTop(k), Sample(2 * k)
    committed, windows_committed = fold.start(3), window_fold.start(3)
    sampled = sample.start(3)
    for segment in data.draw(st.permutations(range(n_segments))):
        mine = slice(32 * segment, 32 * segment + 32)
        got = fold_bands(
            make_folds,
            block[mine],
            "float16",
            content[mine],
            chunk_rows=8,
            chunk_columns=2,
            k=k,
            windows=windows,
            first_row_id=32 * segment,
            sample=sample,
            thresholds=SiteThresholds(
                fold.thresholds(committed),
                window_fold.thresholds(windows_committed),
                sample.threshold(sampled.row_ids),
            ),
        )
        committed = fold.merge(committed, got.topk)
        windows_committed = window_fold.merge(windows_committed, got.window_top)
        sampled = sample.merge(sampled, got.sample)
    all_windows = np.concatenate([windows + 32 * i for i in range(n_segments)])
    _, _, topk, window_top = definition(block, "float16", content, k, 0, all_windows)
    assert_lists(committed, topk)
    assert_list(windows_committed, window_top)
    rows = np.flatnonzero(content)
    assert_state(sample, sampled, sample.update(sample.start(3), block[content], rows))


@pytest.mark.parametrize(("threshold_row", "ties"), [(5, []), (1000, [61, 1])])
def test_thresholds_keep_hopeless_rows_out(
    make_folds: MakeFolds, threshold_row: int, ties: list[int]
) -> None:
    """Lists hold only what comes before the thresholds: ties only if theirs is a later row."""
    block = np.arange(64, dtype=np.float32)[:, None]
    rows = np.array([threshold_row])
    thresholds = SiteThresholds(
        Thresholds(*np.float32([[61], [1]]), rows, rows),
        WindowThresholds(np.float32([61]), rows),
        np.sort(hash_rows(np.arange(100, 164), Sample().seed))[4],
    )
    got = fold_bands(
        make_folds,
        block,
        "float32",
        np.ones(64, bool),
        chunk_rows=16,
        chunk_columns=1,
        k=5,
        windows=np.arange(64),
        first_row_id=100,
        thresholds=thresholds,
    )
    top, bottom = got.topk.top, got.topk.bottom
    assert top.values[0, : top.counts[0]].tolist() == [63, 62, *ties[:1]]
    assert bottom.values[0, : bottom.counts[0]].tolist() == [0, *ties[1:]]
    assert_list(got.window_top, top)
    assert len(got.sample.row_ids) == 5


def test_columns_of_zeros_do_not_fill_the_candidates_again(make_folds: MakeFolds) -> None:
    """Once a bottom list is full of zeros, later zeros are not even candidates."""
    folds = make_folds([1], ["float16"], first_row_id=0, k=10)
    for i in range(8):
        band, rows = np.zeros((1, 64, 1), np.float16), np.arange(64)
        folds.update(0, band, rows, np.arange(0), rows + 64 * i, 64 * i)
        site = folds._sites.running(0)
        if isinstance(folds, BandFolds):
            assert site.candidates.counts.tolist() == [[10], [10]]
            assert site.window_candidates.counts.tolist() == [[10]]
        elif i:
            assert int(site.lists.n_loose) == 0
    got = folds.finish(0).topk
    assert got.bottom.row_ids.tolist() == got.top.row_ids.tolist() == [list(range(10))]


@pytest.mark.parametrize("first_rows", [[7], [8], [9], [1, 7, 8, 9, 24, 25], [32], [33], [60]])
def test_windows_end_anywhere(make_folds: MakeFolds, first_rows: list[int]) -> None:
    """Windows that end inside groups and bands, or at their edges, give one row each."""
    rng = np.random.default_rng(3)
    block = rng.integers(0, 9, (70, 5)).astype(np.float16)
    windows = np.searchsorted(first_rows, np.arange(70), side="right")
    content = np.ones(70, bool)
    got = fold_bands(
        make_folds, block, "float16", content, chunk_rows=32, chunk_columns=5, k=10, windows=windows
    ).window_top
    assert_list(got, definition(block, "float16", content, 10, 0, windows)[3])
    assert got.counts.tolist() == [len(first_rows) + 1] * 5


@pytest.mark.parametrize("dtype", DTYPES)
def test_grams_are_those_of_float64(make_folds: MakeFolds, dtype: str) -> None:
    """Products in float32 give the float64 Gram to 3e-5, though half of a column lies 1,000 off.

    A row with NaN is left out whole.
    """
    block = activations(2999, 70, dtype)
    block[5, 3] = np.nan
    content = np.arange(2999) % 7 > 0
    got = fold_bands(
        make_folds, block, dtype, content, chunk_rows=1024, chunk_columns=35, k=2, with_gram=True
    ).gram
    want = of_all(Gram(), block[content])
    assert got.n == want.n == content.sum() - 1
    scale = np.sqrt(np.diag(want.m2) / want.n)
    np.testing.assert_allclose(got.mean, want.mean, atol=1e-6, rtol=1e-6)
    assert (np.abs(got.m2 - want.m2) <= 3e-5 * want.n * np.outer(scale, scale) + 1e-12).all()


def test_nothing_seen_gives_the_state_of_no_rows(make_folds: MakeFolds) -> None:
    """A site without a content row has the states that folds start from."""
    folds = make_folds([4], ["bfloat16"], first_row_id=0, k=3, gram_sites=[0])
    folds.update(
        0, np.ones((1, 8, 4), DTYPES["bfloat16"]), np.arange(0), np.arange(8), np.arange(0)
    )
    got = folds.finish(0)
    for fold in (TopK(3), WindowTop(3), Histogram(), Zones(), Sample(), Gram()):
        assert_state(fold, getattr(got, fold.name), fold.start(4))
    assert got.moments_others.n.tolist() == [8] * 4


def test_sites_are_apart(make_folds: MakeFolds) -> None:
    """Each site has its own width, dtype and state, which go when it is finished."""
    folds = make_folds([3, 2], ["float16", "bfloat16"], first_row_id=0, k=2)
    assert folds.n_bytes == 0
    band, rows = np.ones((1, 8, 2), DTYPES["bfloat16"]), np.arange(8)
    folds.update(1, band, rows, np.arange(0), rows)
    held = folds.n_bytes
    without = folds.finish(0)
    assert without.moments.n.tolist() == [0, 0, 0]
    assert without.topk.top.counts.tolist() == [0, 0, 0]
    assert folds.n_bytes == held > 0
    assert folds.finish(1).moments.n.tolist() == [8, 8]
    assert folds.n_bytes == 0


@pytest.mark.parametrize("site_index", [0, -1, 2])
def test_a_finished_site_takes_no_more(make_folds: MakeFolds, site_index: int) -> None:
    """Nor is it finished twice; a band that came late would be lost without a word."""
    folds = make_folds([2, 2], ["float16", "float16"], first_row_id=0, k=2)
    band, rows = np.ones((1, 8, 2), DTYPES["float16"]), np.arange(8)
    folds.update(0, band, rows, np.arange(0), rows)
    folds.finish(0)
    for call in (
        lambda: folds.finish(site_index),
        lambda: folds.update(site_index, band, rows, np.arange(0), rows, 8),
    ):
        with pytest.raises(ArgumentError, match=f"site_index = {site_index} is no site, or was"):
            call()


@pytest.mark.parametrize(("dtype", "with_gram"), [("float16", False), ("float32", True)])
def test_the_memory_it_takes_is_the_memory_that_was_told(
    make_folds: MakeFolds, dtype: str, with_gram: bool
) -> None:
    """The state after some bands is within what `state_bytes` says, and not far below."""
    block = activations(2048, 64, dtype)
    folds = make_folds(
        [64], [dtype], first_row_id=0, k=50, sample=Sample(101), gram_sites=[0] * with_gram
    )
    on_device = isinstance(folds, DeviceFolds)
    told = (device if on_device else cpu).state_bytes(64, dtype, 50, 101, 8, with_gram)
    most = 0
    for i, band in enumerate(to_bands(block, 256, 64)):
        rows = np.arange(1, 256)
        folds.update(0, band, rows, np.arange(1), rows // 9, 256 * i)
        most = max(most, folds.n_bytes)
    # Gram: products in float32, and the state made of the sums.  Device: candidates that wait.
    slack = 64 * 3 * 1200 if on_device else 12 * 64**2 * with_gram
    assert 0.75 * told - slack <= most <= told


def test_a_band_may_be_given_as_its_bits(make_folds: MakeFolds) -> None:
    """Bits, as other libraries hand out bfloat16, are read as the site's dtype."""
    block = activations(64, 6, "bfloat16")
    as_bits = make_folds([6], ["bfloat16"], first_row_id=0, k=4)
    (band,) = to_bands(block, 64, 3)
    as_bits.update(0, band.view(np.uint16), np.arange(64), np.arange(0), np.zeros(64))
    want = fold_bands(
        make_folds, block, "bfloat16", np.ones(64, bool), chunk_rows=64, chunk_columns=3, k=4
    )
    assert_lists(as_bits.finish(0).topk, want.topk)


def start_thresholds(width: int, window_width: int) -> SiteThresholds:
    """Thresholds of empty lists."""
    fold, windows = TopK(2), WindowTop(2)
    return SiteThresholds(
        fold.thresholds(fold.start(width)), windows.thresholds(windows.start(window_width))
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"band": np.zeros((2, 8, 4), np.float32)}, "is float32; expected float16 or its bits"),
        ({"band": np.zeros((8, 8), np.float16)}, r"\(8, 8\).*for 7 columns.*to_band"),
        ({"band": np.zeros((3, 8, 4), np.float16)}, "for 7 columns"),
        ({"band": np.zeros((1, 8, 4), np.float16)}, "for 7 columns"),
        ({"band": np.zeros((2, 8, 8), np.float16)[:, :, ::2]}, "C-contiguous"),
        ({"content": np.array([3, 2])}, "content of site_index = 0 must be ascending.*sort them"),
        ({"content": np.array([8])}, "rows of the band, 0 to 7"),
        ({"others": np.array([-1])}, "others of site_index = 0"),
        ({"windows": np.zeros(3)}, "3 windows at site_index = 0 for 8 content rows; give the wind"),
        ({"first_offset": 7}, "first_offset = 7 .* between 8, where the last band ended"),
        ({"thresholds": start_thresholds(3, 7)}, r"expected \(7,\)"),
        ({"thresholds": start_thresholds(7, 3)}, r"expected \(7,\)"),
    ],
)
def test_mistakes_are_named(make_folds: MakeFolds, change: dict[str, Any], message: str) -> None:
    """A band, rows or thresholds that do not fit are refused, and what fits is said."""
    folds = make_folds([7], ["float16"], first_row_id=0, k=2)
    good: dict[str, Any] = {
        "band": np.zeros((2, 8, 4), np.float16),
        "content": np.arange(8),
        "others": np.arange(0),
        "windows": np.zeros(8),
    }
    folds.update(0, **good)
    good["first_offset"] = 8
    with pytest.raises(ArgumentError, match=message):
        folds.update(0, **(good | change))
    folds.update(0, **good)
    assert folds.finish(0).moments.n.tolist() == [16] * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, 4], ["float16"], 2), "2 widths and 1 dtypes"),
        (([3], ["float64"], 2), "'float64' cannot be stored; choose one of float16"),
        (([3, 0], ["float16"] * 2, 2), "a width of 0 is no site"),
        (([3], ["float16"], 0), "k = 0 keeps nothing; give k >= 1"),
    ],
)
def test_impossible_folds_are_refused(
    make_folds: MakeFolds, arguments: tuple[Any, ...], message: str
) -> None:
    """Sites and k that cannot be folded are refused before any band comes."""
    widths, dtypes, k = arguments
    with pytest.raises(ArgumentError, match=message):
        make_folds(widths, dtypes, first_row_id=0, k=k)
