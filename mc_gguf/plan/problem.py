"""What is to be decided: the budget, and the types, bytes and errors of every expert's projection."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration, FixedTypes, ModelInfo
from mc_gguf.common.errors import ArtifactError, BudgetError, McError
from mc_gguf.ggml.types import CANDIDATES, FALLBACKS, MAX_GROUPS, SIXTEEN_BIT, ggml_type
from mc_gguf.plan.objectives import Objective, block, kld

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Experts = Mapping[str, Sequence[Sequence[str]]]
FileBytes = Callable[[Experts, FixedTypes], int]  # the exact size of the file with these types


@dataclass(frozen=True)
class Budget:
    """Exactly one limit. Raises BudgetError for none, for several, or for a number that is not positive.

    `bpw`             average bits per routed expert weight; 16 or more: a plain 16-bit file
    `size_bytes`      size of the whole file
    `bits_per_layer`  nominal bits summed over a layer's experts (strategy mc)
    """

    bpw: float | None = None
    size_bytes: int | None = None
    bits_per_layer: int | None = None

    def __post_init__(self) -> None:
        given = self.to_json()
        if len(given) != 1:
            found = " and ".join(name.removesuffix("_bytes") for name in given) or "none of them"
            raise BudgetError(f"give exactly one of bpw, size and bits_per_layer, not {found}")
        ((name, value),) = given.items()
        if not (np.isfinite(value) and value > 0):
            raise BudgetError(f"{name} must be a positive number, not {value}")

    def to_json(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def is_sixteen_bit(self) -> bool:
        return self.bpw is not None and self.bpw >= 16


@dataclass(frozen=True, eq=False)
class Problem:
    """L layers, E experts, T types. The types are columns: `candidates` first, then fallbacks.

    P counts model.projections. An assignment is one column for every expert and projection, [L, E, P].

    `error` [L, E, P, T]        what is minimised; inf: the matrix cannot have the type; nan: not measured
    `block_error` [L, E, P, T]  squared error of the block's output, whatever is minimised
    `kld` [L, E, P, T]          KL divergence as in objective kld, nats per token; None: not measured
    `size` [L, P, T]            bytes of one expert's matrix; 0 where it cannot have the type
    `output_sq`                 squared norm of all experts' outputs, the unit of predicted_error
    """

    model: ModelInfo
    layers: tuple[int, ...]
    candidates: tuple[str, ...]
    types: tuple[str, ...]
    error: Floats
    block_error: Floats
    kld: Floats | None
    size: Ints
    output_sq: float

    @property
    def n_expert(self) -> int:
        return int(self.error.shape[1])

    @property
    def n_weight(self) -> int:
        """Routed expert weights of the whole model."""
        return self.model.n_expert_weight

    def expert_bytes(self, columns: Ints) -> int:
        size = np.broadcast_to(self.size[:, None], self.error.shape)
        return int(np.take_along_axis(size, columns[..., None], axis=-1).sum())

    def bpw(self, columns: Ints) -> float:
        return 8 * self.expert_bytes(columns) / self.n_weight

    def total_error(self, columns: Ints) -> float:
        return _sum_of(self.error, columns)

    def predicted_error(self, columns: Ints) -> float | None:
        """Share of the experts' output energy that turns into error; None when a type was not measured."""
        error = _sum_of(self.block_error, columns)
        if not np.isfinite(error):
            return None
        return error / self.output_sq if self.output_sq > 0 else 0.0

    def predicted_kld(self, columns: Ints) -> float | None:
        """KL divergence of the model's output, nats per token; None when it was not measured."""
        total = _sum_of(self.kld, columns) if self.kld is not None else np.nan
        return total if np.isfinite(total) else None

    def experts(self, columns: Ints) -> dict[str, tuple[tuple[str, ...], ...]]:
        """The assignment by name: [projection][layer][expert]."""
        names = np.array(self.types, dtype=object)[columns]
        return {
            p: tuple(tuple(row) for row in names[:, :, i].tolist())
            for i, p in enumerate(self.model.projections)
        }


