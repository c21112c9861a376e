"""Values that float32 cannot hold are said with their place."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mc_gguf.calibrate.finite import check_finite, place
from mc_gguf.common.errors import McError, SourceError


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_refused(value: float) -> None:
    values = np.array([1.0, value, 2.0])
    with pytest.raises(
        SourceError, match=r"layer 3, expert 5: squared outputs reach .*, which float32 cannot"
    ):
        with place(3, "expert 5"):
            check_finite(values, "squared outputs")
    with pytest.raises(McError):
        check_finite(torch.from_numpy(values).float(), "hidden states")
    with pytest.raises(McError):
        check_finite(value, "errors")


def test_what_is_fine() -> None:
    check_finite(np.array([3e38, -3e38, 0.0]), "x")
    check_finite(np.zeros(0), "x")
    check_finite(torch.zeros(0, 3), "x")
    check_finite(1e-300, "x")


def test_errors_that_name_their_place_stay_as_they_are() -> None:
    with pytest.raises(SourceError, match=r"^blk\.0: nan$"), place(3, "expert 5"):
        raise SourceError("blk.0: nan")
