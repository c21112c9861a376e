"""The options that calibrate and convert share, and the one call that they make of them.

Cheap to import, so defaults are spelled here; a test compares them with the text and expert_errors modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mc_gguf.artifacts import Calibration
    from mc_gguf.calibrate.request import CalibrationOptions
    from mc_gguf.refine.options import RefinementOptions
    from mc_gguf.source import Checkpoint
    from mc_gguf.source.text import Corpus

_OPTIONS = (
    click.option(
        "--text",
        type=click.Path(path_type=Path),
        multiple=True,
        help="Calibration text, UTF-8; may be repeated.  [default: the bundled mixture]",
    ),
    click.option(
        "--tokens",
        type=click.IntRange(min=2),
        default=65536,
        show_default=True,
        help="Tokens to use, spread over the whole text.",
    ),
    click.option(
        "--ctx",
        type=click.IntRange(min=2),
        default=512,
        show_default=True,
        help="Tokens a row; at most the model's context.",
    ),
    click.option(
        "--rows",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Rows of a matrix on which the errors of the types are measured.",
    ),
    click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]"),
)


@dataclass(frozen=True)
class CalibrateOptions:
    """What the user asked of calibration."""

    text: tuple[Path, ...]
    tokens: int
    ctx: int
    rows: int
    threads: int | None

    def calibrate(
        self,
        source: Checkpoint,
        output: Path,
        types: tuple[str, ...] | None,
        seed: int,
        resume: bool,
        quiet: bool,
    ) -> Calibration:
        """Calibrate `source` into the file `output`; `types` None measures all candidates."""
        from mc_gguf.calibrate.calibrator import calibrate_to_file

        corpus, options = self.request(source, types, seed)
        return calibrate_to_file(source, corpus, output, options, resume, quiet)

    def request(
        self, source: Checkpoint, types: tuple[str, ...] | None, seed: int
    ) -> tuple[Corpus, CalibrationOptions]:
        """The token rows and the options of the library that these options stand for."""
        from mc_gguf.calibrate.request import CalibrationOptions
        from mc_gguf.source.text import load_corpus

        length = source.hparams.get("context_length")
        corpus = load_corpus(source, self.text, self.tokens, self.ctx, seed, length)
        return corpus, CalibrationOptions(
            types=types, max_rows=self.rows, seed=seed, threads=self.threads or 0
        )

    def refinement(self, seconds: float, compensate: bool, seed: int) -> RefinementOptions:
        """For a refinement on the same text, cut elsewhere than with calibration seed `seed`."""
        from mc_gguf.common.errors import McError
        from mc_gguf.refine.options import MIN_ROWS, RefinementOptions

        if self.tokens // self.ctx < MIN_ROWS:
            raise McError(f"--refine needs {MIN_ROWS} rows of text: at least --tokens {MIN_ROWS * self.ctx}")
        tokens = min(self.tokens, max(RefinementOptions.tokens, MIN_ROWS * self.ctx))
        return RefinementOptions(
            seconds,
            self.text,
            tokens,
            self.ctx,
            seed + 1,
            self.threads or 0,
            compensate=compensate,
            calibration_text=self.text,
        )


def calibrate_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a click command; its function gets them as one argument `calibration`."""

    @wraps(function)
    def wrapped(**arguments: Any) -> Any:
        names = ("text", "tokens", "ctx", "rows", "threads")
        return function(calibration=CalibrateOptions(**{n: arguments.pop(n) for n in names}), **arguments)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
