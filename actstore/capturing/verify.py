"""Verify: whether a store holds what its model computes from its text.

Checksums find bytes that changed; they cannot find values that were wrong when they were written.
Verify takes random windows and goes the whole way again, by another road than capture's:

1. *tokens*: the stored text is tokenised anew and cut anew; ids, positions, spans and flags of the
   windows must be those of the token table.
2. *values*: the windows are run in other batches than capture's, and each stored value must be what
   comes out, within the tolerance below.
3. *index*: exemplars at these rows must have the values that came out, and no value that came out
   may be missing from a list it belongs on.  Of a few random neurons whose rows are all stored,
   lists and statistics must be those of the whole column.

**Tolerance.**  Another batch is another order of sums.  What that does to a value depends on the
type the model computes in: of 16-bit models, roundings of all layers add up.  A value may differ by
one unit in the last place of its stored type, by a part of itself, and by a part of the size (root
of the mean square) of its row.  The parts stand in `TOLERANCE`; they are about three times the
largest that any value of MiniLM and SmolLM2 needed over thousands of rows.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from actstore import arrow
from actstore.capturing.lists import TOPK
from actstore.capturing.plan import cut_windows
from actstore.capturing.replay import Values, Window, run_windows, windows_of
from actstore.counted import counted
from actstore.errors import ArgumentError
from actstore.folds import FOLDS
from actstore.models import Encoded, LanguageModel
from actstore.site import Site, summarize
from actstore.store import FIRST, SPECIAL, CoreStore, Generation, SiteInfo
from actstore.store.budget import Progress
from actstore.store.generations import site_file
from actstore.store.stored_rows import ALL, is_sample

TOLERANCE = {
    "float64": (2.0**-14, 2.0**-13),
    "float32": (2.0**-14, 2.0**-13),
    "float16": (2.0**-6, 2.0**-3),
    "bfloat16": (2.0**-3, 1.0),
}
"""By the dtype that a model computes in: parts of a value, and of the size of its row, that the
value may differ by."""

# The unit in the last place of 1, and the smallest number that has all its digits.
_UNITS = {
    "float16": (2.0**-10, 2.0**-14),
    "bfloat16": (2.0**-7, 2.0**-126),
    "float32": (2.0**-23, 2.0**-126),
}
# Mismatches shown, and of each kind and site.
_SHOWN, _SHOWN_ALIKE = 12, 3
_COLUMNS = 4
_EXEMPLARS = ("exemplars", "exemplars.parquet")
_EXEMPLAR_TOKENS = ["document", "position", "token_id"]
# Parts of a statistic, and of the deviation, that it may differ by: counts and extremes are exact.
_STATISTICS = {
    "n": (0.0, 0.0),
    "min": (0.0, 0.0),
    "max": (0.0, 0.0),
    "share_positive": (1e-12, 0.0),
    "mean": (1e-12, 1e-6),
    "std": (1e-6, 0.0),
}

Ids = npt.NDArray[np.int64]
Parts = tuple[float, float]


@dataclass(frozen=True)
class Mismatch:
    """A place where a store does not hold what its model computes."""

    what: str
    """``"value"``, ``"exemplar"``, a statistic of the index, or a column of the token table."""
    site: str | None
    """The site, if it is about one."""
    row_id: int | None
    """The row, if it is about one."""
    neuron: int | None
    """The neuron, if it is about one."""
    stored: Any
    """What the store holds; None if it holds nothing."""
    computed: Any
    """What came out; None if nothing belongs there."""

    def __str__(self) -> str:
        places = (("row_id", self.row_id), ("neuron", self.neuron))
        words = [self.what, *([self.site] if self.site else [])]
        words += [f"{name} = {place}" for name, place in places if place is not None]
        stored, computed = _as_text(self.stored), _as_text(self.computed)
        return f"{', '.join(words)}: stored {stored}, computed {computed}"


@dataclass(frozen=True)
class Verification:
    """What was checked of a store, and what was found."""

    path: str
    """Folder of the store."""
    n_windows: int
    """Windows tokenised and run again."""
    n_documents: int
    """Documents they are from."""
    n_rows: int
    """Rows of the windows."""
    sites: str
    """Sites compared."""
    n_values: int
    """Stored values compared."""
    n_exemplars: int
    """Exemplars at these rows compared."""
    n_columns: int
    """Neurons whose lists and statistics were compared with their whole column."""
    largest: float
    """Largest difference of a value, in units of its tolerance."""
    n_mismatches: int
    """How many mismatches there are."""
    mismatches: tuple[Mismatch, ...]
    """The first of them, some of each kind."""

    @property
    def ok(self) -> bool:
        """Whether there was no mismatch."""
        return self.n_mismatches == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            ("store", self.path),
            (
                "windows",
                f"{self.n_windows:,} of {counted(self.n_documents, 'document')}, "
                f"{counted(self.n_rows, 'row')}: text tokenised again",
            ),
            ("sites", self.sites),
            (
                "values",
                f"{self.n_values:,} computed again; the largest difference is {self.largest:.2g} "
                "of the tolerance",
            ),
            (
                "index",
                f"{counted(self.n_exemplars, 'exemplar')} at these rows; lists and statistics of "
                f"{counted(self.n_columns, 'whole column')}",
            ),
            ("mismatches", f"{self.n_mismatches:,}" if self.n_mismatches else "none"),
        ]
        lines += [("", str(mismatch)) for mismatch in self.mismatches]
        left = self.n_mismatches - len(self.mismatches)
        if left:
            lines.append(("", f"and {left:,} more"))
        return "\n".join(f"{label:<11} {text}" for label, text in lines)

    __repr__ = __str__


@dataclass
class _Findings:
    """What was compared, and the first mismatches."""

    n_values: int = 0
    n_exemplars: int = 0
    n_columns: int = 0
    largest: float = 0.0
    n_mismatches: int = 0
    shown: list[Mismatch] = field(default_factory=list)
    _alike: Counter[tuple[str, Site | None]] = field(default_factory=Counter)

    def note(
        self,
        what: str,
        site: Site | None,
        row_id: int | None,
        neuron: int | None,
        stored: Any,
        computed: Any,
        n: int = 1,
    ) -> None:
        """Count mismatches and show the first, if few of its kind are shown yet."""
        self.n_mismatches += n
        if self._alike[what, site] < _SHOWN_ALIKE and len(self.shown) < _SHOWN:
            self._alike[what, site] += 1
            name = None if site is None else str(site)
            self.shown.append(Mismatch(what, name, row_id, neuron, stored, computed))

    def note_where(
        self,
        wrong: npt.NDArray[np.bool_],
        what: str,
        site: Site | None,
        row_ids: npt.NDArray[np.int64],
        neurons: npt.NDArray[np.integer[Any]] | None,
        stored: npt.NDArray[Any] | None,
        computed: npt.NDArray[Any] | None,
    ) -> None:
        """Note the places of an array that are wrong; the others are broadcast to its shape."""
        places = np.argwhere(wrong)
        for i, place in enumerate(map(tuple, places[:_SHOWN_ALIKE])):
            row_id, neuron, old, new = (
                None if array is None else np.broadcast_to(array, wrong.shape)[place].item()
                for array in (row_ids, neurons, stored, computed)
            )
            last = i + 1 == min(len(places), _SHOWN_ALIKE)
            self.note(what, site, row_id, neuron, old, new, len(places) - i if last else 1)


class _Block:
    """What came out of the model at one site and window, and how far it may be off."""

    def __init__(self, site: Site, dtype: str, row_ids: Ids, values: Values, within: Parts) -> None:
        self.site = site
        self.row_ids = row_ids
        self.values = values.astype(np.float64)
        known = np.nan_to_num(np.abs(self.values))
        size = np.sqrt(np.mean(known**2, axis=1, keepdims=True))
        unit, least = _UNITS[dtype]
        of_value, of_row = within
        self.within = (
            np.ldexp(unit / 2, np.frexp(np.maximum(known, least))[1])
            + of_value * known
            + of_row * size
        )

    def off(self, stored: npt.NDArray[Any], where: Any = slice(None)) -> npt.NDArray[np.float64]:
        """Return how far stored values are off, in units of the tolerance; NaN is NaN alone."""
        computed, stored = self.values[where], stored.astype(np.float64)
        share = np.abs(stored - computed) / self.within[where]
        nans = np.isnan(stored), np.isnan(computed)
        unlike = np.where(nans[0] == nans[1], 0.0, np.inf)
        return np.where(nans[0] | nans[1], unlike, share)


class _Lists:
    """What the index says of one site and of some rows."""

    def __init__(
        self, store: CoreStore, generation: Generation, info: SiteInfo, row_ids: Ids
    ) -> None:
        table = _read(store, generation, site_file(info.site, *_EXEMPLARS))
        sides = table.column("side").to_numpy(zero_copy_only=False)
        ranks, neurons, values, ids = (
            arrow.numbers(table.column(column)) for column in ("rank", "neuron", "value", "row_id")
        )
        self.last = {}
        for side, open_end in (("top", -np.inf), ("window", -np.inf), ("bottom", np.inf)):
            # Only a full list keeps anything out.
            self.last[side] = np.full(info.width, open_end)
            full = (sides == side) & (ranks == TOPK.k)
            self.last[side][neurons[full]] = values[full]
        mine = np.flatnonzero(np.isin(ids, row_ids))
        order = mine[np.argsort(ids[mine], kind="stable")]
        self.row_ids, self.neurons = ids[order], neurons[order]
        self.values, self.sides = values[order], sides[order]
        self.tokens = arrow.take(table.select(_EXEMPLAR_TOKENS), order)

    def of(self, row_ids: Ids) -> slice:
        """Return where the exemplars of consecutive rows are."""
        first, last = int(row_ids[0]), int(row_ids[-1])
        return slice(*np.searchsorted(self.row_ids, [first, last + 1]).tolist())


def run_verify(
    store: CoreStore,
    model: LanguageModel,
    n_rows: int,
    seed: int,
    budget: int,
    progress: Progress | None = None,
) -> Verification:
    """Check random windows of a store against its model; see `actstore.Store.verify`."""
    rng = np.random.default_rng(seed)
    windows = _choose(store, n_rows, rng)
    found = _Findings()
    tokens = _check_tokens(store, model, windows, found)
    row_ids = arrow.numbers(tokens.column("row_id"))
    generation = store.index()
    infos = store.meta.sites
    lists = {}
    if generation is not None:
        for info in infos:
            lists[info.site] = _Lists(store, generation, info, row_ids)
            _check_exemplar_tokens(store, info.site, lists[info.site], found)
    flags = arrow.numbers(tokens.column("flags"))
    covered = np.isin(row_ids // store.meta.segment_rows, generation.covers if generation else ())
    listed = covered & ((flags & (SPECIAL | FIRST)) == 0)
    within = TOLERANCE[str(store.meta.model["dtype"])]
    done = 0
    for window, values in run_windows(store, model, windows, infos, budget // 4):
        ids = np.arange(window["first_row"], window["first_row"] + window["rows"])
        content = listed[np.searchsorted(row_ids, ids)]
        for info in infos:
            block = _Block(info.site, info.dtype, ids, values[info.site], within)
            _check_values(store, block, found)
            if info.site in lists:
                _check_lists(lists[info.site], block, content, found)
        done += len(ids)
        if progress:
            progress("verify", done, len(row_ids))
    if generation is not None:
        _check_columns(store, generation, rng, found)
    return Verification(
        str(store.path),
        len(windows),
        len({window["document"] for window in windows}),
        len(row_ids),
        summarize(info.site for info in infos),
        found.n_values,
        found.n_exemplars,
        found.n_columns,
        found.largest,
        found.n_mismatches,
        tuple(found.shown),
    )


def _choose(store: CoreStore, n_rows: int, rng: np.random.Generator) -> list[Window]:
    """Return random committed windows, in random order, that have so many rows together.

    Where rows are sampled each window holds a stored row, so that there is something to compare.
    """
    counts = store.committed_rows()
    segments, sizes = np.array(list(counts), dtype=np.int64), np.array(list(counts.values()))
    if not (total := int(sizes.sum())):
        raise ArgumentError(
            f"{store.path} has no row yet, so there is nothing to verify. Run its capture first."
        )
    ends = np.cumsum(sizes)
    sampled = [info for info in store.meta.sites if is_sample(info.keep)]
    n_draws = 2 * -(-n_rows // store.meta.context)
    while True:
        places = rng.choice(total, min(n_draws, total), replace=False)
        which = np.searchsorted(ends, places, side="right")
        row_ids = segments[which] * store.meta.segment_rows + places - (ends - sizes)[which]
        if sampled and n_draws < total:
            row_ids = _stored_instead(store, min(sampled, key=lambda i: i.keep), row_ids, rng)
        windows = windows_of(store, row_ids)
        if n_draws >= total or sum(window["rows"] for window in windows) >= n_rows:
            break
        n_draws *= 4
    drawn = [windows[i] for i in rng.permutation(len(windows))]
    n_before = np.cumsum([0, *(window["rows"] for window in drawn)])
    return drawn[: int(np.searchsorted(n_before, n_rows))]


def _stored_instead(
    store: CoreStore, info: SiteInfo, row_ids: Ids, rng: np.random.Generator
) -> Ids:
    """Return for each row a random one of its segment that is stored, if any is."""
    size = store.meta.segment_rows
    found = row_ids.copy()
    for segment in np.unique(row_ids // size):
        mine = row_ids // size == segment
        stored = store[info.site].row_ids(slice(segment * size, (segment + 1) * size))
        if len(stored):
            found[mine] = rng.choice(stored, int(mine.sum()))
    return found


def _check_tokens(
    store: CoreStore, model: LanguageModel, windows: list[Window], found: _Findings
) -> pa.Table:
    """Tokenise the documents of some windows anew; return what is stored, in row order."""
    tables = []
    for number, group in itertools.groupby(sorted(windows, key=_place), lambda w: w["document"]):
        wanted = {window["first_token"]: window for window in group}
        document = store.document(number)
        encoded = model.encode(document["text"])
        # A limit may have cut the document; its text then ends with its last token.
        kept = slice(document["n_tokens"])
        own = Encoded(encoded.ids[kept], encoded.starts[kept], encoded.ends[kept])
        cut = cut_windows(number, own, model, store.meta.context, store.meta.overlap, None)
        anew = {new.first_token: new for new in cut if new.first_token in wanted}
        for first_token, window in wanted.items():
            row_ids = np.arange(window["first_row"], window["first_row"] + window["rows"])
            table = store.tokens_of(row_ids)
            tables.append(table)
            new = anew.get(first_token)
            computed_rows = 0 if new is None else new.rows
            if new is None or new.rows != window["rows"]:
                found.note(
                    "rows of a window", None, row_ids[0].item(), None, window["rows"], computed_rows
                )
                continue
            computed = {
                **new.columns,
                "token_id": new.token_ids,
                "document": number,
                "window_id": window["window_id"],
            }
            for name in table.column_names:
                if name in computed:
                    stored = arrow.numbers(table.column(name))
                    wrong = stored != computed[name]
                    found.note_where(wrong, name, None, row_ids, None, stored, computed[name])
            if not np.array_equal(window["context_ids"], new.context_ids):
                found.note(
                    "context_ids of a window",
                    None,
                    row_ids[0].item(),
                    None,
                    list(window["context_ids"]),
                    new.context_ids.tolist(),
                )
    return pa.concat_tables(tables).sort_by("row_id")


def _place(window: Window) -> tuple[int, int]:
    return window["document"], window["first_token"]


def _check_values(store: CoreStore, block: _Block, found: _Findings) -> None:
    """Compare the stored rows of a window with what came out."""
    first, last = int(block.row_ids[0]), int(block.row_ids[-1])
    row_ids = store[block.site].row_ids(slice(first, last + 1))
    if not len(row_ids):
        return
    stored = store[block.site][row_ids]
    where = row_ids - first
    off = block.off(stored, where)
    found.n_values += stored.size
    found.largest = max(found.largest, float(off.max()))
    neurons = np.arange(stored.shape[1])
    found.note_where(
        off > 1, "value", block.site, row_ids[:, None], neurons, stored, block.values[where]
    )


def _check_lists(
    lists: _Lists, block: _Block, content: npt.NDArray[np.bool_], found: _Findings
) -> None:
    """Compare the exemplars at the rows of a window with what came out, and look for missing."""
    mine = lists.of(block.row_ids)
    rows, neurons = lists.row_ids[mine] - block.row_ids[0], lists.neurons[mine]
    sides, values = lists.sides[mine], lists.values[mine]
    off = block.off(values, (rows, neurons))
    computed = block.values[rows, neurons]
    found.n_exemplars += len(rows)
    found.largest = max(found.largest, float(off.max(initial=0.0)))
    found.note_where(
        off > 1, "exemplar", block.site, block.row_ids[rows], neurons, values, computed
    )
    misplaced = ~content[rows]
    found.note_where(misplaced, "exemplar", block.site, block.row_ids[rows], neurons, values, None)
    for side in lists.last:
        sign = -1 if side == "bottom" else 1
        beyond = sign * (block.values - lists.last[side]) > block.within
        beyond &= content[:, None]
        if side == "window":
            # A window stands for its highest row; rounding may have made it another.
            beyond[:, neurons[sides == side]] = False
            highest = np.where(content[:, None], np.nan_to_num(block.values, nan=-np.inf), -np.inf)
            beyond &= np.arange(len(beyond))[:, None] == highest.argmax(axis=0)
        else:
            beyond[rows[sides == side], neurons[sides == side]] = False
        found.note_where(
            beyond,
            f"exemplar, {side}",
            block.site,
            block.row_ids[:, None],
            np.arange(beyond.shape[1]),
            None,
            block.values,
        )


def _check_exemplar_tokens(store: CoreStore, site: Site, lists: _Lists, found: _Findings) -> None:
    """Compare what the index says of the tokens of exemplars with the token table."""
    tokens = store.tokens_of(lists.row_ids)
    for name in _EXEMPLAR_TOKENS:
        stored, actual = (arrow.numbers(t.column(name)) for t in (lists.tokens, tokens))
        found.note_where(
            stored != actual,
            f"{name} of an exemplar",
            site,
            lists.row_ids,
            lists.neurons,
            stored,
            actual,
        )


def _check_columns(
    store: CoreStore, generation: Generation, rng: np.random.Generator, found: _Findings
) -> None:
    """Compare lists and statistics of a few neurons with their whole stored columns.

    One read of the token table, and of these columns.
    """
    infos = [info for info in store.meta.sites if info.keep == ALL]
    chosen = rng.permutation(len(infos))[:_COLUMNS]
    columns = [(infos[i], int(rng.integers(infos[i].width))) for i in chosen]
    moments = FOLDS["moments"]
    states = [(moments.start(1), TOPK.start(1), TOPK.start(1)) for _ in columns]
    for segment in generation.covers if columns else ():
        tokens = store.tokens(segment)
        content = (arrow.numbers(tokens.column("flags")) & (SPECIAL | FIRST)) == 0
        row_ids, windows = (
            arrow.numbers(tokens.column(name))[content] for name in ("row_id", "window_id")
        )
        for i, (info, neuron) in enumerate(columns):
            values = store.read_column(info, segment, neuron)[content]
            heads = _highest_of(windows, values)
            states[i] = (
                moments.update(states[i][0], values[:, None], row_ids),
                TOPK.update(states[i][1], values[:, None], row_ids),
                TOPK.update(states[i][2], values[heads, None], row_ids[heads]),
            )
    for (info, neuron), (of_rows, lists, of_windows) in zip(columns, states, strict=True):
        found.n_columns += 1
        statistics = {name: float(v[0]) for name, v in moments.finish(of_rows).items()}
        _check_statistics(store, generation, info.site, neuron, statistics, found)
        wanted = [("neuron", "=", neuron)]
        table = _read(store, generation, site_file(info.site, *_EXEMPLARS), filters=wanted)
        ranked = {"top": lists.top, "bottom": lists.bottom, "window": of_windows.top}
        for side, computed in ranked.items():
            mine = table.filter(pc.equal(table.column("side"), side)).to_pylist()
            old = [(place["row_id"], place["value"]) for place in mine]
            n = int(computed.counts[0])
            row_ids, values = computed.row_ids[0, :n].tolist(), computed.values[0, :n].tolist()
            new = list(zip(row_ids, values, strict=True))
            for rank, (a, b) in enumerate(itertools.zip_longest(old, new), start=1):
                if a != b:
                    found.note(f"{side} list, rank {rank}", info.site, None, neuron, a, b)
                    break


def _highest_of(windows: Ids, values: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return the place of each window's highest value, the first of those that are equal."""
    keys = values.astype(np.float32)
    order = np.lexsort((-keys, windows))  # stable, and NaN last
    return order[np.flatnonzero(np.diff(windows[order], prepend=-1))]


