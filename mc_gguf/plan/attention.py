"""Attention matrices as further items of the program, in the same bytes as the experts.

The errors of experts and of attention are both relative to the hidden states of their layer, so one price,
kld_per_error, turns both into nats per token. The program weighs them as they will be in the file: error
compensation, the default, leaves the share COMPENSATED of the experts' divergence, and attention is not
compensated. The types of attention matrices change nothing in a file but the bytes of those matrices.

With attention an assignment is flat: the experts' columns [L, E, 3], then those of attention [L, 4].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mc_gguf.artifacts import ATTENTION, Calibration, FixedTypes, ModelInfo, TensorSpec
from mc_gguf.common.errors import ArtifactError, McError
from mc_gguf.ggml.types import ggml_type
from mc_gguf.plan.problem import FileBytes, Floats, Ints, Problem
from mc_gguf.plan.program import Items, Limit
from mc_gguf.plan.solver import Knapsack

COMPENSATED = 0.6  # between 0.52 and 0.65, depending on type and text: docs/explanation/compensation.md
_ALIGNMENT = 32  # of tensors in the file


@dataclass(frozen=True, eq=False)
class Attention:
    """L layers, 4 matrices (ATTENTION), A types. A choice is an index into `types` for each matrix, [L, 4].

    `kld` [L, 4, A]   nats per token; infinite where a row is not a whole number of the type's blocks
    `size` [L, 4, A]  bytes in the file, padding included; 0 where kld is infinite
    """

    types: tuple[str, ...]
    kld: Floats
    size: Ints

    @property
    def n_matrix(self) -> int:
        return int(self.kld.shape[0] * self.kld.shape[1])

    def rows(self, choice: Ints) -> tuple[tuple[str, ...], ...]:
        """FixedTypes.attention of a choice."""
        return tuple(tuple(self.types[t] for t in row) for row in choice.tolist())

    @property
    def error(self) -> Floats:
        """What is minimised together with the divergence of experts as ggml rounds them."""
        return self.kld / COMPENSATED

    def predicted_kld(self, choice: Ints) -> float:
        return float(np.take_along_axis(self.kld, choice[..., None], axis=-1).sum())


def build_attention(calibration: Calibration, types: Sequence[str]) -> Attention:
    """Errors and bytes of `types` (empty: all that were measured).

    Raises ArtifactError for a calibration without errors of attention, McError for types that were not
    measured or that no row fits.
    """
    model = calibration.model
    if model is None or not calibration.has("attention_error"):
        raise ArtifactError(
            "this calibration has no errors of attention matrices; calibrate again, or leave attention fixed",
            parameter="attention",
        )
    known = calibration.attention_types
    wanted = [ggml_type(name).name for name in types] or list(known)
    if missing := [name for name in wanted if name not in known]:
        raise McError(
            f"no errors of attention were measured for {', '.join(missing)}, only for {', '.join(known)}",
            parameter="attention",
        )
    names = tuple(dict.fromkeys(wanted))
    price = calibration.kld_per_error[:, None, None]
    kld = np.maximum(calibration.attention_error[..., [known.index(name) for name in names]], 0.0) * price
    specs = {t.name: t for t in model.tensors}
    matrices = [[specs[f"blk.{i}.attn_{part}.weight"] for part in ATTENTION] for i in calibration.layers]
    size = np.array([[[_file_size(spec, name) for name in names] for spec in row] for row in matrices])
    if not (size > 0).any(axis=-1).all():
        raise McError(
            f"one attention matrix can have none of the types {', '.join(names)}; leave attention fixed",
            parameter="attention",
        )
    return Attention(names, np.where(size > 0, kld, np.inf), size.astype(np.int64))


def make_up_errors(model: ModelInfo, types: Sequence[str]) -> tuple[tuple[str, ...], Floats | None]:
    """attention_types and attention_error for plan.stand_in: the same error everywhere.

    The error is None for a model of which a calibration would measure none.
    """
    shapes = [t.shape for t in model.tensors if t.name in {f"blk.0.attn_{part}.weight" for part in ATTENTION}]
    names = tuple(n for n in types if any(ggml_type(n).fits(shape[0]) for shape in shapes))
    if len(shapes) < len(ATTENTION) or model.expert_layers != tuple(range(model.n_layer)):
        return names, None
    return names, np.ones((len(model.expert_layers), len(ATTENTION), len(names)))


def _file_size(spec: TensorSpec, name: str) -> int:
    """Bytes of the tensor in this type with its padding; 0 where it cannot have the type."""
    cols, rows = spec.shape
    if not ggml_type(name).fits(cols):
        return 0
    n_byte: int = rows * ggml_type(name).row_bytes(cols)
    return -(-n_byte // _ALIGNMENT) * _ALIGNMENT


def add_attention(items: Items, attention: Attention) -> Items:
    """`items` followed by one item for every attention matrix; the assignment becomes flat."""
    experts, n_item = items.knapsack, len(items.knapsack.error)
    width = max(experts.error.shape[1], len(attention.types))
    shape = (attention.n_matrix, len(attention.types))
    error = np.full((n_item + shape[0], width), np.inf)
    size = np.zeros(error.shape, dtype=np.int64)
    for table, rows, own in ((error, experts.error, attention.error), (size, experts.size, attention.size)):
        table[:n_item, : rows.shape[1]], table[n_item:, : shape[1]] = rows, own.reshape(shape)

    def columns(choice: Ints) -> Ints:
        return np.concatenate([items.columns(choice[:n_item]).reshape(-1), choice[n_item:]])

    return Items(Knapsack(error, size), columns)


def split_assignment(problem: Problem, attention: Attention, flat: Ints) -> tuple[Ints, Ints]:
    """The experts' columns [L, E, 3] and the attention's choice [L, 4] of a flat assignment."""
    experts, matrices = flat[: -attention.n_matrix], flat[-attention.n_matrix :]
    return experts.reshape(problem.error.shape[:3]), matrices.reshape(attention.kld.shape[:2])


def limit_with_attention(
    limit: Limit, problem: Problem, attention: Attention, fixed: FixedTypes, file_bytes: FileBytes
) -> Limit:
    """`limit`, a file size, measured on flat assignments."""

    def measure(flat: Ints) -> int:
        columns, choice = split_assignment(problem, attention, flat)
        return file_bytes(problem.experts(columns), replace(fixed, attention=attention.rows(choice)))

    return replace(limit, measure=measure)


def total_error(problem: Problem, attention: Attention, columns: Ints, choice: Ints) -> float:
    """What is minimised, summed over the experts' columns [L, E, 3] and the attention's choice [L, 4]."""
    return problem.total_error(columns) + attention.predicted_kld(choice) / COMPENSATED
