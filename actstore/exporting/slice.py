"""Rows of a store as one file: Parquet, to query and join, or safetensors, to load as tensors.

Rows come in the order of row_id, a block at a time, and the file takes its name when it is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from actstore import arrow
from actstore.errors import ArgumentError, BudgetExceeded, NotEnoughDisk
from actstore.exporting.files import new_file, written_aside
from actstore.shard import DTYPES, RowStack
from actstore.site import Site, summarize
from actstore.store import CoreStore, Rows, SiteInfo
from actstore.store.budget import Progress, parse_budget

Ids = npt.NDArray[np.int64]

_COPIES = 6  # of a block: as read, as Arrow, as pages, and the chunk being verified
_BLOCK_ROWS = (64, 1 << 16)  # least and most
_TOKEN_BYTES = 100
_SAFETENSORS = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True)
class _Block:
    row_ids: Ids
    first: int
    """How many rows came before."""
    values: dict[str, npt.NDArray[Any]]
    """Of each site, ``(rows, width)`` in the stored dtype."""


def export_slice(
    store: CoreStore,
    sites: str | Site | Iterable[str | Site] | None,
    rows: Rows,
    to: str | Path,
    *,
    budget: int | str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write rows of some sites as one Parquet or safetensors file.

    Cost: the rows are read once and written once.

    Parameters
    ----------
    store : CoreStore
        The store.
    sites : str, Site, iterable of these, or None
        Sites of one space, as names or patterns; None means all.
    rows : Rows
        The rows, all stored at all of the sites.
    to : str or Path
        A new file.  ``.parquet``: columns row_id, document, position, token (the text of its type
        in the vocabulary), and for each site one of fixed-size lists, bfloat16 as float32, since
        Parquet does not have it.  ``.safetensors``: a tensor ``(rows, width)`` for each site in its
        stored dtype, bit for bit, and the tensor ``row_ids``.
    budget : int or str, optional
        Memory it may take; by default the smaller of 4 GiB and half of what is free.
    progress : callable, optional
        Called with (stage, rows done, rows in all).

    Raises
    ------
    ResultExists
        If there is something at `to`.
    ArgumentError
        If `to` has another suffix or its folder does not exist, the sites are of two spaces, or
        there are no rows.
    SiteNotFound, RowNotFound
        If the store does not have a site, or a row is a hole or is not stored.
    BudgetExceeded, NotEnoughDisk
        If memory or disk do not suffice; nothing is written then.
    """
    path = new_file(to, (".parquet", ".safetensors"))
    infos = store.select(sites)
    if len({info.site.space for info in infos}) != 1:
        raise ArgumentError(
            f"sites = {summarize(info.site for info in infos) or 'none'} do not share rows; "
            f"expected sites of one space of {store.path}. Name them as "
            "'encoder.mlp_post' or 'decoder.mlp_post'."
        )
    if not rows.n_rows:
        raise ArgumentError(f"rows = {rows.rule!r} chooses no stored row of {store.path}.")
    _check_stored(store, infos, rows)
    row_bytes = sum(info.row_bytes for info in infos) + _TOKEN_BYTES
    block_rows = parse_budget(budget) // (_COPIES * row_bytes)
    if block_rows < _BLOCK_ROWS[0]:
        needed = _BLOCK_ROWS[0] * _COPIES * row_bytes
        raise BudgetExceeded(
            f"{summarize(info.site for info in infos)} ({row_bytes:,} bytes a row) needs at least "
            f"{needed:,} bytes to export. Pass budget={needed} or more, or fewer sites."
        )
    free = shutil.disk_usage(path.parent).free
    if rows.n_rows * row_bytes > free:
        raise NotEnoughDisk(
            f"{rows.n_rows:,} rows into {path} take up to {rows.n_rows * row_bytes:,} bytes, and "
            f"{free:,} are free there. Free some, or give fewer sites or rows=..."
        )
    facts = {
        "store_id": store.meta.store_id,
        "model": str(store.meta.model["name"]),
        "rows": rows.rule,
        "dtypes": json.dumps({str(info.site): info.dtype for info in infos}),
    }
    kind: type[_Writer] = _Parquet if path.suffix == ".parquet" else _Safetensors
    with written_aside(path) as partial:
        writer = kind(store, infos, rows.n_rows, partial, facts)
        try:
            for block in _blocks(store, infos, rows, min(block_rows, _BLOCK_ROWS[1])):
                writer.write(block)
                if progress:
                    progress("rows", block.first + len(block.row_ids), rows.n_rows)
        finally:
            writer.close()
    return path


