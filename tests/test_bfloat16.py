import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from actstore.bfloat16 import BFloat16
from actstore.errors import ArgumentError

# Every bfloat16 there is: all signs, exponents, subnormals, infinities and NaN payloads.
EVERY_VALUE = np.arange(2**16, dtype="<u2").view(ml_dtypes.bfloat16).reshape(512, 128)


def test_zarr_python_keeps_every_bit_of_every_value(tmp_path):
    """An array that zarr-python writes and reads back has the same 65,536 bit patterns."""
    path = tmp_path / "a.zarr"
    array = zarr.create_array(path, data=EVERY_VALUE, chunks=(64, 128), fill_value=np.nan)
    assert array.metadata.data_type == BFloat16()
    read = zarr.open_array(path, mode="r")[:]
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.view("u2"), EVERY_VALUE.view("u2"))


def test_tensorstore_reads_what_zarr_python_writes(tmp_path):
    """The array is the `bfloat16` of zarr-extensions, which tensorstore knows by itself."""
    zarr.create_array(tmp_path, data=EVERY_VALUE, chunks=(64, 128), compressors=None)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
    read = tensorstore.open(spec).result().read().result()
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.view("u2"), EVERY_VALUE.view("u2"))


def test_zarr_python_reads_what_tensorstore_writes(tmp_path):
    """zarr-python opens an array that tensorstore created, fill value included."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": str(tmp_path)},
        "metadata": {"shape": [512, 131], "data_type": "bfloat16", "fill_value": "NaN"},
    }
    array = tensorstore.open(spec, create=True).result()
    array[:, :128].write(EVERY_VALUE).result()
    read = zarr.open_array(tmp_path, mode="r")
    assert np.isnan(read.fill_value)
    np.testing.assert_array_equal(read[:, :128].view("u2"), EVERY_VALUE.view("u2"))
    assert np.isnan(read[:, 128:].astype("f4")).all()


@pytest.mark.parametrize("fill_value", [0, 1.5, -2.0, np.inf, -np.inf, np.nan])
def test_fill_value_survives_its_json(fill_value):
    """A scalar written to metadata and read back is the same scalar."""
    scalar = ml_dtypes.bfloat16(fill_value)
    json = BFloat16().to_json_scalar(scalar, zarr_format=3)
    read = BFloat16().from_json_scalar(json, zarr_format=3)
    assert isinstance(read, ml_dtypes.bfloat16)
    assert read.tobytes() == scalar.tobytes()


def test_float16_stays_float16():
    """Knowing bfloat16 changes nothing for the type it is derived from."""
    assert zarr.create_array({}, shape=3, dtype="float16").metadata.data_type.to_json(3) == (
        "float16"
    )
    assert zarr.create_array({}, shape=3, dtype="bfloat16").dtype == ml_dtypes.bfloat16


def test_zarr_v2_is_refused():
    """Zarr v2 would read the values back as raw bytes, so it is refused with the remedy."""
    with pytest.raises(ArgumentError, match=r"zarr_format = 2 .* expected 3\. Create the array"):
        zarr.create_array({}, shape=3, dtype=EVERY_VALUE.dtype, zarr_format=2)


def test_importing_the_module_is_enough(tmp_path):
    """A process that imports the module and nothing else of actstore opens the array."""
    zarr.create_array(tmp_path, data=EVERY_VALUE[:3, :5])
    code = f"import actstore.bfloat16, zarr; print(zarr.open_array({str(tmp_path)!r})[:].dtype)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "bfloat16"
