"""`mc-gguf chat`: talk with a GGUF, plain or mixed-expert."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", help="Answer this and stop; without it the chat is interactive.")
@click.option(
    "-n",
    "--tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Most tokens an answer has.",
)
@click.option(
    "--temp", type=click.FloatRange(min=0), default=0.8, show_default=True, help="Temperature; 0 is greedy."
)
@click.option("--seed", type=click.IntRange(min=0), help="Same seed, same answer.  [default: random]")
@click.option(
    "--ctx",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Context in tokens; 0: the model's maximum.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads.  [default: all cores]")
@click.option(
    "--routing",
    default="off",
    show_default=True,
    metavar="R",
    help="Which experts a token may do without: off, auto (what the file says), or a policy with options: "
    "odp:target_drop=15%, odp:quantile=0.3,protect=0.05, threshold:threshold=0.5, keep_min:ratio=0.4, "
    "top_p:top_p=0.9, random:rate=0.2,seed=1.",
)
def command(
    model: Path,
    prompt: str | None,
    tokens: int,
    temp: float,
    seed: int | None,
    ctx: int,
    threads: int | None,
    routing: str,
) -> None:
    """Chat with MODEL, or complete one prompt.

    Uses the model's chat template if it has one; otherwise the text is continued. In the interactive chat
    Ctrl-C stops an answer, /reset forgets the conversation, /stats shows what dynamic routing saved, /exit or
    Ctrl-D leaves. At the end the saving is printed on stderr.
    """
    from mc_gguf.run.chat import Sampling, chat

    chat(model, prompt, Sampling(tokens, temp, seed), n_ctx=ctx, n_threads=threads, routing=routing)
