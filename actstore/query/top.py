"""The strongest rows of a neuron, exactly, for any number of them and whatever is committed.

The index keeps the highest and lowest hundred values of every neuron over the segments it covers.
Where that is enough it is read; segments it does not cover are scanned and merged in; and where it
is not enough the whole stored column is scanned.  The order is total, so every way gives the same
rows: value first, then row, ascending; NaN never enters, and -0.0 equals 0.0.  Where a site does
not store every row a scan would be wrong, so what the index cannot answer is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index as as_integer

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.errors import ArgumentError, NeuronNotFound
from actstore.query.answer import Answer
from actstore.query.context import snippets
from actstore.site import Site
from actstore.store import FIRST, SPECIAL, CoreStore, Generation, SiteInfo
from actstore.store.stored_rows import ALL, keep_text

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]


class Top(Answer):
    """The strongest rows of a neuron, and how they were reached.

    Parameters
    ----------
    table : pyarrow.Table
        Columns rank, row_id, value, document, position, token, before, after, source.
    reached : str
        How: ``"index"``, ``"index + 2 segments scanned"``, or ``"column scan: …"``.
    """

    def __init__(self, table: pa.Table, reached: str) -> None:
        super().__init__(table)
        self.reached = reached

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n({self.reached})"


def top(
    store: CoreStore,
    site: str | Site,
    neuron: int,
    k: int = 20,
    *,
    largest: bool = True,
    before: int = 8,
    after: int = 8,
) -> Top:
    """Return the rows where a neuron is strongest, with the text around them.

    Exact over all committed content rows (neither special nor first), whether they are stored or
    not.  From the index it costs milliseconds; a scan reads one column, 2 to 4 bytes a row, and the
    token index.

    Parameters
    ----------
    store : CoreStore
        The store.
    site : str or Site
        The site, such as ``"mlp_post.5"``.
    neuron : int
        Index of the neuron, from 0.
    k : int, default 20
        Rows to return; all of them if there are fewer.
    largest : bool, default True
        The highest values; False for the lowest.
    before, after : int, default 8
        Tokens of context on either side.

    Returns
    -------
    Top
        The rows in order, with `Top.reached`.

    Raises
    ------
    SiteNotFound
        If the store does not have the site.
    NeuronNotFound
        If the site does not have the neuron.
    ArgumentError
        If `k` is not a positive integer, or `before` or `after` is negative; or if not all rows
        are stored, and the index holds fewer than `k` or does not cover all segments.
    """
    info = store.site(site)
    neuron, k = _checked(store, info, neuron, k)
    space = info.site.space
    found = _best_in_index(store, info, neuron, k, largest)
    if info.keep != ALL:
        _check_answered(store, info, neuron, k, largest, found is not None)
    if found is None:
        ids, values, n_values = _scan(store, info, neuron, k, largest, store.committed)
        rows = sum(store.committed_rows(space).values())
        reached = f"column scan: {_count(len(store.committed), 'segment')}, {_count(rows, 'row')}"
        if n_values < k:
            reached += f"; k = {k:,}, and there are {n_values:,} content rows with a value"
    else:
        ids, values, covers = found
        missing = sorted(set(store.committed) - set(covers))
        reached = "index"
        if missing:
            more_ids, more_values, _ = _scan(store, info, neuron, k, largest, missing)
            ids, values = _best(
                np.concatenate([ids, more_ids]), np.concatenate([values, more_values]), k, largest
            )
            reached += f" + {_count(len(missing), 'segment')} scanned"
        if len(ids) < k:  # the list is all there is
            reached += f"; k = {k:,}, and there are {len(ids):,} content rows with a value"
    around = snippets(store, ids, before, after, space)
    table = pa.table(
        {
            "rank": pa.array(range(1, len(ids) + 1), pa.int32()),
            "row_id": pa.array(ids, pa.int64()),
            "value": pa.array(values, pa.float32()),
            "document": pa.array([s.document for s in around], pa.int64()),
            "position": pa.array([s.position for s in around], pa.int32()),
            "token": pa.array([s.token for s in around], pa.string()),
            "before": pa.array([s.before for s in around], pa.string()),
            "after": pa.array([s.after for s in around], pa.string()),
            "source": pa.array([s.source for s in around], pa.string()),
        }
    )
    return Top(table, reached)


def _checked(store: CoreStore, info: SiteInfo, neuron: int, k: int) -> tuple[int, int]:
    try:
        neuron, k = as_integer(neuron), as_integer(k)
    except TypeError:
        raise ArgumentError(f"neuron = {neuron!r}, k = {k!r}; expected integers.") from None
    if not 0 <= neuron < info.width:
        raise NeuronNotFound(
            f"neuron = {neuron} is not at {info.site} of {store.path}; it has neurons "
            f"0 … {info.width - 1}."
        )
    if k < 1:
        raise ArgumentError(f"k = {k}; expected the number of rows to return, at least 1.")
    return neuron, k


def _best_in_index(
    store: CoreStore, info: SiteInfo, neuron: int, k: int, largest: bool
) -> tuple[Ids, Values, tuple[int, ...]] | None:
    """Return the best k rows of the covered segments, or None if the index does not hold so many.

    A list shorter than k may be all there is, or as long as the index makes them; a scan can tell,
    and where not all rows are stored, the number of values that the neuron had.
    """
    generation = store.index()
    if generation is None:
        return None
    table = _list(store, generation, info, neuron, k, largest)
    if table is None:
        return None
    if len(table) < k and (
        info.keep == ALL or len(table) < _n_values(store, generation, info, neuron)
    ):
        return None
    ids, values = table["row_id"].to_numpy(), table["value"].to_numpy()
    return *_best(ids, values, k, largest), generation.covers


def _list(
    store: CoreStore, generation: Generation, info: SiteInfo, neuron: int, k: int, largest: bool
) -> pa.Table | None:
    """Return the first k places of a neuron's list: row_id and value; None if there is no list."""
    name = _exemplar_file(generation, info)
    if name is None:
        return None
    store.verifier.check({name: generation.files[name]})
    side = "top" if largest else "bottom"
    return pq.read_table(
        store.path / name,
        columns=["row_id", "value"],
        filters=[("neuron", "=", neuron), ("side", "=", side), ("rank", "<=", k)],
    )