def _sum_of(error: Floats, columns: Ints) -> float:
    return float(np.take_along_axis(error, columns[..., None], axis=-1).sum())


def candidate_types(calibration: Calibration, types: Sequence[str] | None) -> tuple[str, ...]:
    """The types to choose from, smallest first: those asked for, or all that the calibration measured.

    Raises McError for unknown types and for types without measured errors.
    """
    wanted = [ggml_type(name) for name in (types if types is not None else calibration.types)]
    if missing := [t.name for t in wanted if t.name not in calibration.types]:
        raise McError(
            f"no errors of {', '.join(missing)} in this calibration, which measured "
            f"{', '.join(calibration.types)}: choose among these, or calibrate again with more types",
            parameter="types",
        )
    if not wanted:
        raise McError(
            f"there are no types to choose from; name some of {', '.join(calibration.types or CANDIDATES)}",
            parameter="types",
        )
    return tuple(t.name for t in sorted(set(wanted), key=lambda t: (t.bpw, t.id)))


def build_problem(calibration: Calibration, types: Sequence[str], objective: Objective = block) -> Problem:
    """Bytes and errors of `types` for every expert's projection, with a fallback where none of them can be
    used.

    Types that the calibration did not measure get unknown errors (nan). Raises BudgetError for published
    statistics, ArtifactError for arrays that are inconsistent.
    """
    model = _checked_model(calibration)
    stacks = [(layer, p) for layer in model.expert_layers for p in model.projections]
    usable = np.array([[_fits(model, layer, p, name) for name in types] for layer, p in stacks])
    columns = list(types)
    for i, (layer, p) in enumerate(stacks):
        if usable[i].any():
            continue
        name = fallback_type(model, layer, p)
        if name not in columns:
            columns.append(name)
            usable = np.pad(usable, ((0, 0), (0, 1)))
        usable[i, columns.index(name)] = True
    size = np.zeros(usable.shape, dtype=np.int64)
    for i, t in zip(*np.nonzero(usable), strict=True):
        size[i, t] = _matrix_bytes(model, stacks[i][0], stacks[i][1], columns[t])
    shape = (len(model.expert_layers), len(model.projections), len(columns))
    size, usable = size.reshape(shape), usable.reshape(shape)
    error, block_error = (_usable_errors(of(calibration, types), usable) for of in (objective, block))
    divergence = _usable_errors(kld(calibration, types), usable) if calibration.has("kld_per_error") else None
    return Problem(
        model,
        calibration.layers,
        tuple(types),
        tuple(columns),
        error,
        block_error,
        divergence,
        size,
        float(calibration.output_sq.sum()),
    )


def _usable_errors(error: Floats, usable: NDArray[np.bool_]) -> Floats:
    """[L, E, P, T]: `error` with columns added for the fallbacks.

    Nobody knows a fallback's error, but where there is one there is nothing to choose, so it counts as 0. An
    error that was estimated from a sample of rows may be below zero; it counts as 0, too.
    """
    shape = (*error.shape[:3], usable.shape[-1] - error.shape[-1])
    whole = np.concatenate([np.maximum(error, 0.0), np.zeros(shape)], axis=-1)
    usable = np.broadcast_to(usable[:, None], whole.shape)
    if np.isposinf(whole[usable]).any():
        raise ArtifactError("the calibration has infinite errors for types that can be used; calibrate again")
    return np.where(usable, whole, np.inf)


def limited(problem: Problem, columns: Ints | None = None) -> Problem:
    """`problem` with at most MAX_GROUPS types for every stack, which is what a file can hold. Stacks of one
    projection that fit the same types keep the same ones; those that the assignment `columns` uses stay.

    Where more are possible, those go first that lie farthest above the lower convex hull of error over size,
    summed over these stacks: some mixture of two others has less error in the same bytes.
    """
    size, error = problem.size.copy(), problem.error.copy()
    for p, layers in alike(problem):
        total_size, total_error = size[layers, p].sum(axis=0), error[layers, :, p].sum(axis=(0, 1))
        used = set() if columns is None else set(columns[layers, :, p].flat)
        left = sorted(np.flatnonzero(total_size).tolist(), key=lambda t: (total_size[t], total_error[t]))
        while len(left) > MAX_GROUPS:
            excess = {
                i: _excess(left, i, total_size, total_error)
                for i in range(1, len(left) - 1)
                if left[i] not in used
            }
            if not excess:
                break
            gone = left.pop(max(excess, key=excess.__getitem__))
            size[layers, p, gone], error[layers, :, p, gone] = 0, np.inf
    return replace(problem, size=size, error=error)