def _check_statistics(
    store: CoreStore,
    generation: Generation,
    site: Site,
    neuron: int,
    statistics: Mapping[str, float],
    found: _Findings,
) -> None:
    """Compare a neuron's statistics in the index with those of its column."""
    wanted = [("site", "=", str(site)), ("neuron", "=", neuron)]
    (entry,) = _read(store, generation, "neurons.parquet", filters=wanted).to_pylist()
    for statistic, (relative, of_std) in _STATISTICS.items():
        computed = statistics[statistic]
        stored = math.nan if entry[statistic] is None else float(entry[statistic])
        within = relative * abs(computed) + of_std * np.nan_to_num(statistics["std"])
        equal = abs(stored - computed) <= within or (math.isnan(stored) and math.isnan(computed))
        if not equal:
            found.note(f"{statistic} of a neuron", site, None, neuron, stored, computed)


def _read(store: CoreStore, generation: Generation, name: str, **options: Any) -> pa.Table:
    """Return a table of the index, checked before its first use."""
    name = f"{generation.folder}/{name}"
    store.verifier.check({name: generation.files[name]})
    return pq.read_table(store.path / name, **options)


def _as_text(value: Any) -> str:
    if value is None:
        return "nothing"
    return f"{value:.7g}" if isinstance(value, float) else str(value)
