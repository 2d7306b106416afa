"""One pass of second moments: what exact CKA and the CCA family are functions of.

Sums of products about a pilot mean: float32 products of a few thousand rows at a time, added up in
float64.  Without the shift a column whose mean is a hundred standard deviations loses six digits;
with it covariances agree with float64 to 1e-8 whatever the mean.  The pilot is the mean of a sample
of rows, and what it misses is taken off at the end, by algebra.

All pairs of sites are wanted, and the matrix of all columns by all columns may not fit: it is cut
into *tiles*, each a pair of groups of sites with a pass of its own.  Tiles change how often rows
are read, not what is added up.

References
----------
T. Chan, G. Golub, R. LeVeque, Algorithms for computing the sample variance: analysis and
recommendations, The American Statistician 37 (1983): shifted data.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from actstore.decompose.device import here, there
from actstore.decompose.engine import Engine, Sums
from actstore.decompose.on_dask import MOST_RANGES
from actstore.decompose.scan import Block, Scan
from actstore.errors import BudgetExceeded

Float64 = npt.NDArray[np.float64]

_PILOT_ROWS = 4096
_BLOCK_BYTES = 1 << 27
_BLOCK_ROWS = (256, 4096)  # least and most: float32 sums of more rows would lose digits


@dataclass(frozen=True)
class Frame:
    """What is taken off every column, and what it is multiplied by then."""

    shift: torch.Tensor
    """Float32 ``(width,)``: the pilot mean."""
    variance: torch.Tensor
    """Float64 ``(width,)``: the variance that is left, of a sample or, standardized, of all."""
    scale: torch.Tensor | None = None
    """Float32 ``(width,)``, 0 for a constant column; None leaves the columns as they are."""

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Shift and scale rows in place."""
        values -= self.shift
        if self.scale is not None:
            values *= self.scale
        return values

    def there(self) -> Frame:
        """Return the frame on the device, for blocks that are put there."""
        scale = None if self.scale is None else there(self.scale)
        return Frame(there(self.shift), self.variance, scale)

    def of(self, columns: slice) -> Frame:
        """Return the frame of some columns."""
        scale = None if self.scale is None else self.scale[columns]
        return Frame(self.shift[columns], self.variance[columns], scale)


@dataclass(frozen=True)
class _ColumnSums:
    """Sums and sums of squares of every column."""

    shift: torch.Tensor

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        sums = torch.zeros(2, len(self.shift), dtype=torch.float64)
        n_rows = 0
        for block in blocks:
            values = block.values
            values -= self.shift
            sums[0] += values.sum(0).double()
            sums[1] += torch.linalg.vector_norm(values, dim=0).double().square()
            n_rows += len(values)
        return {"n": torch.tensor(float(n_rows), dtype=torch.float64), "sums": sums}


def frame_of(scan: Scan, engine: Engine, standardize: bool) -> Frame:
    """Return the frame of a scan's columns: the mean of a sample, and on request unit variances.

    Cost: 4,096 rows; with `standardize` all of them, since a neuron that is rarely active has no
    variance in a sample.
    """
    sample = scan.sample(_PILOT_ROWS)
    total = sum((block.values.double().sum(0) for block in sample), torch.zeros(()))
    # Of a constant column this is the constant to the last bit, so it becomes zero.
    shift = (total / len(sample)).float()
    if standardize:
        found = engine.total(
            scan, _ColumnSums(shift), list(scan.ordered_ranges(block_rows(scan.width)))
        )
    else:
        found = _ColumnSums(shift)(sample)
    mean, square = found["sums"] / found["n"]
    variance = (square - mean.square()).clamp(min=0)
    if not standardize:
        return Frame(shift, variance)
    # A constant column keeps what float32 leaves of it, which is nothing where the pilot is exact.
    scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
    return Frame(shift, variance * scale.square(), scale.float())


