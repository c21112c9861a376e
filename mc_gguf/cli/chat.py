"""`mc-gguf chat`: talk with a GGUF, plain or mixed-expert."""

from __future__ import annotations

from pathlib import Path

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command, section

answers = section("Answers")


@click.command(cls=Command)
@click.argument("model", type=o.PATH)
@answers("-p", "--prompt", help="Answer this and stop; without it the chat is interactive.")
@answers(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Longest answer, in tokens.",
)
@answers(
    "--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, help="Temperature; 0 is greedy."
)
@answers("--seed", type=click.IntRange(min=0), help="Random seed.  [default: a new one every time]")
@answers(
    "--ctx",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Tokens of context; 0: the model's maximum.",
)
@o.routing_option
@o.threads_option
@o.printed("--quiet", is_flag=True, help="Do not show on stderr what dynamic routing saved.")
def command(
    model: Path,
    prompt: str | None,
    max_tokens: int,
    temp: float,
    seed: int | None,
    ctx: int,
    routing: str,
    threads: int | None,
    quiet: bool,
) -> None:
    """Chat with MODEL, or complete one prompt.

    Uses the model's chat template if it has one; otherwise the text is continued. In the interactive chat
    Ctrl-C stops an answer, /reset forgets the conversation, /stats shows what dynamic routing saved, and
    /exit or Ctrl-D leaves. At the end the saving is printed on stderr.
    """
    from mc_gguf.run.chat import Sampling, chat

    sampling = Sampling(max_tokens, temp, seed)
    chat(model, prompt, sampling, n_ctx=ctx, n_threads=threads, routing=routing, quiet=quiet)
