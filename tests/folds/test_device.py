"""What folds on a device do beside being right: how rows are cut, and how little is waited for."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from actstore.folds import TopK, WindowTop, device
from actstore.folds.device import DeviceFolds, temporary_bytes
from actstore.folds.device.folds import _bin_table
from actstore.folds.device.lists import EMPTY, DeviceLists, keys_of, offsets_of, values_of
from actstore.folds.device.pieces import Fetched, cut
from actstore.folds.histogram import bins_of
from actstore.folds.passes import BandRows, SiteThresholds

CPU = torch.device("cpu")


@given(lengths=st.lists(st.integers(1, 70), max_size=12), n_others=st.integers(0, 9))
def test_pieces_are_the_content_rows_and_cross_no_window(lengths: list[int], n_others: int) -> None:
    """Every content row is in one piece, in order; a piece repeats at most its last row."""
    n = sum(lengths)
    rows = np.random.default_rng(n).permutation(n + n_others)
    content, others = np.sort(rows[:n]), np.sort(rows[n:])
    windows = np.repeat(np.arange(len(lengths))[::-1], lengths)
    pieces = cut(BandRows(content, others, windows), CPU)
    found, sizes = pieces.rows.numpy(), pieces.sizes.numpy()
    own = np.arange(found.shape[1]) < sizes[:, None]
    assert found[own].tolist() == pieces.content.tolist() == content.tolist()
    assert pieces.others.tolist() == others.tolist()
    window_of = dict(zip(content.tolist(), windows.tolist(), strict=True))
    for mine, size, window in zip(found.tolist(), sizes, pieces.windows.tolist(), strict=True):
        assert {window_of[row] for row in mine} == {len(lengths) - 1 - window}
        assert set(mine[size:]) <= {mine[size - 1]}
    assert found.size <= 3 * n
    assert len(found) <= n / 16 + len(lengths) + n * (found.shape[1] < 16)
    assert pieces.n_windows == len(lengths)


@given(
    st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=False).map(lambda x: x + 0.0), st.integers(0, 2**32 - 1)
        )
    )
)
def test_keys_sort_as_places_do(places: list[tuple[float, int]]) -> None:
    """A larger key is a higher value, then a lower row; both can be read from it."""
    values = torch.tensor([value for value, _ in places], dtype=torch.float32)
    offsets = torch.tensor([offset for _, offset in places], dtype=torch.int64)
    keys = keys_of(values, offsets)
    assert torch.equal(values_of(keys), values)
    assert torch.equal(offsets_of(keys), offsets)
    order = np.argsort(-keys.numpy(), kind="stable")
    assert [places[i] for i in order] == sorted(places, key=lambda place: (-place[0], place[1]))
    assert (keys > EMPTY).all()


def test_the_tables_of_bins_are_the_definition() -> None:
    """Heads of float32 have the bin of every value that begins with them."""
    bits = np.random.default_rng(0).integers(0, 2**32, 10**6, dtype=np.uint32)
    bits[::3] &= np.uint32(0x80FFFFFF)  # tiny ones
    bits[::7] &= np.uint32(0xFF800007)  # just above an edge
    values = bits.view(np.float32)
    is_number = np.isfinite(values) & (values != 0)
    heads = (bits >> np.uint32(16)) | (bits & np.uint32(0xFFFF) != 0)
    np.testing.assert_array_equal(
        _bin_table("float32")[heads][is_number], bins_of(values[is_number])
    )


def test_candidates_of_one_list_may_be_all() -> None:
    """Keys of any lists in any order, empty ones between them, leave the best of each."""
    rng = np.random.default_rng(5)
    lists = DeviceLists(7, 3, CPU)
    added: list[list[int]] = [[] for _ in range(7)]
    for _ in range(40):
        keys = rng.integers(0, 10**6, 11) * 2**32
        numbers = rng.choice([0, 1, 1, 1, 1, 6], 11)
        keys[rng.random(11) < 0.4] = EMPTY
        lists.add(torch.from_numpy(keys), torch.from_numpy(numbers.astype(np.int32)))
        for key, number in zip(keys.tolist(), numbers.tolist(), strict=True):
            added[number] += [key] if key != EMPTY else []
        lists.close()
        lists.settle(int(lists.n_loose))
    best = [
        sorted((key for key in row if key != EMPTY), reverse=True) for row in lists.best().tolist()
    ]
    assert best == [sorted(row, reverse=True)[:3] for row in added]
    limits = [
        values_of(torch.tensor(row[-1:])).item() if len(row) == 3 else -np.inf for row in best
    ]
    assert lists.limits.tolist() == limits


def test_a_band_is_waited_for_once() -> None:
    """Of a usual band one number is fetched, and no other tensor crosses."""
    rng = np.random.default_rng(1)
    block = rng.normal(size=(256, 1, 48)).astype(np.float16)
    folds = DeviceFolds([48], ["float16"], first_row_id=10_000, device=CPU, k=5)
    fold, windows = TopK(5), WindowTop(5)
    values, rows = block[:, 0] * np.float16(0.99), np.arange(256)
    thresholds = SiteThresholds(
        fold.thresholds(fold.update(fold.start(48), values, rows)),
        windows.thresholds(windows.update(windows.start(48), values, rows, rows // 30)),
        np.uint64(0),
    )
    for i in range(4):
        band = torch.from_numpy(
            np.ascontiguousarray(block[64 * i : 64 * i + 64].transpose(1, 0, 2))
        )
        content = np.arange(1, 64)
        with (
            mock.patch.object(device.folds, "Fetched", wraps=Fetched) as fetched,
            mock.patch.object(torch.Tensor, "__int__", side_effect=AssertionError),
            mock.patch.object(torch.Tensor, "item", side_effect=AssertionError),
            mock.patch.object(torch.Tensor, "nonzero", side_effect=AssertionError),
        ):
            folds.update(0, band, content, np.arange(1), content // 30, 64 * i, thresholds)
        assert fetched.call_count == 1
    found = folds.finish(0)
    assert found.topk.top.counts.sum() > 100


def test_special_rows_do_not_pile_up() -> None:
    """Special and first rows wait to be added together, but not without bound."""
    folds = DeviceFolds([3], ["float16"], first_row_id=0, device=CPU, k=1)
    held = []
    for i in range(20):
        band = torch.ones((1, 100, 3), dtype=torch.float16)
        folds.update(0, band, np.arange(0), np.arange(100), np.arange(0), 100 * i)
        held.append(sum(map(len, folds._sites.running(0).held)))
    assert held == [100, 200, 300, 400, 500, 0] * 3 + [100, 200]
    assert folds.finish(0).moments_others.n.tolist() == [2000] * 3


def test_limits_cross_only_where_they_are_new() -> None:
    """Thresholds that did not change are not sent again; new ones are, and hold."""
    folds = DeviceFolds([2], ["float32"], first_row_id=100, device=CPU, k=1)

    def thresholds(floor: float) -> SiteThresholds:
        fold, windows = TopK(1), WindowTop(1)
        block = np.full((1, 2), floor, np.float32)
        return SiteThresholds(
            fold.thresholds(fold.update(fold.start(2), block, np.arange(1))),
            windows.thresholds(windows.update(windows.start(2), block, np.arange(1))),
        )

    sent = []
    for i, floor in enumerate([1.0, 1.0, 2.0]):
        with mock.patch.object(device.folds, "to_device", wraps=device.to_device) as crossing:
            band = torch.full((1, 4, 2), 1.5)
            folds.update(
                0, band, *(np.arange(4), np.arange(0), np.arange(4)), 4 * i, thresholds(floor)
            )
        sent.append([c.args[0].size for c in crossing.call_args_list].count(6))
    assert sent == [1, 0, 1]
    assert folds._sites.running(0).lists.limits.tolist()[:2] == [2.0, 2.0]


def test_temporary_memory_does_not_grow_with_the_width() -> None:
    """Of a site eight times as wide it is less than eight times as much: blocks bound it."""
    one, eight = (temporary_bytes(4096, width, 100) for width in (2048, 16384))
    assert one < eight < 5 * one
