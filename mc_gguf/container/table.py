"""What a GGUF contains, as text for people: a line per layer, a column per expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mc_gguf.artifacts import ALL_PROJECTIONS, PROJECTIONS
from mc_gguf.common.units import format_size
from mc_gguf.routing.report import summary

MAX_COLUMNS = 16


def render_description(description: Mapping[str, Any]) -> str:
    """The text that `mc-gguf inspect` prints for what describe_model() returns."""
    kind = "mixed-expert GGUF" if description["mixed"] else "plain GGUF"
    bpw = description["expert_bpw"]
    lines = [
        f"{description['path']}: {kind}, {description['architecture']}, "
        f"{format_size(description['file_bytes'])} ({description['file_bytes']} bytes)"
        + (f" in {description['shards']} shards" if description["shards"] > 1 else ""),
        "no routed experts" if bpw is None else f"{bpw:.4f} bits per expert weight",
    ]
    lines += [
        f"{name} {description[f'{name}_fingerprint']}"
        for name in ("plan", "calibration")
        if description[f"{name}_fingerprint"]
    ]
    if description["routing"]:
        lines.append(f"routing: {summary(description['routing'])}")
    return "\n".join([*lines, "", *_layers(description["layers"]), *_totals(description)])


def projections(layers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The matrices that experts have in some layer; those of most models where there are no experts."""
    found = {p for layer in layers for expert in layer["experts"] for p in expert}
    return tuple(p for p in ALL_PROJECTIONS if p in found) or PROJECTIONS


def _cell(expert: Mapping[str, str]) -> str:
    """gate/up/down, or a single name when all types are the same."""
    types = list(expert.values())
    return types[0] if len(set(types)) == 1 else "/".join(types)


def _layers(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The types of every expert. Where all experts of each layer are alike, a layer is one cell; for models
    with many experts it is a count of each kind.
    """
    if not layers:
        return []
    rows = [[_cell(expert) for expert in layer["experts"]] for layer in layers]
    if all(len(set(row)) == 1 for row in rows):
        same = [
            f"{layer['layer']:>5}  {row[0]} (all {len(row)})" for layer, row in zip(layers, rows, strict=True)
        ]
        return [f"layer  experts ({'/'.join(projections(layers))})", *same, ""]
    if max(map(len, rows)) > MAX_COLUMNS:
        return [f"layer  experts of each {'/'.join(projections(layers))}", *_counted(layers, rows), ""]
    heads = [str(e) for e in range(max(map(len, rows)))]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    table = [
        f"{label:>5}  "
        + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for label, row in [
            ("layer", heads),
            *((str(x["layer"]), r) for x, r in zip(layers, rows, strict=True)),
        ]
    ]
    return [*table, ""]


def _counted(layers: Sequence[Mapping[str, Any]], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per layer with how many experts have which types, for models with many experts."""
    counts = [", ".join(f"{n} x {cell}" for cell, n in Counter(row).most_common()) for row in rows]
    return [f"{layer['layer']:>5}  {text}" for layer, text in zip(layers, counts, strict=True)]


def _totals(description: Mapping[str, Any]) -> list[str]:
    """Per type: the number of expert matrices of each projection, and of all tensors with their bytes."""
    counts: Counter[tuple[str, str]] = Counter()
    for layer in description["layers"]:
        counts.update((p, expert[p]) for expert in layer["experts"] for p in expert)
    found = projections(description["layers"])
    heads = " ".join(f"{p:>7}" for p in found)
    lines = [f"{'type':8} {heads} {'tensors':>8} {'size':>12}"]
    for name, total in description["tensors"].items():
        experts = " ".join(f"{counts[p, name] or '':>7}" for p in found)
        lines.append(f"{name:8} {experts} {total['tensors']:>8} {format_size(total['bytes']):>12}")
    return lines
