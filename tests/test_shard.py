import io
import json
import os
from dataclasses import replace

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import actstore.bfloat16  # noqa: F401  (zarr-python 3.1 loads no entry points for data types)
from actstore.errors import ArgumentError, DamagedFile, FormatError, NeuronNotFound
from actstore.shard import (
    DTYPES,
    RowStack,
    ShardFacts,
    ShardLayout,
    ShardReader,
    ShardWriter,
    crc32c_of_file,
    to_band,
)

WIDTHS = [384, 576, 1600, 3072, 37, 514]  # the last is padded to 640


def values_of(layout, n_rows, seed=7):
    """Random finite values of every magnitude, in the layout's dtype."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 2 ** (8 * layout.itemsize), (n_rows, layout.width), dtype="u4")
    values = bits.astype(f"u{layout.itemsize}").view(layout.numpy_dtype)
    with np.errstate(invalid="ignore"):  # ml_dtypes flags signalling NaNs
        return np.where(np.isfinite(values), values, layout.numpy_dtype.type(1.5))


def write(file, layout, values):
    """Write values as bands from the top and return the facts."""
    writer = ShardWriter(file, layout)
    for top in range(0, len(values), layout.chunk_rows):
        writer.write_band(to_band(values[top : top + layout.chunk_rows], layout))
    return writer.finish()


def write_array(path, layout, shards, **metadata):
    """Write a whole Zarr array, one shard for each item, and return the facts of the shards."""
    path.mkdir(exist_ok=True)
    (path / "zarr.json").write_text(
        json.dumps(layout.zarr_metadata(len(shards), {"a": 1}, **metadata))
    )
    facts = []
    for i, values in enumerate(shards):
        file = path / "c" / str(i) / "0"
        file.parent.mkdir(parents=True)
        with file.open("wb") as stream:
            facts.append(write(stream, layout, values))
    return facts


@pytest.fixture
def open_reader():
    """Open a ShardReader of some bytes."""
    opened = []

    def open_bytes(data, layout, n_bytes=None, **kwargs):
        fd = os.memfd_create("shard")
        opened.append(fd)
        os.write(fd, data)
        n_bytes = len(data) if n_bytes is None else n_bytes
        return ShardReader(fd, layout, n_bytes, "acts/c/5/0", **kwargs)

    yield open_bytes
    for fd in opened:
        os.close(fd)


def scatter(reader, rows):
    """Return some rows of `SMALL`, read into places of their own."""
    out = np.empty((len(rows), SMALL.width), SMALL.numpy_dtype)
    reader.scatter(np.array(rows), RowStack([out]), np.arange(len(rows)))
    return out


def shard_bytes(layout, values):
    """Write values to memory and return the bytes and the facts."""
    file = io.BytesIO()
    facts = write(file, layout, values)
    return file.getvalue(), facts


def assert_same_bits(actual, expected):
    """Check values by their bits, so that NaN equals itself and -0 differs from 0."""
    assert actual.dtype == expected.dtype
    bits = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(actual).view(bits), expected.view(bits))


def open_tensorstore(path):
    """Open an array with tensorstore."""
    kvstore = {"driver": "file", "path": str(path)}
    return tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()


# Layout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "chunk_columns", "padded_width"),
    [
        (384, 192, 384),
        (576, 192, 576),
        (1600, 200, 1600),
        (3072, 256, 3072),
        (37, 37, 37),
        (251, 251, 251),
        (257, 128, 384),
        (514, 128, 640),
        (64, 64, 64),
        (64 * 257, 64, 64 * 257),
        (4099, 128, 4224),
    ],
)
def test_for_width_chooses_the_largest_divisor_and_else_pads(width, chunk_columns, padded_width):
    """Chunk columns: largest divisor in 64 … 256, else a narrow width whole, else 128 padded."""
    layout = ShardLayout.for_width(width, 8192, "float16")
    assert (layout.chunk_columns, layout.padded_width) == (chunk_columns, padded_width)
    assert (layout.chunk_rows, layout.n_row_chunks) == (4096, 2)


def test_a_small_shard_is_one_chunk_high():
    """Chunk rows never exceed the rows of the shard."""
    assert ShardLayout.for_width(37, 512, "float32").chunk_rows == 512


def test_sizes_follow_from_the_layout():
    """Sizes are those of the Zarr specification, worked out by hand for distinct primes."""
    layout = ShardLayout(rows=8, width=11, dtype="float32", chunk_rows=2, chunk_columns=7)
    assert layout.n_column_chunks == 2
    assert layout.chunk_bytes == 2 * 7 * 4
    assert layout.band_bytes == 2 * (56 + 4)
    assert layout.index_bytes == 4 * 2 * 16 + 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "int8"},
            "dtype = 'int8' cannot be stored in a shard; choose one of float16, float32, bfloat16.",
        ),
        ({"rows": 12}, "rows = 12 of a shard must be a power of two."),
        ({"width": 0}, "width = 0 of a shard must be positive."),
        ({"chunk_rows": 3}, "chunk_rows = 3 must divide the rows of a shard, 8."),
    ],
)
def test_a_layout_that_cannot_be_is_refused(change, message):
    """A layout names the number it cannot use and what it may be."""
    layout = ShardLayout(rows=8, width=11, dtype="float32", chunk_rows=2, chunk_columns=7)
    with pytest.raises(ArgumentError) as error:
        replace(layout, **change)
    assert str(error.value) == message


# Metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_metadata_round_trips_through_json(width, dtype):
    """The layout read from zarr.json is the one written, whatever its attributes say."""
    layout = ShardLayout.for_width(width, 64, dtype, chunk_rows=16)
    metadata = layout.zarr_metadata(3, {"site": "mlp_post.5"}, ["row", "neuron"])
    assert ShardLayout.from_zarr_metadata(json.loads(json.dumps(metadata))) == layout


def test_metadata_that_zarr_python_rewrote_is_still_ours(tmp_path):
    """zarr-python may store the attributes anew: the layout is still found in its zarr.json."""
    layout = ShardLayout.for_width(514, 64, "bfloat16", chunk_rows=16)
    write_array(tmp_path, layout, [], dimension_names=["row", "neuron"])
    zarr.open_array(tmp_path).attrs["b"] = 2
    metadata = json.loads((tmp_path / "zarr.json").read_text())
    assert metadata["attributes"] == {"a": 1, "b": 2}
    assert ShardLayout.from_zarr_metadata(metadata) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fill_value": 0.0}, "acts/zarr.json has fill_value = 0.0; expected 'NaN'. Open it with"),
        ({"zarr_format": 2}, "has zarr_format = 2; expected 3. Open it with zarr.open_array."),
        ({"shape": [65, 11]}, "has shape = [65, 11]; expected [64, 11]."),
        ({"data_type": "int8"}, "dtype = 'int8' cannot be stored in a shard"),
        ({"storage_transformers": [1]}, "has storage_transformers = [1]; expected []."),
        (
            {"codecs": [{"name": "bytes"}]},
            "acts/zarr.json does not describe an array of shards (KeyError: 'configuration'); "
            "expected a Zarr v3 array of two dimensions with the codec sharding_indexed. "
            "Open it with zarr.open_array.",
        ),
        ({"shape": [64]}, "does not describe an array of shards (ValueError"),
    ],
)
def test_metadata_of_another_array_is_refused(change, message):
    """Anything but our own metadata raises, naming the key, and what opens the array."""
    layout = ShardLayout(rows=8, width=11, dtype="float32", chunk_rows=2, chunk_columns=11)
    metadata = layout.zarr_metadata(8, {}) | change
    with pytest.raises(FormatError) as error:
        ShardLayout.from_zarr_metadata(metadata, "acts/zarr.json")
    assert message in str(error.value)


def test_metadata_with_a_compressor_is_refused():
    """A codec this module does not undo is never taken for plain bytes."""
    metadata = ShardLayout.for_width(37, 8, "float32").zarr_metadata(1, {})
    metadata["codecs"][0]["configuration"]["codecs"] = [{"name": "zstd"}]
    with pytest.raises(FormatError, match=r"^zarr\.json has codecs = .*'zstd'"):
        ShardLayout.from_zarr_metadata(metadata)


# Independent implementations ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_zarr_python_and_tensorstore_read_what_we_write(tmp_path, width, dtype):
    """Two independent readers see our values bit for bit, and NaN where no band was written."""
    layout = ShardLayout.for_width(width, 64, dtype, chunk_rows=16)
    shards = [values_of(layout, 64), values_of(layout, 23, seed=11), values_of(layout, 0)]
    write_array(tmp_path, layout, shards, dimension_names=["row", "neuron"])
    expected = np.full((3 * 64, width), np.nan, layout.numpy_dtype)
    expected[:64], expected[64 : 64 + 23] = shards[0], shards[1]

    ours = zarr.open_array(tmp_path, mode="r")
    assert ours.shards == (64, layout.padded_width)
    assert ours.chunks == (16, layout.chunk_columns)
    for read in (ours[:], open_tensorstore(tmp_path).read().result()):
        assert read.dtype == layout.numpy_dtype
        here = ~np.isnan(expected)
        assert_same_bits(read[here], expected[here])
        np.testing.assert_array_equal(np.isnan(read), ~here)


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_zarr_python_and_tensorstore_write(tmp_path, dtype, open_reader):
    """Shards of others with our layout and one chunk across lie as ours do: we read them."""
    layout = ShardLayout.for_width(37, 64, dtype, chunk_rows=16)
    values = values_of(layout, 64)
    for name in ("zarr", "tensorstore"):
        path = tmp_path / name
        write_array(path, layout, [])
        (path / "zarr.json").write_text(json.dumps(layout.zarr_metadata(1, {})))
        if name == "zarr":
            zarr.open_array(path)[:] = values
        else:
            open_tensorstore(path).write(values).result()
        reader = open_reader((path / "c/0/0").read_bytes(), layout)
        assert_same_bits(reader.read_rows(0, 64), values)


def test_a_shard_of_another_writer_with_chunks_elsewhere_is_refused(tmp_path, open_reader):
    """A valid shard whose chunks lie in another order is refused, not misread."""
    layout = ShardLayout(rows=8, width=6, dtype="float32", chunk_rows=2, chunk_columns=2)
    write_array(tmp_path, layout, [])
    (tmp_path / "zarr.json").write_text(json.dumps(layout.zarr_metadata(1, {})))
    zarr.open_array(tmp_path)[:] = values_of(layout, 8)
    with pytest.raises(DamagedFile) as error:
        open_reader((tmp_path / "c/0/0").read_bytes(), layout)
    assert str(error.value) == (
        "the index of acts/c/5/0 places chunk (0, 1) elsewhere than expected, or misses it: "
        "actstore did not write this file. Read it with zarr.open_array."
    )


# Round trip --------------------------------------------------------------------------------------


@st.composite
def shards(draw):
    """A layout of any shape and dtype, any bits, and any number of rows."""
    chunk_rows = 2 ** draw(st.integers(0, 4))
    layout = ShardLayout(
        rows=chunk_rows * 2 ** draw(st.integers(0, 3)),
        width=draw(st.integers(1, 41)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        chunk_rows=chunk_rows,
        chunk_columns=draw(st.integers(1, 13)),
    )
    n_rows = draw(st.integers(0, layout.rows))
    seed = draw(st.integers(0, 2**32 - 1))
    data = np.random.default_rng(seed).bytes(n_rows * layout.width * layout.itemsize)
    return layout, np.frombuffer(data, layout.numpy_dtype).reshape(n_rows, layout.width)


@given(shards(), st.data())
@settings(deadline=None, max_examples=100)
def test_what_is_read_is_what_was_written(shard, data):
    """Any rows, columns and chunks come back bit for bit, in any order of reads."""
    layout, values = shard
    file, facts = shard_bytes(layout, values)
    fd = os.memfd_create("shard")
    try:
        os.write(fd, file)
        reader = ShardReader(fd, layout, len(file), "shard", facts.checksums_crc32c)
        assert reader.rows_present == -(-len(values) // layout.chunk_rows) * layout.chunk_rows
        expected = np.full((reader.rows_present, layout.width), np.nan, layout.numpy_dtype)
        expected[: len(values)] = values
        for _ in range(3):
            start = data.draw(st.integers(0, reader.rows_present))
            stop = data.draw(st.integers(start, reader.rows_present))
            column = data.draw(st.integers(0, layout.width - 1))
            assert_same_bits(reader.read_rows(start, stop), expected[start:stop])
            assert_same_bits(
                reader.read_column(column, start, stop),
                np.ascontiguousarray(expected[start:stop, column]),
            )
        assert_same_bits(reader.read_rows(0, reader.rows_present), expected)
    finally:
        os.close(fd)


@given(shards())
@settings(deadline=None, max_examples=50)
def test_facts_are_those_of_the_file(shard):
    """Size and crc32c, taken while streaming, equal those of the whole file read again."""
    layout, values = shard
    file, facts = shard_bytes(layout, values)
    assert (facts.n_bytes, facts.crc32c) == (len(file), google_crc32c.value(file))
    assert facts.n_bands == -(-len(values) // layout.chunk_rows)
    checksums, step = b"", layout.chunk_bytes + 4
    for end in range(step, facts.n_bands * layout.band_bytes + 1, step):
        checksums += file[end - 4 : end]
    assert facts.checksums_crc32c == google_crc32c.value(checksums)


def test_an_unbuffered_file_that_takes_parts_gets_all_bytes():
    """A short write, as a raw file may make, is continued where it stopped."""

    class Reluctant(io.BytesIO):
        def write(self, data):
            return super().write(data[:101])

    layout = ShardLayout.for_width(37, 8, "float32", chunk_rows=4)
    values = values_of(layout, 8)
    file = Reluctant()
    assert write(file, layout, values) == shard_bytes(layout, values)[1]
    assert file.getvalue() == shard_bytes(layout, values)[0]


def test_out_receives_rows_and_columns(open_reader, monkeypatch):
    """An array given as `out`, of any strides, is filled and returned."""
    monkeypatch.setattr("actstore.shard.reader._PIECE_BYTES", 1)
    layout = ShardLayout.for_width(514, 16, "bfloat16", chunk_rows=4)
    values = values_of(layout, 16)
    reader = open_reader(shard_bytes(layout, values)[0], layout)
    rows = np.zeros((22, 514), layout.numpy_dtype)[::2]
    assert reader.read_rows(3, 14, out=rows) is rows
    assert_same_bits(rows, np.ascontiguousarray(values[3:14]))
    column = np.zeros((11, 2), layout.numpy_dtype)[:, 1]
    for _ in range(2):  # once checking the chunks, in pieces of a row
        column[:] = 0
        assert reader.read_column(513, 3, 14, out=column) is column
        assert_same_bits(column, np.ascontiguousarray(values[3:14, 513]))


def test_bands_take_rows_of_any_strides():
    """A band is the same from a transposed view as from a copy of it, and pads with NaN."""
    layout = ShardLayout(rows=8, width=5, dtype="float32", chunk_rows=4, chunk_columns=3)
    values = values_of(layout, 3)
    band = to_band(np.asfortranarray(values), layout)
    assert band.shape == (2, 4, 3)
    assert band.flags.c_contiguous
    assert_same_bits(band[0, :3], np.ascontiguousarray(values[:, :3]))
    assert_same_bits(band[1, :3, :2], np.ascontiguousarray(values[:, 3:]))
    assert np.isnan(band[:, 3]).all()
    assert np.isnan(band[1, :, 2]).all()


# Rows that are scattered -------------------------------------------------------------------------


def stack_in(memory, layout, heights, first_column=3):
    """Return a stack of arrays inside a larger array, and a mask of the places it covers."""
    arrays, mask, top = [], np.zeros(memory.shape, bool), 1
    for height in heights:
        span = slice(top, top + height), slice(first_column, first_column + layout.width)
        arrays.append(memory[span])
        mask[span] = True
        top += height + 1
    return RowStack(arrays), mask


@given(shards(), st.data())
@settings(deadline=None, max_examples=100)
def test_scattered_rows_land_in_their_places(shard, data):
    """Any rows go to any places of several arrays, bit for bit, and nothing beside is touched."""
    layout, values = shard
    file, facts = shard_bytes(layout, values)
    if not facts.n_bands:
        return
    whole = np.full((facts.n_bands * layout.chunk_rows, layout.width), np.nan, layout.numpy_dtype)
    whole[: len(values)] = values
    rows = np.array(
        sorted(data.draw(st.sets(st.integers(0, len(whole) - 1), min_size=1))), np.int64
    )
    heights = [*data.draw(st.lists(st.integers(0, 5), max_size=4)), len(rows)]
    places = np.array(data.draw(st.permutations(range(sum(heights)))), np.int64)[: len(rows)]
    fd = os.memfd_create("shard")
    try:
        os.write(fd, file)
        reader = ShardReader(fd, layout, len(file), "shard", facts.checksums_crc32c)
        for _ in range(2):  # once checking the chunks
            shape = sum(heights) + len(heights) + 1, layout.width + 5
            memory = np.full(shape, 7, layout.numpy_dtype)
            stack, mask = stack_in(memory, layout, heights)
            reader.scatter(rows, stack, places)
            found = memory[mask].reshape(-1, layout.width)
            assert_same_bits(found[places], whole[rows])
            found[places] = 7
            memory[mask] = found.ravel()
            assert (memory == 7).all()
    finally:
        os.close(fd)


def test_near_rows_are_read_at_once_and_counted(open_reader):
    """One read takes rows near each other with what lies between; a first use takes its chunks."""
    layout = ShardLayout(rows=1024, width=300, dtype="float16", chunk_rows=512, chunk_columns=150)
    values = values_of(layout, 1024)
    reader = open_reader(shard_bytes(layout, values)[0], layout)
    stack = RowStack([np.empty((3, 300), np.float16)])
    near, far, places = np.array([5, 6, 9]), np.array([5, 100, 520]), np.arange(3)

    assert reader.scatter(near, stack, places) == (2 + 2, 2 * layout.chunk_bytes + 2 * 5 * 300)
    assert reader.scatter(near, stack, places) == (2, 2 * 5 * 300)
    assert reader.scatter(far, stack, places) == (2 + 6, 2 * layout.chunk_bytes + 6 * 300)
    assert reader.scatter(far[:0], stack, places[:0]) == (0, 0)


def test_scattered_rows_of_a_large_shard_are_exact(open_reader):
    """Stretches longer than what is read at once, across chunks, come whole."""
    layout = ShardLayout(rows=2048, width=514, dtype="float32", chunk_rows=1024, chunk_columns=128)
    values = values_of(layout, 2048)
    reader = open_reader(shard_bytes(layout, values)[0], layout)
    random = np.random.default_rng(5)
    for rows in (np.arange(2048), np.flatnonzero(random.random(2048) < 0.3)):
        out = np.empty((len(rows), 514), np.float32)
        places = random.permutation(len(rows))
        for _ in range(2):
            out[:] = np.nan
            reader.scatter(rows, RowStack([out]), places)
            assert_same_bits(np.ascontiguousarray(out[places]), values[rows])


def test_what_cannot_be_scattered_is_refused(open_reader):
    """Memory is written by address, so all that does not fit is refused before."""
    reader = open_reader(shard_bytes(SMALL, values_of(SMALL, 4))[0], SMALL)
    out = np.zeros((3, 5), np.float16)
    stack, three = RowStack([out]), np.arange(3)
    sealed = out.copy()
    sealed.flags.writeable = False
    for call, message in (
        (
            lambda: reader.scatter(three, stack, three + 1),
            "places 1 … 3 were given; expected 0 … 2",
        ),
        (lambda: reader.scatter(three, stack, three - 1), "places -1 … 1 were given"),
        (lambda: reader.scatter(three[::-1], stack, three), "the rows of acts/c/5/0 ascending"),
        (lambda: reader.scatter(three, stack, three[:2]), "rows (3,) and places (2,) do not go"),
        (lambda: reader.scatter(three - 1, stack, three), "rows -1 … 2 are not in acts/c/5/0"),
        (lambda: reader.scatter(three + 6, stack, three), "rows 6 … 9 are not in acts/c/5/0"),
        (
            lambda: reader.scatter(three, RowStack([np.zeros((3, 4), "f2")]), three),
            "the stack has 4 columns of float16; expected 5 of float16, as acts/c/5/0 has.",
        ),
        (
            lambda: reader.scatter(three, RowStack([out.astype("f4")]), three),
            "the stack has 5 columns of float32; expected 5 of float16",
        ),
        (lambda: RowStack([out, out[:, :4]]), "expected (n, 5) of float16, writeable"),
        (lambda: RowStack([out, out.astype("f4")]), "float32 and strides (20, 4) cannot be read"),
        (lambda: RowStack([np.zeros((5, 3), "f2").T]), "each row in one piece."),
        (lambda: RowStack([sealed]), "cannot be read into; expected (n, 5) of float16, writeable"),
    ):
        with pytest.raises(ArgumentError) as error:
            call()
        assert message in str(error.value)
    with pytest.raises(DamagedFile, match=r"chunk \(2, 0\) is missing from acts/c/5/0"):
        reader.scatter(three + 2, stack, three)
    assert not out.any()


# Damage ------------------------------------------------------------------------------------------

SMALL = ShardLayout(rows=8, width=5, dtype="float16", chunk_rows=2, chunk_columns=3)


@pytest.mark.parametrize("n_rows", [8, 4])
def test_every_flipped_byte_raises(n_rows, open_reader):
    """Whichever byte of a shard is flipped, opening it or reading all of it raises."""
    file, facts = shard_bytes(SMALL, values_of(SMALL, n_rows))

    def read_columns(data):
        reader = open_reader(data, SMALL)
        return [reader.read_column(column) for column in range(SMALL.width)]

    for position in range(len(file)):
        damaged = bytearray(file)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(DamagedFile, match="acts/c/5/0"):
            open_reader(bytes(damaged), SMALL).read_rows(0, n_rows)
        with pytest.raises(DamagedFile, match="acts/c/5/0"):
            read_columns(bytes(damaged))
        with pytest.raises(DamagedFile, match="acts/c/5/0"):
            scatter(open_reader(bytes(damaged), SMALL), range(n_rows))
        assert google_crc32c.value(bytes(damaged)) != facts.crc32c


def test_damage_names_file_and_chunk_and_spares_the_rest(open_reader):
    """Only reads that touch the damaged chunk raise, each time, with both checksums."""
    values = values_of(SMALL, 8)
    file = bytearray(shard_bytes(SMALL, values)[0])
    file[SMALL.band_bytes * 2 + SMALL.chunk_bytes + 4] ^= 1  # first byte of chunk (2, 1)
    chunk = file[SMALL.band_bytes * 2 + SMALL.chunk_bytes + 4 :][: SMALL.chunk_bytes]
    stored = file[SMALL.band_bytes * 3 - 4 : SMALL.band_bytes * 3]
    reader = open_reader(bytes(file), SMALL)
    assert_same_bits(reader.read_rows(0, 4), values[:4])
    assert_same_bits(reader.read_column(2), np.ascontiguousarray(values[:, 2]))
    assert_same_bits(scatter(reader, [3, 7]), values[[3, 7]])
    for read in (
        lambda: reader.read_rows(5, 6),
        lambda: scatter(reader, [0, 5]),
        lambda: reader.read_column(3),
        lambda: reader.read_rows(4, 5),
    ):
        with pytest.raises(DamagedFile) as error:
            read()
        assert str(error.value) == (
            f"chunk (2, 1) of acts/c/5/0 is damaged: its crc32c is "
            f"{google_crc32c.value(bytes(chunk)):08x}, the file says "
            f"{int.from_bytes(stored, 'little'):08x}. "
            "Restore it from a copy, or capture into a new store."
        )


def test_every_truncation_raises(open_reader):
    """A file cut at any byte raises when opened, with the size it should have."""
    file, _ = shard_bytes(SMALL, values_of(SMALL, 8))
    for length in range(len(file)):
        with pytest.raises(DamagedFile) as error:
            open_reader(file[:length], SMALL, n_bytes=len(file))
        assert str(error.value) == (
            f"acts/c/5/0 has {length} bytes; expected {len(file)}. "
            "Restore it from a copy, or capture into a new store."
        )


def test_a_size_that_no_shard_has_raises(open_reader):
    """A recorded size that holds no whole number of bands is refused."""
    with pytest.raises(DamagedFile) as error:
        open_reader(bytes(150), SMALL)
    assert str(error.value) == (
        "acts/c/5/0 has 150 bytes; expected 132 and up to 4 times 32. "
        "Restore it from a copy, or capture into a new store."
    )


def test_a_file_cut_after_it_was_opened_raises():
    """Truncation under an open reader raises however it is read."""
    file, _ = shard_bytes(SMALL, values_of(SMALL, 8))
    fd = os.memfd_create("shard")
    os.write(fd, file)
    reader = ShardReader(fd, SMALL, len(file), "acts/c/5/0")
    reader.read_rows(0, 8)
    os.ftruncate(fd, 65)
    with pytest.raises(DamagedFile, match=r"acts/c/5/0 ends at byte 65; expected 260 bytes\. Res"):
        reader.read_rows(0, 8)
    with pytest.raises(DamagedFile, match=r"acts/c/5/0 ends at byte 65; expected 260 bytes\. Res"):
        scatter(reader, range(8))
    with pytest.raises(DamagedFile, match=r"acts/c/5/0 ends at byte 80; expected 260 bytes\. Res"):
        reader.read_column(4)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        scatter(reader, range(8))


def test_a_damaged_index_raises(open_reader):
    """The index is checked by its own crc32c before anything is read."""
    file = bytearray(shard_bytes(SMALL, values_of(SMALL, 8))[0])
    file[-7] ^= 1
    with pytest.raises(DamagedFile) as error:
        open_reader(bytes(file), SMALL)
    assert str(error.value) == (
        "the index of acts/c/5/0 is damaged: its crc32c does not match. "
        "Restore it from a copy, or capture into a new store."
    )


def test_missing_bands_raise(open_reader):
    """Rows of bands that were not written raise; by default a column ends before them."""
    values = values_of(SMALL, 4)
    reader = open_reader(shard_bytes(SMALL, values)[0], SMALL)
    assert reader.rows_present == 4
    assert_same_bits(reader.read_column(1), np.ascontiguousarray(values[:, 1]))
    for read, chunk in (
        (lambda: reader.read_rows(3, 5), (2, 0)),
        (lambda: reader.read_column(1, 0, 8), (3, 0)),
    ):
        with pytest.raises(DamagedFile) as error:
            read()
        assert str(error.value) == (
            f"chunk {chunk} is missing from acts/c/5/0, which holds rows 0 … 3 of 8. "
            "Ask for rows that were written."
        )


def test_an_exchanged_shard_is_found_by_its_checksums_alone(open_reader):
    """Shards of one layout share their file crc32c whatever they hold; their checksums differ."""
    ours, facts = shard_bytes(SMALL, values_of(SMALL, 8, seed=1))
    other, other_facts = shard_bytes(SMALL, values_of(SMALL, 8, seed=2))
    assert ours != other
    assert facts.crc32c == other_facts.crc32c
    expected = facts.checksums_crc32c
    open_reader(ours, SMALL, checksums_crc32c=expected)
    with pytest.raises(DamagedFile) as error:
        open_reader(other, SMALL, checksums_crc32c=expected)
    assert str(error.value) == (
        "acts/c/5/0 is not the file that was recorded: the crc32c of its chunks' checksums is "
        f"{other_facts.checksums_crc32c:08x}, expected {expected:08x}. "
        "Restore it from a copy, or capture into a new store."
    )


def test_chunks_are_checked_once(open_reader, monkeypatch):
    """The first use of a chunk checks all of it; later reads fetch only the rows asked for."""
    layout = ShardLayout(rows=64, width=10, dtype="float16", chunk_rows=32, chunk_columns=5)
    values = values_of(layout, 64)
    reader = open_reader(shard_bytes(layout, values)[0], layout)
    n_bytes, preadv = [], os.preadv

    def counting(fd, buffers, offset):
        n_bytes.append(preadv(fd, buffers, offset))
        return n_bytes[-1]

    monkeypatch.setattr(os, "preadv", counting)
    for expected in ([layout.chunk_bytes + 4] * 2, [3 * 5 * 2] * 2):
        n_bytes.clear()
        assert_same_bits(reader.read_rows(7, 10), values[7:10])
        assert n_bytes == expected


# Arguments ---------------------------------------------------------------------------------------


def test_bands_of_another_kind_are_refused():
    """Wrong width, too many rows, another dtype, another shape and a full shard each raise."""
    values = values_of(SMALL, 8)
    for call, message in (
        (
            lambda: to_band(values[:, :4], SMALL),
            "rows_block has shape (8, 4); expected at most 2 rows of 5 columns. "
            "Give each band its own call.",
        ),
        (lambda: to_band(values[:3], SMALL), "rows_block has shape (3, 5); expected at most 2"),
        (
            lambda: to_band(values[:2].astype("f4"), SMALL),
            "rows_block has dtype float32; expected float16. Cast it first.",
        ),
        (
            lambda: ShardWriter(io.BytesIO(), SMALL).write_band(values[:2]),
            "band has shape (2, 5); expected (2, 2, 3), C-contiguous. Lay rows out with to_band.",
        ),
        (
            lambda: ShardWriter(io.BytesIO(), SMALL).write_band(np.zeros((3, 2, 2), "f2").T),
            "band has shape (2, 2, 3); expected (2, 2, 3), C-contiguous.",
        ),
        (
            lambda: ShardWriter(io.BytesIO(), SMALL).write_band(np.zeros((2, 2, 3), "f4")),
            "band has dtype float32; expected float16. Cast it first.",
        ),
        (
            lambda: shard_bytes(SMALL, values_of(SMALL, 10)),
            "the shard is full: it holds 4 of 4 bands. Write to a new shard.",
        ),
    ):
        with pytest.raises(ArgumentError) as error:
            call()
        assert message in str(error.value)


def test_a_finished_shard_takes_nothing_more():
    """After finish neither a band nor a second index is written."""
    writer = ShardWriter(io.BytesIO(), SMALL)
    facts = writer.finish()
    assert facts == ShardFacts(SMALL.index_bytes, facts.crc32c, 0, 0)
    band = to_band(values_of(SMALL, 2), SMALL)
    with pytest.raises(ArgumentError, match=r"the shard is finished: it holds 0 of 4 bands\. Wri"):
        writer.write_band(band)
    with pytest.raises(ArgumentError, match=r"the shard is finished already\. Write to a new"):
        writer.finish()


def test_reads_outside_the_shard_are_refused(open_reader):
    """Rows, columns and chunks that the layout does not have raise, naming what it has."""
    reader = open_reader(shard_bytes(SMALL, values_of(SMALL, 8))[0], SMALL)
    for call, kind, message in (
        (
            lambda: reader.read_rows(2, 9),
            ArgumentError,
            "rows 2 … 9 are not in acts/c/5/0; expected 0 <= start <= stop <= 8.",
        ),
        (lambda: reader.read_rows(-1, 3), ArgumentError, "rows -1 … 3 are not in acts/c/5/0;"),
        (
            lambda: reader.read_column(5),
            NeuronNotFound,
            "column = 5 is not in acts/c/5/0; expected 0 … 4.",
        ),
        (lambda: reader.read_column(-1), NeuronNotFound, "column = -1 is not in acts/c/5/0;"),
        (
            lambda: reader.read_rows(0, 3, out=np.zeros((2, 5), "f2")),
            ArgumentError,
            "out has shape (2, 5); expected (3, 5).",
        ),
        (
            lambda: reader.read_column(0, out=np.zeros(8, "f4")),
            ArgumentError,
            "out has dtype float32; expected float16. Cast it first.",
        ),
    ):
        with pytest.raises(kind) as error:
            call()
        assert message in str(error.value)


# Whole files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, 2**20, 2**20 + 1, 3 * 2**20 + 17])
def test_crc32c_of_file_is_that_of_its_bytes(tmp_path, n_bytes):
    """Streaming gives the crc32c of the bytes at once, at and around the block size."""
    data = np.random.default_rng(13).bytes(n_bytes)
    (tmp_path / "file").write_bytes(data)
    assert crc32c_of_file(tmp_path / "file") == google_crc32c.value(data)


def test_crc32c_of_a_missing_file_raises(tmp_path):
    """A file that is not there raises what open raises."""
    with pytest.raises(FileNotFoundError, match="no_such_file"):
        crc32c_of_file(tmp_path / "no_such_file")
