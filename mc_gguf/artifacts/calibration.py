"""Calibration: the statistics of every expert that calibrate measured, from which plan and quantize work.

The file is in safetensors format: the arrays of the table (statistics.py), and a header with one JSON
document that holds everything else (docs/reference/calibration.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf import __version__
from mc_gguf.artifacts.header import check_header, check_kind, why
from mc_gguf.artifacts.model import ModelInfo
from mc_gguf.artifacts.published import NOMINAL_BITS, PublishedStatistics, is_published
from mc_gguf.artifacts.statistics import Statistics, check_statistics
from mc_gguf.common.arguments import PathLike
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import atomic_write, sha256_of

CALIBRATION_VERSION = 4
NO_CALIBRATION = hashlib.sha256(b"").hexdigest()  # fingerprint where nothing had to be measured: 16-bit files
_FORMAT = "mc_gguf.calibration"
_NOT_MEASURED = (0,)  # shape of an array in a file that stands for "not measured"


@dataclass(frozen=True, eq=False)
class Calibration(Statistics):
    """Statistics of every expert of a model on a calibration text.

    Each array of the table in `Statistics` is an attribute (`calibration.frequency`); `has` tells which were
    measured.

    Attributes:
        model: the calibrated model; None for published statistics.
        layers: numbers of the layers with experts, ascending. Arrays count these layers from 0.
        types: names of the candidate types whose errors were measured.
        corpus: the text: sources, SHA-256, seed, rows, and under "measured" all that the result depends on.
        statistics: what was measured, by name. Raises ArtifactError when an array does not fit the table, the
            model or the other arrays.
        matrices: names of the matrices that are not experts and were measured.
        matrix_types: names of the types whose errors were measured for them.
        fingerprint: SHA-256 of the file.
        tool: what made the file, with its version.
    """

    model: ModelInfo | None
    layers: tuple[int, ...]
    types: tuple[str, ...]
    corpus: dict[str, Any]
    statistics: Mapping[str, NDArray[Any]]
    matrices: tuple[str, ...] = ()
    matrix_types: tuple[str, ...] = ()
    fingerprint: str = ""
    tool: str = field(default=f"mc_gguf {__version__}")

    def __post_init__(self) -> None:
        sizes = axis_sizes(self.model, self.types, self.matrices, self.matrix_types)
        sizes |= {"layer": len(self.layers)}
        check_statistics(self.table(), self.statistics, sizes)

    @property
    def n_expert(self) -> int:
        """Routed experts per layer."""
        return int(self.frequency.shape[1]) if self.model is None else self.model.n_expert

    def imatrix(self, layer: int, projection: str, expert: int) -> NDArray[np.float32] | None:
        """The importance matrix of one expert's matrix: the mean squared input of each of its columns.

        Args:
            layer: number of the layer in the model.
            projection: one of PROJECTIONS.
            expert: number of the expert in the layer.

        Returns:
            float32 [n_embd] for gate and up, [n_ff] for down. All zeros when no token of the text was routed
            to the expert; quantizers treat that like ones. None when the calibration measured no importance
            matrices.
        """
        name = "imatrix_mid" if projection == "down" else "imatrix_in"
        if not self.has(name):
            return None
        if layer not in self.layers:
            raise ArtifactError(
                f"the calibration has no layer {layer}; calibrate the model that is used here"
            )
        row: NDArray[np.float32] = self.statistics[name][self.layers.index(layer), expert]
        return row if self.model is None else row[: self.model.expert_shape(projection, layer)[1]]

    def matrix_imatrix(self, name: str) -> NDArray[np.float32] | None:
        """The importance matrix [columns] of a matrix that is no expert; None when it was not measured."""
        if name not in self.matrices or self.model is None or not self.has("matrix_in"):
            return None
        widths = matrix_widths(self.model, self.matrices)
        place = self.matrices.index(name)
        first = sum(widths[:place])
        found: NDArray[np.float32] = self.matrix_in[first : first + widths[place]]
        return found

    def with_statistics(self, **arrays: NDArray[Any] | None) -> Calibration:
        """This calibration with some arrays replaced, added or (None) left out."""
        changed = {**self.statistics, **arrays}
        return replace(self, statistics={name: a for name, a in changed.items() if a is not None})

    @classmethod
    def blank(cls, model: ModelInfo) -> Calibration:
        """No statistics at all: enough to plan a 16-bit file of `model`."""
        return cls(model, model.expert_layers, (), {}, {}, fingerprint=NO_CALIBRATION)

    @classmethod
    def from_published(cls, published: PublishedStatistics, fingerprint: str) -> Calibration:
        """A calibration without a model: only what strategy mc needs."""
        return cls(
            model=None,
            layers=tuple(range(len(published.frequency))),
            types=(),
            corpus={"about": published.about},
            statistics={
                "frequency": published.frequency,
                "routing_weight": published.routing_weight,
                "nominal_error": published.nominal_error,
            },
            fingerprint=fingerprint,
            tool="published",
        )

    def save(self, path: PathLike) -> Calibration:
        """Write the file; returns this calibration with `fingerprint` set to the file's SHA-256."""
        from safetensors.numpy import save

        header = {
            "format": _FORMAT,
            "version": CALIBRATION_VERSION,
            "tool": self.tool,
            "model": self.model.to_json() if self.model else None,
            "layers": self.layers,
            "types": self.types,
            "corpus": self.corpus,
            "matrices": self.matrices,
            "matrix_types": self.matrix_types,
        }
        arrays = {
            line.name: np.ascontiguousarray(
                self.statistics.get(line.name, np.zeros(_NOT_MEASURED, line.dtype))
            )
            for line in self.table()
        }
        data = save(arrays, metadata={"mc_gguf": json.dumps(header, sort_keys=True)})
        with atomic_write(Path(path)) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: PathLike) -> Calibration:
        """Read a calibration, or the published statistics (JSON).

        Raises ArtifactError when the file is damaged, of another version, or has an array of the wrong shape.
        """
        path = Path(path)
        check_kind(path, ("JSON", "a safetensors file"), "a calibration", "calibrate")
        fingerprint = sha256_of(path)
        if is_published(path):
            return cls.from_published(PublishedStatistics.load(path), fingerprint)
        from safetensors import SafetensorError

        try:
            header, arrays = cls._read(path)
            model = ModelInfo.from_json(header["model"]) if header["model"] else None
            named = {name: tuple(header[name]) for name in ("layers", "types", "matrices", "matrix_types")}
            corpus, tool = header["corpus"], header["tool"]
            for name in ("types", "matrices", "matrix_types"):
                if not all(isinstance(item, str) for item in named[name]):
                    raise ValueError(f"{name} has what is no name")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArtifactError(
                f"{path} is not a calibration file ({why(error)}); make one with: mc-gguf calibrate"
            ) from error
        try:
            return cls(model, **named, corpus=corpus, statistics=arrays, fingerprint=fingerprint, tool=tool)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {error}; make a new one with: mc-gguf calibrate") from error

    @classmethod
    def _read(cls, path: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Header and measured arrays of a file; arrays that are not in the table are ignored."""
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as reader:
            header = json.loads((reader.metadata() or {}).get("mc_gguf", "{}"))
            check_header(path, header, _FORMAT, CALIBRATION_VERSION)
            stored = set(reader.keys())
            names = [line.name for line in cls.table() if not line.optional or line.name in stored]
            arrays = {name: reader.get_tensor(name) for name in names}
        return header, {name: array for name, array in arrays.items() if array.shape != _NOT_MEASURED}


def axis_sizes(
    model: ModelInfo | None,
    types: Sequence[str],
    matrices: Sequence[str] = (),
    matrix_types: Sequence[str] = (),
) -> dict[str, int]:
    """The sizes of all axes (AXES) that follow from a model and what was measured."""
    sizes = {"type": len(types), "bits": len(NOMINAL_BITS)}
    sizes |= {"matrix": len(matrices), "matrix_type": len(matrix_types)}
    if model is None:
        return sizes
    sizes |= {"layer": len(model.expert_layers), "expert": model.n_expert}
    sizes |= {"projection": len(model.projections), "matrix_column": sum(matrix_widths(model, matrices))}
    return sizes | {"n_embd": model.expert_width, "n_ff": model.n_ff, "rank": model.n_expert_used - 1}


def matrix_widths(model: ModelInfo, matrices: Sequence[str]) -> list[int]:
    """Columns of each matrix. Raises ArtifactError for one that the model does not have."""
    shapes = {t.name: t.shape for t in model.tensors}
    if unknown := next((name for name in matrices if name not in shapes), None):
        raise ArtifactError(f"the calibration has a matrix {unknown}, which its model does not have")
    return [shapes[name][0] for name in matrices]