def alike(problem: Problem) -> Iterator[tuple[int, Ints]]:
    """(projection, layers) of stacks that can have the same types, as indices."""
    for p in range(problem.size.shape[1]):
        patterns, which = np.unique(problem.size[:, p] > 0, axis=0, return_inverse=True)
        for i in range(len(patterns)):
            yield p, np.flatnonzero(which.reshape(-1) == i)


def _excess(types: Sequence[int], i: int, size: Ints, error: Floats) -> float:
    """How far the error of types[i] is above that of a mixture of its neighbours in size."""
    before, this, after = types[i - 1], types[i], types[i + 1]
    span = size[after] - size[before]
    share = (size[this] - size[before]) / span if span else 0.0
    mixed = error[before] + share * (error[after] - error[before])
    return float((error[this] - mixed) / max(mixed, 1e-30))


def check_has_model(calibration: Calibration) -> ModelInfo:
    """The model that was calibrated. Raises BudgetError for published statistics, which belong to no file."""
    if calibration.model is None:
        raise BudgetError(
            "published statistics have no sizes and no errors of ggml types: use strategy mc with "
            "bits_per_layer, or calibrate the model with: mc-gguf calibrate"
        )
    return calibration.model


def _checked_model(calibration: Calibration) -> ModelInfo:
    model = check_has_model(calibration)
    if not calibration.layers:
        raise ArtifactError("the calibration covers no layer; calibrate a Mixture-of-Experts model")
    if np.isnan(calibration.sq_error).any():
        raise ArtifactError("the calibration has errors that are not numbers; calibrate again")
    return model


def _fits(model: ModelInfo, layer: int, projection: str, name: str) -> bool:
    return ggml_type(name).fits(model.expert_shape(projection, layer)[1])


def _matrix_bytes(model: ModelInfo, layer: int, projection: str, name: str) -> int:
    rows, cols = model.expert_shape(projection, layer)
    return rows * ggml_type(name).row_bytes(cols)


def fallback_type(model: ModelInfo, layer: int, projection: str) -> str:
    """The type of a projection whose rows fit no candidate: the smallest that fits, at worst a 16-bit one."""
    fitting = [name for name in FALLBACKS if _fits(model, layer, projection, name)]
    return min(fitting, key=lambda name: ggml_type(name).bpw) if fitting else sixteen_bit_type(model)


def sixteen_bit_type(model: ModelInfo) -> str:
    """The source's own 16-bit type; for a 32-bit source BF16, which holds its range."""
    found = {stack.type for stack in model.stacks.values()}
    return next((name for name in SIXTEEN_BIT if name in found), "BF16")


def fixed_types(model: ModelInfo | None, budget: Budget, fixed: FixedTypes) -> FixedTypes:
    """Types of the other tensors: in a plain 16-bit file 16 bits, unless another type was asked for."""
    if model is None or not budget.is_sixteen_bit:
        return fixed
    plain, default = sixteen_bit_type(model), FixedTypes()
    names = ("attn_kv", "attn", "token_embd", "output")
    kept = {name for name in names if getattr(fixed, name) != getattr(default, name)}
    return replace(fixed, **dict.fromkeys(set(names) - kept, plain))  # type: ignore[arg-type]


def bytes_for_bpw(problem: Problem, bpw: float) -> int:
    """Bytes that an average of `bpw` leaves for the experts, rounded down exactly."""
    return int(Fraction(bpw) * problem.n_weight / 8)
