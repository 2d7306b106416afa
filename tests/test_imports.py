import subprocess
import sys

import actstore


def test_importing_actstore_loads_no_heavy_library():
    """`import actstore` loads neither torch nor transformers, DuckDB, numba or dask."""
    code = (
        "import sys, actstore; dir(actstore); "
        "print([m for m in ('torch', 'transformers', 'duckdb', 'numba', 'dask', 'zarr') "
        "if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert out.stdout.strip() == "[]"


def test_every_public_name_resolves():
    """Each name in __all__ can be had, and there are at most fifteen."""
    assert len(actstore.__all__) <= 15
    assert all(getattr(actstore, name) is not None for name in actstore.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """A misspelt name fails as it does in any module."""
    assert not hasattr(actstore, "captur")