def _n_values(store: CoreStore, generation: Generation, info: SiteInfo, neuron: int) -> int:
    """Return how many content rows of the covered segments have a value of a neuron."""
    name = f"{generation.folder}/neurons.parquet"
    store.verifier.check({name: generation.files[name]})
    table = pq.read_table(
        store.path / name,
        columns=["n"],
        filters=[("site", "=", str(info.site)), ("neuron", "=", neuron)],
    )
    return int(table["n"][0].as_py())


def _check_answered(
    store: CoreStore, info: SiteInfo, neuron: int, k: int, largest: bool, found: bool
) -> None:
    """Raise `ArgumentError` unless the index answers alone: a scan would miss rows."""
    generation = store.index()
    why = (
        f"not every row of {info.site} is stored in {store.path} (keep = {keep_text(info.keep)!r})"
    )
    covers = generation.covers if generation else ()
    if missing := len(set(store.committed) - set(covers)):
        raise ArgumentError(
            f"the index does not cover {_count(missing, 'segment')} yet, and they cannot be "
            f"scanned: {why}. Run `actstore finish {store.path}`, or store.finish(), first."
        )
    if generation and not found:
        table = _list(store, generation, info, neuron, k, largest)
        raise ArgumentError(
            f"k = {k:,} is more than the index holds, and the column cannot be scanned: {why}. "
            f"Ask for k <= {0 if table is None else len(table)}, or capture into a new store with "
            "keep='all' (--keep all)."
        )


def _exemplar_file(generation: Generation, info: SiteInfo) -> str | None:
    site = info.site
    space = f"space={site.space}/" if site.space else ""
    folder = f"exemplars/{space}hook={site.hook}/layer={site.layer}/"
    return next(iter(generation.named(folder)), None)


def _scan(
    store: CoreStore,
    info: SiteInfo,
    neuron: int,
    k: int,
    largest: bool,
    segments: Iterable[int],
) -> tuple[Ids, Values, int]:
    """Return the best k content rows of segments, from the column, and how many have a value."""
    ids, values = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
    n_values = 0
    for segment in segments:
        column = store.read_column(info, segment, neuron).astype(np.float32)
        column += 0.0  # -0.0 becomes 0.0, as in the index
        flags = store.tokens(segment, info.site.space).column("flags").to_numpy()
        usable = ((flags & (SPECIAL | FIRST)) == 0) & ~np.isnan(column)
        n_values += int(np.count_nonzero(usable))
        if len(values) == k:  # equal values come after those of earlier rows, so they are out
            usable &= column > values[-1] if largest else column < values[-1]
        offsets = np.flatnonzero(usable)
        ids, values = _best(
            np.concatenate([ids, offsets + segment * store.meta.segment_rows]),
            np.concatenate([values, column[offsets]]),
            k,
            largest,
        )
    return ids, values, n_values


def _best(ids: Ids, values: Values, k: int, largest: bool) -> tuple[Ids, Values]:
    """Return the best k rows: by value, then by row."""
    keys = -values if largest else values
    if len(keys) > k:
        near = np.flatnonzero(keys <= np.partition(keys, k - 1)[k - 1])
        ids, values, keys = ids[near], values[near], keys[near]
    order = np.lexsort((ids, keys))[:k]
    return ids[order], values[order]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"
