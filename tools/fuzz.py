"""Mutate a mixed GGUF, load it and generate from it, each time in a process of its own; count what happens.

    mc-gguf convert models/tiny-mixtral --bpw 2.5 -o /tmp/m.gguf
    python -m tools.fuzz /tmp/m.gguf --runs 100000
    python -m tools.fuzz /tmp/m.gguf --runs 1 --seed 4711        # run 4711 again

Every run has a seed of its own, seed + number, which decides what is changed: the header, the metadata, our
keys and routing, the maps of experts, the tensor infos, the type of a tensor, the weights, the file's length,
or the options of the intact file. A run is a fork of a process that has loaded the libraries, but no model,
under limits of memory and time. It may end with an McError, or generate. Anything else is a fault: another
exception, a signal, a hang. Files that led to one are kept.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np

import mc_gguf
from mc_gguf.common.errors import McError
from mc_gguf.ggml.gguf_file import GgufHeader, pad, read_header
from mc_gguf.ggml.types import TYPES_BY_ID, GgmlType
from tools.common import run_tool
from tools.forks import Limits, forked

MEBIBYTE = 1 << 20
DEFAULTS: dict[str, Any] = {"n_ctx": 256, "n_batch": 32, "n_threads": 1, "routing": "odp"}
Span = tuple[int, int]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `kind`: "generated", "refused", or a fault: "hang", a signal's or exception's name."""

    mutation: str
    kind: str
    text: str = ""

    @property
    def is_fault(self) -> bool:
        return self.kind not in ("generated", "refused")


class Mutator:
    """The file, and everything that can be done to it. The spans are (start, end) in bytes."""

    def __init__(self, path: Path) -> None:
        header = read_header(path)
        self.path, self.data, self.header = path, path.read_bytes(), header
        self.kinds: dict[str, Callable[[np.random.Generator, bytearray], None]] = {
            "header": self._in([(0, header.data_offset)]),
            "metadata": self._in([*header.kv_spans.values()]),
            "keys": self._in(_spans(header, "mc_gguf.", but="mc_gguf.routing.")),
            "maps": self._in(_maps(header)),
            "routing": self._in(_spans(header, "mc_gguf.routing.")),
            "architecture": self._in(_spans(header, f"{header.get('general.architecture')}.")),
            "tensor infos": self._in([header.infos_span]),
            "types": self._retype,
            "weights": self._in([(header.data_offset, header.file_bytes)]),
            "length": _cut,
        }

    def mutate(self, rng: np.random.Generator) -> tuple[str, bytes | None, dict[str, Any]]:
        """(name of the mutation, the bytes of the file or None for the intact one, options of Llama)."""
        names = [*self.kinds, "options"]
        name = names[rng.integers(len(names))]
        if name == "options":
            return name, None, _options(rng)
        data = bytearray(self.data)
        self.kinds[name](rng, data)
        return name, bytes(data), {}

    def _retype(self, rng: np.random.Generator, data: bytearray) -> None:
        tensors, types = [*self.header.tensors.values()], [*TYPES_BY_ID.values()]
        tensor = tensors[rng.integers(len(tensors))]
        fitting = [kind for kind in types if kind.fits(tensor.shape[0])]
        data[:] = retyped(self.header, self.data, tensor.name, fitting[rng.integers(len(fitting))])

    def _in(self, spans: list[Span]) -> Callable[[np.random.Generator, bytearray], None]:
        """Changes bytes in one of the spans, or a number that may be there."""

        def change(rng: np.random.Generator, data: bytearray) -> None:
            start, end = spans[rng.integers(len(spans))]
            for _ in range(1 << int(rng.integers(0, 4))):
                _change(rng, data, start, end)

        return change