def _check_stored(store: CoreStore, infos: Sequence[SiteInfo], rows: Rows) -> None:
    """Raise `RowNotFound` unless all rows are committed, and stored at all sites."""
    size = store.meta.segment_rows
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        # The highest id of a segment is a hole if any of its ids is.
        store.check_row(segment * size + int(offsets[-1]), infos[0].site.space)
        for info in {info.keep: info for info in infos}.values():
            store.positions(info, segment, offsets)


def _blocks(
    store: CoreStore, infos: Sequence[SiteInfo], rows: Rows, block_rows: int
) -> Iterator[_Block]:
    """Yield the rows in order; the memory of their values is used again for the next block."""
    memory = {info: np.empty((block_rows, info.width), DTYPES[info.dtype]) for info in infos}
    first = 0
    for segment in rows.segments:
        offsets = rows.offsets(segment)
        for start in range(0, len(offsets), block_rows):
            some = offsets[start : start + block_rows]
            places = np.arange(len(some))
            for info, values in memory.items():
                positions = store.positions(info, segment, some)
                store.scatter(info, segment, positions, RowStack([values]), places)
            found = {str(info.site): values[: len(some)] for info, values in memory.items()}
            yield _Block(some + segment * store.meta.segment_rows, first, found)
            first += len(some)


class _Writer(Protocol):
    """Writes a file block by block."""

    def __init__(
        self,
        store: CoreStore,
        infos: Sequence[SiteInfo],
        n_rows: int,
        path: Path,
        facts: dict[str, str],
    ) -> None: ...

    def write(self, block: _Block) -> None:
        """Append rows."""

    def close(self) -> None:
        """Write the end of the file."""


class _Parquet:
    """A row group a block."""

    def __init__(
        self,
        store: CoreStore,
        infos: Sequence[SiteInfo],
        n_rows: int,
        path: Path,
        facts: dict[str, str],
    ) -> None:
        self._store, self._space = store, infos[0].site.space
        types = {"float16": pa.float16(), "bfloat16": pa.float32(), "float32": pa.float32()}
        keys = ("row_id", "document", "position", "token")
        schema = pa.schema(
            [
                ("row_id", pa.int64()),
                ("document", pa.int64()),
                ("position", pa.int32()),
                ("token", pa.string()),
                *((str(i.site), pa.list_(types[i.dtype], i.width)) for i in infos),
            ],
            metadata={f"actstore.{key}": value for key, value in facts.items()},
        )
        self._writer = pq.ParquetWriter(
            path,
            schema,
            # Activations are as good as random: encoders take time and save nothing.
            compression={f.name: "zstd" if f.name in keys else "none" for f in schema},
            use_dictionary=["token"],
            write_statistics=list(keys),
            write_page_checksum=True,
        )

    def write(self, block: _Block) -> None:
        tokens = self._store.tokens_of(block.row_ids, self._space)
        columns = [
            pa.array(block.row_ids),
            tokens.column("document"),
            tokens.column("position"),
            self._store.texts_of(arrow.numbers(tokens.column("token_id"))),
        ]
        for values in block.values.values():
            if values.dtype == DTYPES["bfloat16"]:
                values = values.astype(np.float32)
            columns.append(
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
            )
        table = pa.Table.from_arrays(columns, schema=self._writer.schema)
        self._writer.write_table(table, row_group_size=len(table))

    def close(self) -> None:
        self._writer.close()


class _Safetensors:
    """Tensors one behind the other, each filled from its start.

    References
    ----------
    https://huggingface.co/docs/safetensors, "Format": eight bytes that tell the length of a JSON
    header, the header, then the data without holes.
    """

    def __init__(
        self,
        store: CoreStore,
        infos: Sequence[SiteInfo],
        n_rows: int,
        path: Path,
        facts: dict[str, str],
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **facts}}
        self._ends: dict[str, tuple[int, int]] = {}
        end = 0
        tensors = [("row_ids", "I64", [n_rows], 8)]
        tensors += [
            (str(i.site), _SAFETENSORS[i.dtype], [n_rows, i.width], i.row_bytes) for i in infos
        ]
        # Four-byte values before two-byte ones: each tensor begins at a multiple of its items.
        for name, dtype, shape, row_bytes in sorted(tensors, key=lambda t: -_item_bytes(t[1])):
            stop = end + n_rows * row_bytes
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, stop]}
            self._ends[name] = (end, row_bytes)
            end = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._data = self._file.tell()

    def write(self, block: _Block) -> None:
        for name, values in {"row_ids": block.row_ids, **block.values}.items():
            start, row_bytes = self._ends[name]
            self._file.seek(self._data + start + block.first * row_bytes)
            self._file.write(values.view(np.uint8).data)

    def close(self) -> None:
        self._file.close()


def _item_bytes(dtype: str) -> int:
    return int(dtype.removeprefix("B")[1:]) // 8
