"""One shard: the file that holds the activations of one site in one segment.

A shard is one chunk of a Zarr v3 array under the ``sharding_indexed`` codec: inner chunks, then an
index of where each lies.  Without a compressor every inner chunk has the same size, so this module
writes them in one fixed order, and *where a value lies is arithmetic*: chunk ``(r, c)`` starts at
``(r * n_column_chunks + c) * (chunk_bytes + 4)``, in row-major order inside, followed by its
crc32c.  Any Zarr reader finds the chunks through the index; `ShardReader` computes them, reads
some rows or one column at any place, and demands that the index says the same.  Rows that are dealt
go from the file straight to where they belong: a `RowStack` is where, `ShardReader.scatter` how.

A *band* is ``chunk_rows`` rows of all columns in chunk order, an array ``(n_column_chunks,
chunk_rows, chunk_columns)``: what is written at once.  Bands are written from the top; those that
were not are missing in the index, so every reader sees the fill value NaN there, and this one
raises.

What the checksums say.  Each chunk carries its crc32c, and the index carries its own.  The crc32c
of bytes followed by their own crc32c does not depend on the bytes, hence *all undamaged shards of
one layout and number of bands have the same crc32c as files*: it finds damage, but it does not tell
one shard from another.  The crc32c of the chunks' checksums in file order does
(`ShardFacts.checksums_crc32c`); whoever records it can prove that a file is the one that was
written, by reading four bytes a chunk.

Nothing here syncs, renames or knows a store; the store does.
"""

from actstore.shard.checksum import crc32c_of_file
from actstore.shard.layout import DTYPES, ShardLayout
from actstore.shard.reader import ShardReader
from actstore.shard.stack import RowStack
from actstore.shard.writer import ShardFacts, ShardWriter, to_band

__all__ = [
    "DTYPES",
    "RowStack",
    "ShardFacts",
    "ShardLayout",
    "ShardReader",
    "ShardWriter",
    "crc32c_of_file",
    "to_band",
]
