"""Talk with a model in the terminal: one prompt, or a conversation (conversation.py).

Ctrl-C stops an answer, of which the history keeps what was said so far; Ctrl-D or /exit leaves.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mc_gguf.common.errors import McError
from mc_gguf.common.machine import threads_for_now
from mc_gguf.run.conversation import Conversation, Sampling

if TYPE_CHECKING:
    from mc_gguf.run.llama import Llama

__all__ = ["DEFAULT_CONTEXT", "HELP", "Sampling", "chat", "say", "talk"]

HELP = (
    "/reset forgets the conversation, /stats shows what dynamic routing saved, /exit or Ctrl-D leaves, "
    "and Ctrl-C stops an answer."
)
DEFAULT_CONTEXT = 4096  # tokens; a model's own maximum may need gigabytes for its cache


def chat(
    model: Path,
    prompt: str | None,
    sampling: Sampling,
    n_ctx: int = DEFAULT_CONTEXT,
    n_threads: int | None = None,
    routing: str = "off",
    quiet: bool = False,
) -> None:
    """Load the model and answer `prompt` on stdout; without a prompt, talk until the user leaves.

    Without `n_threads`, as many threads run as cores are free now.

    At the end, one line on stderr says what dynamic routing saved, unless `routing` (see Routing.parse) is
    off, or `quiet` is set.
    """
    from mc_gguf.run.llama import Llama, check_file

    check_file(model)
    threads = threads_for_now(n_threads)
    with contextlib.closing(Llama(model, n_ctx=n_ctx, n_threads=threads, routing=routing)) as llm:
        conversation = Conversation(llm, sampling)
        try:
            if prompt is not None:
                say(conversation, prompt, sys.stdout)
            else:
                talk(conversation, sys.stdout)
        finally:
            if llm.routing.policy != "off" and not quiet:
                with contextlib.suppress(McError):  # it would hide why the chat ended
                    sys.stderr.write(f"{saving(llm)}\n")


def saving(llm: Llama) -> str:
    """One line on what dynamic routing saved."""
    policy = llm.routing.policy
    return f"Routing {policy}" if policy == "off" else f"Routing {policy}: {llm.routing_stats()}"


def say(conversation: Conversation, prompt: str, out: TextIO) -> None:
    """Write the answer to `out` while it is generated, and a newline after it."""
    with contextlib.closing(conversation.answer(prompt)) as pieces:
        try:
            for piece in pieces:
                out.write(piece)
                out.flush()
        finally:
            out.write("\n")
            out.flush()


def talk(conversation: Conversation, out: TextIO) -> None:
    """The interactive loop, until the user leaves."""
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401  importing it is what switches it on
    out.write(f"{HELP}\n")
    while (line := _read_line(out)) is not None:
        match line.strip():
            case "":
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
            case "/stats":
                out.write(f"{saving(conversation.llm)}\n")
            case "/help":
                out.write(f"{HELP}\n")
            case _:
                _answer_once(conversation, line, out)


def _read_line(out: TextIO) -> str | None:
    """A line from the user: "" after Ctrl-C, None at the end of the input."""
    try:
        return input("> ")
    except KeyboardInterrupt:
        out.write("\n")
        return ""
    except EOFError:
        out.write("\n")
        return None


def _answer_once(conversation: Conversation, line: str, out: TextIO) -> None:
    try:
        say(conversation, line, out)
    except KeyboardInterrupt:
        out.write("(stopped)\n")
    except McError as error:  # the conversation goes on, for the user can /reset
        out.write(f"Error: {error}\n")
