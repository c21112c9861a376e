"""A layer's statistics, from the table: zeros of the right shapes, stacked and merged."""

from __future__ import annotations

import numpy as np

from mc_gguf.artifacts import Calibration
from mc_gguf.calibrate.statistics import LayerStatistics, merge_layers, stack_layers, unstack_layers
from tests.support.synthetic_calibration import model_info

FROM_ALL_LAYERS = {"routing_sensitivity", "kld_per_error", "nominal_error"}
OF_OTHER_MATRICES = {"matrix_error", "matrix_price", "matrix_in"}


def layer(value: float) -> LayerStatistics:
    stats = LayerStatistics.zeros(model_info(), ("Q2_K", "Q3_K"))
    for array in stats.statistics.values():
        array[...] = value
    return stats


def test_a_layer_has_everything_but_what_all_layers_are_needed_for() -> None:
    names = {line.name for line in Calibration.table()} - FROM_ALL_LAYERS - OF_OTHER_MATRICES
    assert set(layer(0).statistics) == names | {"rounding_error"}
    assert layer(0).sq_error.shape == (8, 3, 2)
    assert layer(0).imatrix_mid.shape == (8, 256)
    assert layer(0).hidden_max.shape == ()


def test_merged_layers_make_a_calibration() -> None:
    """Its constructor checks the shapes and dtypes."""
    model = model_info(n_layer=2)
    found = Calibration(model, (0, 1), ("Q2_K", "Q3_K"), {}, merge_layers([layer(1), layer(2)]))
    assert not found.has("nominal_error")
    assert not found.has("matrix_error")
    assert (found.frequency[0] == 1).all()
    assert (found.frequency[1] == 2).all()
    assert found.imatrix_in.dtype == np.float32


def test_stacking_is_undone_without_a_loss() -> None:
    layers = [layer(1 / 3), layer(2 / 3)]
    found = unstack_layers(stack_layers(layers))
    assert len(found) == 2
    for one, other in zip(layers, found, strict=True):
        assert set(one.statistics) == set(other.statistics)
        for name, array in one.statistics.items():
            assert other.statistics[name].dtype == np.float64
            np.testing.assert_array_equal(array, other.statistics[name])
