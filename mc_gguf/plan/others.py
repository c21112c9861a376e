"""Matrices that are not experts as further items of the program, in the same bytes as the experts.

Calibration measured for each of them the error of its products under every type, and what an error of the
products costs in nats per token. The program weighs them as they will be in the file: error compensation, the
default, leaves the share COMPENSATED of the experts' divergence, and other matrices are not compensated.
Their types change nothing in a file but their own bytes.

With others an assignment is flat: the experts' columns [L, E, P], then those of the others [M].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mc_gguf.artifacts import Calibration, FixedTypes, ModelInfo, TensorSpec
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.ggml.types import ggml_type
from mc_gguf.plan.problem import FileBytes, Floats, Ints, Problem
from mc_gguf.plan.program import Items, Limit
from mc_gguf.plan.solver import Knapsack

COMPENSATED = 0.6  # between 0.52 and 0.65, depending on type and text: docs/explanation/compensation.md
_ALIGNMENT = 32  # of tensors in the file


@dataclass(frozen=True, eq=False)
class Others:
    """M matrices, A types. A choice is an index into `types` for each matrix, [M].

    `kld` [M, A]   nats per token; infinite where a row is not a whole number of the type's blocks
    `size` [M, A]  bytes in the file, padding included; 0 where kld is infinite
    """

    names: tuple[str, ...]
    types: tuple[str, ...]
    kld: Floats
    size: Ints

    def named(self, choice: Ints) -> dict[str, str]:
        """FixedTypes.others of a choice."""
        return {name: self.types[t] for name, t in zip(self.names, choice.tolist(), strict=True)}

    @property
    def error(self) -> Floats:
        """What is minimised together with the divergence of experts as ggml rounds them."""
        return self.kld / COMPENSATED

    def predicted_kld(self, choice: Ints) -> float:
        return float(np.take_along_axis(self.kld, choice[..., None], axis=-1).sum())


def build_others(calibration: Calibration, types: Sequence[str]) -> Others:
    """Errors and bytes of `types` (empty: all that were measured). Matrices that can have none of them are
    left out: they have the types that are fixed.

    Raises ArtifactError for a calibration without errors of such matrices, McError for types that were not
    measured or that no matrix fits.
    """
    model = calibration.model
    if model is None or not calibration.has("matrix_error", "matrix_price"):
        raise ArtifactError(
            "this calibration has no errors of matrices other than experts; calibrate again, or leave others "
            "fixed",
            parameter="others",
        )
    known = calibration.matrix_types
    wanted = [ggml_type(name).name for name in types] or list(known)
    if missing := [name for name in wanted if name not in known]:
        raise McError(
            f"no errors of matrices other than experts were measured for {', '.join(missing)}, only for "
            f"{', '.join(known)}",
            parameter="others",
        )
    names = tuple(dict.fromkeys(wanted))
    columns = [known.index(name) for name in names]
    error = calibration.matrix_error[:, columns]
    known_error = np.isfinite(error)
    kld = np.where(known_error, error, 0.0).clip(min=0.0) * calibration.matrix_price[:, None]
    specs = {t.name: t for t in model.tensors}
    size = np.array([[_file_size(specs[matrix], name) for name in names] for matrix in calibration.matrices])
    size = np.where(known_error, size.reshape(error.shape), 0).astype(np.int64)
    possible = [bool(row.any()) for row in size > 0]
    if not any(possible):
        raise McError(
            f"no matrix but the experts can have any of the types {', '.join(names)}; leave others fixed",
            parameter="others",
        )
    found = tuple(name for m, name in enumerate(calibration.matrices) if possible[m])
    size = size[possible]
    return Others(found, names, np.where(size > 0, kld[possible], np.inf), size)


def make_up_errors(model: ModelInfo, types: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...], Floats]:
    """matrices, matrix_types and matrix_error for plan.stand_in: the same error everywhere."""
    specs = [t for t in model.tensors if is_decided(t)]
    names = tuple(n for n in types if any(ggml_type(n).fits(t.shape[0]) for t in specs))
    return tuple(t.name for t in specs), names, np.ones((len(specs), len(names)))


def is_decided(spec: TensorSpec) -> bool:
    """Whether a calibration of a model is likely to have measured the matrix: it knows after the fact."""
    return spec.name.startswith("blk.") and spec.is_matrix and len(spec.shape) == 2 and min(spec.shape) > 1


def _file_size(spec: TensorSpec, name: str) -> int:
    """Bytes of the tensor in this type with its padding; 0 where it cannot have the type."""
    cols, *rows = spec.shape
    if not ggml_type(name).fits(cols):
        return 0
    n_byte: int = math.prod(rows) * ggml_type(name).row_bytes(cols)
    return -(-n_byte // _ALIGNMENT) * _ALIGNMENT


def add_others(items: Items, others: Others) -> Items:
    """`items` followed by one item for every other matrix; the assignment becomes flat."""
    experts, n_item = items.knapsack, len(items.knapsack.error)
    shape = others.kld.shape
    width = max(experts.error.shape[1], shape[1])
    error = np.full((n_item + shape[0], width), np.inf)
    size = np.zeros(error.shape, dtype=np.int64)
    for table, rows, own in ((error, experts.error, others.error), (size, experts.size, others.size)):
        table[:n_item, : rows.shape[1]], table[n_item:, : shape[1]] = rows, own

    def columns(choice: Ints) -> Ints:
        return np.concatenate([items.columns(choice[:n_item]).reshape(-1), choice[n_item:]])

    return Items(Knapsack(error, size), columns)


def split_assignment(problem: Problem, others: Others, flat: Ints) -> tuple[Ints, Ints]:
    """The experts' columns [L, E, P] and the others' choice [M] of a flat assignment."""
    n_other = len(others.names)
    return flat[:-n_other].reshape(problem.error.shape[:3]), flat[-n_other:]


def limit_with_others(
    limit: Limit, problem: Problem, others: Others, fixed: FixedTypes, file_bytes: FileBytes
) -> Limit:
    """`limit`, a file size, measured on flat assignments."""

    def measure(flat: Ints) -> int:
        columns, choice = split_assignment(problem, others, flat)
        return file_bytes(problem.experts(columns), replace(fixed, others=others.named(choice)))

    return replace(limit, measure=measure)


def total_error(problem: Problem, others: Others, columns: Ints, choice: Ints) -> float:
    """What is minimised, summed over the experts' columns [L, E, P] and the others' choice [M]."""
    return problem.total_error(columns) + others.predicted_kld(choice) / COMPENSATED