def block_rows(width: int) -> int:
    """Return the rows of a block of products: a power of two that follows from the width alone."""
    least, most = _BLOCK_ROWS
    return min(most, max(least, 1 << ((_BLOCK_BYTES // (4 * width)).bit_length() - 1)))


@dataclass(frozen=True)
class Products:
    """Sums of products between columns, with the sums over rows that go with them."""

    pairs: tuple[tuple[slice, slice], ...]
    """Columns by columns: the products that are wanted."""
    sites: tuple[slice, ...]
    """The columns of each site."""
    frame: Frame
    """Shift and scale of the columns."""

    def __call__(self, blocks: Iterable[Block]) -> Sums:
        """Return sums over the rows: of values, of products, of squared norms and products of them.

        ``sum`` (width,), ``product.i`` for each pair, and with r the squared norms of a row at the
        sites: ``norm`` (sites,), ``norm_norm`` (sites, sites), ``norm_value`` (sites, width);
        float64.
        """
        width, n_sites = len(self.frame.shift), len(self.sites)
        shapes = [(a.stop - a.start, b.stop - b.start) for a, b in self.pairs]
        products = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
        frame = self.frame.there()
        spare = frame.shift.new_empty(max(rows * columns for rows, columns in shapes))
        total = torch.zeros(width, dtype=torch.float64)
        norm = torch.zeros(n_sites, dtype=torch.float64)
        norm_norm = torch.zeros(n_sites, n_sites, dtype=torch.float64)
        norm_value = torch.zeros(n_sites, width, dtype=torch.float64)
        n_rows = 0
        for block in blocks:
            values = frame.apply(there(block.values))
            n_rows += len(values)
            total += here(values.sum(0, dtype=torch.float64))
            norms = torch.stack(
                [torch.linalg.vector_norm(values[:, site], dim=1) for site in self.sites]
            ).square()
            norm += here(norms.sum(1, dtype=torch.float64))
            norm_norm += here(norms.double() @ norms.double().T)
            norm_value += here(norms @ values)
            for product, (a, b), shape in zip(products, self.pairs, shapes, strict=True):
                out = spare[: shape[0] * shape[1]].view(shape)
                product += here(torch.mm(values[:, a].T, values[:, b], out=out))
        return {
            "n": torch.tensor(float(n_rows), dtype=torch.float64),
            "sum": total,
            "norm": norm,
            "norm_norm": norm_norm,
            "norm_value": norm_value,
            **{f"product.{i}": product for i, product in enumerate(products)},
        }


@dataclass(frozen=True)
class Tile:
    """Centred moments between two groups of sites; within one group where they are the same."""

    rows: list[int]
    """Sites of the one group, by number."""
    columns: list[int]
    """Sites of the other."""
    n: int
    """Rows."""
    _sums: Sums
    _spans: dict[int, slice]  # the columns of its sites, in the order of the scan

    def pairs(self) -> list[tuple[int, int]]:
        """Return the pairs of sites it answers for, each once."""
        if self.rows == self.columns:
            return list(itertools.combinations_with_replacement(self.rows, 2))
        return list(itertools.product(self.rows, self.columns))

    def offset(self, site: int) -> Float64:
        """Return the mean of a site's columns about the pilot, ``(width,)``."""
        mean: Float64 = (self._sums["sum"][self._spans[site]] / self.n).numpy()
        return mean

    def _about_pilot(self, a: int, b: int) -> Float64:
        """Return the sum over rows of products about the pilot."""
        rows, columns = self._spans[a], self._spans[b]
        if self.rows == self.columns:
            # One product a site: its columns by those of all sites from it on.
            product, first_row, first = f"product.{self.rows.index(a)}", rows.start, rows.start
        else:
            product, first_row, first = "product.0", 0, self._spans[self.columns[0]].start
        found: Float64 = self._sums[product][
            rows.start - first_row : rows.stop - first_row,
            columns.start - first : columns.stop - first,
        ].numpy()
        return found

    def moment(self, a: int, b: int) -> Float64:
        """Return the sum over rows of centred products, ``(width of a, width of b)``."""
        moment = np.outer(self.offset(a), self.offset(b))
        moment *= -self.n
        moment += self._about_pilot(a, b)
        return moment

    def norm_product(self, a: int, b: int) -> float:
        """Return the sum over rows of the squared centred norm at `a` times that at `b`."""
        i, j = (list(self._spans).index(site) for site in (a, b))
        at_a, at_b = self.offset(a), self.offset(b)
        square_a, square_b = float(at_a @ at_a), float(at_b @ at_b)
        norm, norm_value = (self._sums[name].numpy() for name in ("norm", "norm_value"))
        return (
            float(self._sums["norm_norm"][i, j])
            - 2 * float(norm_value[i, self._spans[b]] @ at_b)
            - 2 * float(norm_value[j, self._spans[a]] @ at_a)
            + square_b * float(norm[i])
            + square_a * float(norm[j])
            + 4 * float(at_a @ self._about_pilot(a, b) @ at_b)
            - 3 * self.n * square_a * square_b
        )


MakeScan = Callable[[Sequence[int], int], Scan]
"""Returns a scan of some sites, by number, and with so many bytes reserved."""


def tiles(
    make_scan: MakeScan,
    widths: Sequence[int],
    frames: Sequence[Frame],
    engine: Engine,
    *,
    free_bytes: int,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Tile]:
    """Yield the moments of all pairs of sites, tile by tile: those within a group come first.

    Cost: ``rows x width**2`` multiplications for all pairs, and a pass over the sites of each tile;
    memory 8 bytes for every product of a tile, on workers 48, and 4 for the largest part of it.

    Parameters
    ----------
    make_scan : callable
        Returns a scan of some sites.
    widths : sequence of int
        Columns of each site.
    frames : sequence of Frame
        What is taken off the columns of each site.
    engine : Engine
        Where it runs.
    free_bytes : int
        What a tile may take.
    progress : callable, optional
        Called with rows done and rows of all passes.

    Raises
    ------
    BudgetExceeded
        If the widest pair of sites does not fit.
    """
    groups = _groups(widths, free_bytes, engine.n_sums)
    passes = _meetings(groups)
    done = 0
    for rows, columns in passes:
        sites = rows if rows == columns else [*rows, *columns]
        edges = np.cumsum([0] + [widths[site] for site in sites]).tolist()
        spans = dict(zip(sites, itertools.starmap(slice, itertools.pairwise(edges)), strict=True))
        if rows == columns:
            pairs = [(span, slice(span.start, edges[-1])) for span in spans.values()]
        else:
            edge = spans[columns[0]].start
            pairs = [(slice(0, edge), slice(edge, edges[-1]))]
        chosen = [frames[site] for site in sites]
        scales = [frame.scale for frame in chosen if frame.scale is not None]
        frame = Frame(
            torch.cat([frame.shift for frame in chosen]),
            torch.cat([frame.variance for frame in chosen]),
            torch.cat(scales) if scales else None,
        )
        scan = make_scan(sites, _bytes_between(widths, rows, columns, engine.n_sums))
        segments = list(scan.ordered_ranges(block_rows(scan.width)))
        # One range has one sum; a tree would hold several.
        size = -(-len(segments) // (1 if engine.is_local else MOST_RANGES))
        ranges = [
            list(itertools.chain.from_iterable(segments[first : first + size]))
            for first in range(0, len(segments), size)
        ]

        def tell(n_rows: int, before: int = done, n_all: int = len(passes) * scan.n_rows) -> None:
            if progress:
                progress(before + n_rows, n_all)

        sums = engine.total(
            scan, Products(tuple(pairs), tuple(spans.values()), frame), ranges, progress=tell
        )
        done += scan.n_rows
        yield Tile(rows, columns, scan.n_rows, sums, spans)


def _meetings(groups: Sequence[list[int]]) -> list[tuple[list[int], list[int]]]:
    """Return the pairs of groups, those of a group with itself first."""
    return [(group, group) for group in groups] + [*itertools.combinations(groups, 2)]


def _bytes_between(widths: Sequence[int], rows: list[int], columns: list[int], n_sums: int) -> int:
    """Return what the products of two groups take: their sums, and the largest of a block."""
    wide, across = (sum(widths[site] for site in group) for group in (rows, columns))
    if rows != columns:
        return (8 * n_sums + 4) * wide * across
    own = [widths[site] for site in rows]
    return 4 * n_sums * (wide**2 + sum(w**2 for w in own)) + 4 * max(own) * wide


def _groups(widths: Sequence[int], free_bytes: int, n_sums: int) -> list[list[int]]:
    """Return the sites in as few groups as fit when two of them meet."""
    for n_groups in range(1, len(widths) + 1):
        # As even as whole sites allow.
        target = sum(widths) / n_groups
        groups: list[list[int]] = [[] for _ in range(n_groups)]
        before = 0
        for site, width in enumerate(widths):
            groups[min(int((before + width / 2) / target), n_groups - 1)].append(site)
            before += width
        groups = [group for group in groups if group]
        needed = max(_bytes_between(widths, *pair, n_sums) for pair in _meetings(groups))
        if needed <= free_bytes:
            return groups
    raise BudgetExceeded(
        f"the products of a site of {max(widths):,} columns take {needed:,} bytes, and the budget "
        f"leaves {free_bytes:,}. Pass a budget= larger by {needed - free_bytes:,} (--budget), "
        "fewer sites, or method='estimate' for CKA."
    )
