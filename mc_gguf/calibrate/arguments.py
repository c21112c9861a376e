"""CalibrationRequest: the text to calibrate on and what to measure, as a user writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mc_gguf.common.arguments import MAX_THREADS, Names, Paths, to_paths, to_types, whole
from mc_gguf.common.errors import about
from mc_gguf.source.text import DEFAULT_CTX, DEFAULT_TOKENS, Corpus, load_corpus

if TYPE_CHECKING:
    from mc_gguf.calibrate.options import CalibrationOptions
    from mc_gguf.source import Checkpoint

DEFAULT_ROWS = 256
MAX_LAYERS = 9999  # more than any model has: all of them


@dataclass(frozen=True, kw_only=True)
class CalibrationRequest:
    """How much of which text, and what is measured on it.

    Args:
        text: UTF-8 files; by default the mixture that comes with mc_gguf.
        tokens: tokens to use, spread over the whole text.
        ctx: tokens per row of text; at most the model's context.
        rows: rows of a matrix on which the errors of the types are measured.
        types: ggml types to measure; by default all candidates that fit the model.
        seed: random seed.
        threads: threads; by default all usable cores.
        gpu_layers: layers that the runtime computes on a GPU; 0 computes on the CPU.
        cpu_moe: how many of these layers keep their experts in the CPU's memory.

    Raises McError for a number that is out of range, or none.
    """

    text: Paths = ()
    tokens: int = DEFAULT_TOKENS
    ctx: int = DEFAULT_CTX
    rows: int = DEFAULT_ROWS
    types: Names | None = None
    seed: int = 0
    threads: int | None = None
    gpu_layers: int = 0
    cpu_moe: int = 0

    def __post_init__(self) -> None:
        checked = whole(2, tokens=self.tokens, ctx=self.ctx) + whole(1, rows=self.rows)
        checked += whole(1, MAX_THREADS, or_none=True, threads=self.threads) + whole(0, seed=self.seed)
        checked += whole(0, MAX_LAYERS, gpu_layers=self.gpu_layers, cpu_moe=self.cpu_moe)
        names = ("tokens", "ctx", "rows", "threads", "seed", "gpu_layers", "cpu_moe")
        for name, value in zip(names, checked, strict=True):
            object.__setattr__(self, name, value)
        with about("types"):
            to_types(self.types or ())

    def corpus(self, checkpoint: Checkpoint) -> Corpus:
        """The token rows. Raises SourceError for a text that cannot be read or is too short."""
        length = checkpoint.hparams.get("context_length")
        with about("text"):
            return load_corpus(checkpoint, to_paths(self.text), self.tokens, self.ctx, self.seed, length)

    def options(self) -> CalibrationOptions:
        """The options of the library that these arguments stand for."""
        from mc_gguf.calibrate.options import CalibrationOptions

        types = None if self.types is None else to_types(self.types)
        return CalibrationOptions(
            types=types,
            max_rows=self.rows,
            seed=self.seed,
            threads=self.threads or 0,
            gpu_layers=self.gpu_layers,
            cpu_moe=self.cpu_moe,
        )
