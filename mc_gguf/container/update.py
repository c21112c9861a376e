"""The routing metadata of a file, read or computed anew, by path: what `mc-gguf routing` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mc_gguf.artifacts import Calibration
from mc_gguf.common.arguments import PathLike, to_path, to_paths
from mc_gguf.common.errors import ArtifactError, McError, about
from mc_gguf.common.files import check_output, check_shards
from mc_gguf.common.progress import progress
from mc_gguf.common.units import parse_layers, parse_share
from mc_gguf.container.reader import MixedGguf
from mc_gguf.container.rewrite import write_routing
from mc_gguf.container.routing import base_metadata, read_routing
from mc_gguf.ggml.shards import check_first
from mc_gguf.routing.metadata import RoutingMetadata, choose_thresholds


def load_routing(model: PathLike) -> RoutingMetadata:
    """The routing metadata in `model`. Raises ArtifactError without any, FormatError when it is damaged."""
    metadata = read_routing(Path(model))
    if metadata is None:
        raise ArtifactError(
            f"{model} carries no routing; give it some with: mc-gguf routing set --calibration FILE"
        )
    return metadata


def _check_copy(model: Path, output: Path, others: tuple[Path, ...]) -> None:
    """Raises McError when `output`, which may be `model` itself, cannot be written."""
    if output.exists() and model.exists() and output.samefile(model):
        check_output(output, others)
    else:
        check_output(output, (model, *others))
        check_shards(output)


def update_routing(
    model: PathLike,
    output: PathLike | None = None,
    *,
    calibration: PathLike | None = None,
    quantile: str | float | None = None,
    target_drop: str | float | None = None,
    protect: str | float = "2%",
    layers: str | Sequence[int] | None = None,
    quiet: bool = False,
) -> RoutingMetadata:
    """Compute routing thresholds anew and write them into a GGUF; every tensor stays as it is, byte for byte.

    The file is replaced at the end, by a rename, so an interrupted call leaves it as it was. In a split GGUF
    the first shard carries the metadata.

    Args:
        model: a GGUF with experts, mixed or plain.
        output: write a copy; by default `model` is replaced.
        calibration: a calibration of this model; by default what the file itself carries of one.
        quantile: share of the slots below the first that every layer drops ("50%" or 0.5); instead of
            `target_drop`.
        target_drop: share of all expert activations to drop, spread over the layers so that the predicted
            damage is least; by default 15 %.
        protect: share of a prompt's tokens that keep all their experts under policy odp.
        layers: layers that may drop experts: "all", "auto" (those that tolerate it), or numbers. By default
            all, and auto with `quantile`.
        quiet: show no progress on stderr.

    Returns:
        What was written.

    Raises:
        FormatError: the file is no valid GGUF, or its model has no experts.
        ArtifactError: the calibration is of another model, or there is nothing to compute thresholds from.
        McError: a share or a layer is out of range, both shares are given, or the file to write is the
            calibration.

    Example:
        >>> from mc_gguf.container import update_routing
        >>> update_routing("m.gguf", quantile=0.5, layers="all").active
        (0, 1, 2, 3, 4, 5)
    """
    if quantile is not None and target_drop is not None:
        both = ("quantile", "target_drop")
        raise McError("these exclude each other; give one of them", parameter=both)
    check_first(Path(model))
    with about("output"):
        _check_copy(Path(model), to_path(output) or Path(model), to_paths(calibration))
    header = MixedGguf.open(Path(model)).header
    with about("calibration"):
        known = Calibration.load(Path(calibration)) if calibration is not None else None
    metadata = choose_thresholds(
        base_metadata(header, known),
        _share(quantile, "quantile"),
        _share(target_drop, "target_drop"),
        _layers(layers),
        _share(protect, "protect") or 0.0,
    )
    with progress("copy", unit="MB", quiet=quiet) as bar:
        write_routing(Path(model), to_path(output) or Path(model), metadata, bar)
    return metadata


def _share(value: str | float | None, parameter: str) -> float | None:
    with about(parameter):
        return None if value is None else parse_share(str(value))


def _layers(value: str | Sequence[int] | None) -> str | Sequence[int] | None:
    with about("layers"):
        return parse_layers(value) if isinstance(value, str) else value