def retyped(header: GgufHeader, data: bytes, name: str, kind: GgmlType) -> bytes:
    """The file `data` with another type for the tensor `name`, whose bytes are repeated or cut to fit."""
    infos, weights = bytearray(), bytearray()
    for t in header.tensors.values():
        type_id, content = t.type.id, data[t.offset : t.offset + t.n_bytes]
        if t.name == name:
            type_id, n_bytes = kind.id, kind.row_bytes(t.shape[0]) * prod(t.shape[1:])
            content = (content * -(-n_bytes // len(content)))[:n_bytes]
        infos += struct.pack("<Q", len(t.name.encode())) + t.name.encode()
        infos += struct.pack(f"<I{len(t.shape)}QIQ", len(t.shape), *t.shape, type_id, len(weights))
        weights += content + bytes(pad(len(content), header.alignment) - len(content))
    head = data[: header.infos_span[0]] + infos
    return head + bytes(pad(len(head), header.alignment) - len(head)) + weights


def _maps(header: GgufHeader) -> list[Span]:
    """Where the maps from experts to groups are."""
    found = [(t.offset, t.offset + t.n_bytes) for t in header.tensors.values() if t.name.endswith(".map")]
    if not found:
        raise click.ClickException(f"{header.path} has no maps of experts: give a mixed file")
    return found


def _spans(header: GgufHeader, prefix: str, but: str = "\0") -> list[Span]:
    found = [
        span for key, span in header.kv_spans.items() if key.startswith(prefix) and not key.startswith(but)
    ]
    if not found:
        raise click.ClickException(f"{header.path} has no metadata {prefix}*: give a mixed file with routing")
    return found


def _change(rng: np.random.Generator, data: bytearray, start: int, end: int) -> None:
    """One bit, one byte, a number of 4 or 8 bytes that tempts, or a stretch copied from elsewhere."""
    at = int(rng.integers(start, end))
    kind = rng.integers(4)
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at] = int(rng.integers(256))
    elif kind == 2:
        size = int(rng.choice([4, 8]))
        tempting = (0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)), 1 << 20, 1 << 31, 255)
        value = int(tempting[rng.integers(len(tempting))]) & (2 ** (8 * size) - 1)
        changed = value.to_bytes(size, "little")[: end - at]
        data[at : at + len(changed)] = changed
    else:
        length = int(rng.integers(1, 17))
        source = int(rng.integers(start, end))
        changed = bytes(data[source : min(source + length, end)])[: end - at]
        data[at : at + len(changed)] = changed


def _cut(rng: np.random.Generator, data: bytearray) -> None:
    if rng.integers(4):
        del data[int(rng.integers(len(data))) :]
    else:
        data += bytes(int(rng.integers(1, 1 << 12)))


def _options(rng: np.random.Generator) -> dict[str, Any]:
    """A few options of Llama, each out of values that are right, wrong, or at an edge."""
    choices: dict[str, list[Any]] = {
        "n_ctx": [0, 1, 8, 100, 256, 1000, -1, 1 << 20, 1 << 40],
        "n_batch": [0, 1, 7, 512, -5, 1 << 31],
        "n_ubatch": [0, 1, 7, 512, 1 << 31],
        "n_threads": [0, 1, 2, -1, 513, 1 << 31],
        "seed": [-1, 0, 1 << 32, 1 << 70],
        "type_k": [None, 0, 1, 2, 8, 10, 16, 99, -1],
        "type_v": [None, 0, 1, 8, 99],
        "flash_attn": [True, False],
        "embedding": [True, False],
        "logits_all": [True, False],
        "rope_freq_base": [0.0, -1.0, float("nan"), 1e30],
        "rope_scaling_type": [-1, 0, 1, 2, 3, 77],
        "yarn_orig_ctx": [0, -1, 1 << 33],
        "pooling_type": [-1, 0, 1, 9],
        "routing": [
            "off",
            "odp",
            "odp:protect=2",
            "top_p:top_p=nan",
            "threshold:threshold=0.5",
            "keep_min",
            "x:",
        ],
        "kv_overrides": [
            {"llama.expert_used_count": 1},
            {"llama.expert_used_count": 1000},
            {"llama.expert_count": 3},
            {"llama.block_count": 99},
            {"tokenizer.ggml.bos_token_id": 1 << 30},
            {"general.name": "x" * 200},
        ],
    }
    names = rng.choice([*choices], size=int(rng.integers(1, 4)), replace=False)
    return {str(name): choices[name][rng.integers(len(choices[name]))] for name in names}


