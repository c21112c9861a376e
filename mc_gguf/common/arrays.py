"""Arrays in files of their own."""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


def write_array(file: BinaryIO, array: NDArray[Any]) -> None:
    """What np.save() writes, but with the system's error when the disk is full: numpy's has no errno."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)
