"""`mc-gguf chat`: talk with a GGUF, plain or mixed-expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command, section

answers = section("Answers")


@click.command(cls=Command)
@click.argument("model", type=o.PATH)
@answers("-p", "--prompt", help="Answer this (-: what is on stdin) and stop; without it, talk.")
@answers("--system", metavar="TEXT", help="What the model is told before the chat; -: what is on stdin.")
@answers("--template", type=o.PATH, metavar="FILE", help="A Jinja chat template in place of the model's.")
@answers("--raw", is_flag=True, help="Continue the text, also if the model has a chat template.")
@answers(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Longest answer, in tokens.",
)
@answers(
    "--temp", type=o.FiniteFloat(min=0), default=0.8, show_default=True, help="Temperature; 0 is greedy."
)
@answers("--seed", type=click.IntRange(0, 2**32 - 2), help="Random seed.  [default: a new one every time]")
@answers(
    "--ctx",
    type=click.IntRange(0, 2**31 - 1),
    default=4096,
    show_default=True,
    help="Tokens of context; 0: the model's maximum.",
)
@o.routing_option
@o.threads_option
@o.printed("--quiet", is_flag=True, help="Do not show on stderr what dynamic routing saved.")
def command(
    model: Path, max_tokens: int, temp: float, seed: int | None, ctx: int, threads: int | None, **options: Any
) -> None:
    """Chat with MODEL, or complete one prompt.

    Uses the model's chat template if it has one; otherwise the text is continued. In the interactive chat
    Ctrl-C stops an answer, /reset forgets the conversation, /stats shows what dynamic routing saved, and
    /exit or Ctrl-D leaves. A line that ends with \\ goes on in the next one, and so does what begins with
    three quotation marks, up to the next three. At the end the saving is printed on stderr.
    """
    from mc_gguf.run.chat import Sampling, chat

    chat(model, sampling=Sampling(max_tokens, temp, seed), n_ctx=ctx, n_threads=threads, **options)