def run(path: Path, options: dict[str, Any], mutation: str, limits: Limits) -> Outcome:
    """Open the file and generate from it, in a fork."""
    return Outcome(mutation, *forked(partial(_try, path, options), limits))


def _try(path: Path, options: dict[str, Any]) -> tuple[str, str]:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.environ["GGML_NO_BACKTRACE"] = "1"
    try:
        llama = mc_gguf.Llama(path, **(DEFAULTS | options))
        llama.create_completion("The house on the hill, ", max_tokens=3, seed=1)
        llama.close()
    except McError:
        return "refused", ""
    except Exception as error:  # noqa: BLE001  whatever it is, it is a fault
        return type(error).__name__, str(error)[:500]
    return "generated", ""


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--runs", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the first run.")
@click.option(
    "--memory", default=4096, show_default=True, help="MiB of address space that a run may add; 0: no limit."
)
@click.option("--seconds", default=20, show_default=True, help="After which a run counts as a hang.")
@click.option("--keep", type=click.Path(path_type=Path), help="Folder for the files that led to a fault.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def main(
    model: Path, runs: int, seed: int, memory: int, seconds: int, keep: Path | None, as_json: bool
) -> None:
    """Mutate MODEL, a mixed GGUF with routing, and run what comes of it."""
    counts, faults = fuzz(model, runs, seed, memory, seconds, keep)
    kinds = sorted({kind for _, kind in counts})
    if as_json:
        table = {f"{mutation}: {kind}": n for (mutation, kind), n in sorted(counts.items())}
        click.echo(json.dumps({"runs": runs, "seed": seed, "faults": faults, "counts": table}))
    else:
        for mutation in sorted({mutation for mutation, _ in counts}):
            numbers = "  ".join(f"{counts[mutation, kind]:7} {kind}" for kind in kinds)
            click.echo(f"{mutation:14} {numbers}")
        click.echo(f"{runs} runs from seed {seed}: {faults} faults")
    raise SystemExit(faults > 0)


def fuzz(
    model: Path, runs: int, seed: int, memory: int, seconds: int, keep: Path | None = None
) -> tuple[Counter[tuple[str, str]], int]:
    """(how often each mutation ended in which way, number of faults). Faults are reported on stderr."""
    importlib.import_module("mc_gguf.run.llama")  # loads the libraries, so that the forks have them
    mutator, counts, faults = Mutator(model), Counter[tuple[str, str]](), 0
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = Limits(own + memory * MEBIBYTE if memory else resource.RLIM_INFINITY, seconds)
    if not (intact := run(model, {}, "", limits)).kind == "generated":
        raise McError(f"{model}, not mutated, is {intact.kind} {intact.text}".rstrip())
    began = time.monotonic()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        changed = Path(folder) / "mutated.gguf"
        for number in range(seed, seed + runs):
            mutation, data, options = mutator.mutate(np.random.default_rng(number))
            if data is not None:
                changed.write_bytes(data)
            outcome = run(model if data is None else changed, options, mutation, limits)
            counts[mutation, outcome.kind] += 1
            if outcome.is_fault:
                faults += 1
                sys.stderr.write(
                    f"\nseed {number}, {mutation} {options or ''}: {outcome.kind} {outcome.text}\n"
                )
                if keep and data is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(changed, keep / f"{number}.gguf")
            if (number - seed) % 100 == 99:
                rate = (number - seed + 1) / (time.monotonic() - began)
                sys.stderr.write(f"\r{number - seed + 1} of {runs} runs, {rate:.0f}/s, {faults} faults ")
                sys.stderr.flush()
    return counts, faults


if __name__ == "__main__":
    run_tool(main, "fuzz")
