"""The zarr-python data type ``bfloat16``.

zarr-python knows no bfloat16; tensorstore does.  The metadata is the one that zarr-extensions
registers: the name ``bfloat16`` and the ``bytes`` codec with an ``endian``.  Importing this module
teaches zarr-python to open such arrays, as `ml_dtypes.bfloat16`.  An entry point in the group
``zarr.data_type`` imports it where zarr-python asks for one (seen in 3.4; 3.1.6 collects the
entry points and never loads them, so there the user imports this module).

References
----------
https://github.com/zarr-developers/zarr-extensions/tree/main/data-types/bfloat16
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from zarr.dtype import Float16, data_type_registry

from actstore.errors import ArgumentError


# Of zarr's public names only a float type brings the byte order without which the `bytes` codec
# writes no `endian`; the item size and the JSON of scalars are inherited with it.
@dataclass(frozen=True, kw_only=True)
class BFloat16(Float16):
    """Zarr v3 data type of arrays of `ml_dtypes.bfloat16`; Zarr v2 has no name for it.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> zarr.create_array({}, shape=3, dtype=np.dtype(ml_dtypes.bfloat16), fill_value=1.5)[:]
    array([1.5, 1.5, 1.5], dtype=bfloat16)
    """

    dtype_cls = type(np.dtype(ml_dtypes.bfloat16))
    _zarr_v3_name: ClassVar[str] = "bfloat16"
    _zarr_v2_names: ClassVar[tuple[str, ...]] = ()  # type: ignore[assignment]

    def to_json(self, zarr_format: int) -> Any:
        """Return the name of the data type in the metadata of Zarr v3.

        Raises
        ------
        ArgumentError
            If the format is Zarr v2, which would read the values back as raw bytes.
        """
        if zarr_format != 3:
            raise ArgumentError(
                f"zarr_format = {zarr_format} has no data type 'bfloat16'; expected 3. "
                "Create the array with zarr_format=3."
            )
        return self._zarr_v3_name


data_type_registry.register(BFloat16._zarr_v3_name, BFloat16)
