"""Talk with a model in the terminal: one prompt, or a conversation (conversation.py).

Ctrl-C stops an answer, of which the history keeps what was said so far; at the prompt it leaves, as Ctrl-D
and /exit do. prompt.py reads what the user types.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import McError, SourceError, about
from mc_gguf.common.machine import threads_for_now
from mc_gguf.common.texts import decode, read_bytes
from mc_gguf.run.conversation import Conversation, Sampling
from mc_gguf.run.prompt import as_text, read_all, read_message

if TYPE_CHECKING:
    from mc_gguf.run.llama import Llama

__all__ = ["DEFAULT_CONTEXT", "HELP", "Sampling", "chat", "say", "talk"]

HELP = (
    "/reset forgets the conversation, /stats shows what dynamic routing saved, /exit, Ctrl-C or Ctrl-D "
    "leaves, and Ctrl-C stops an answer. A \\ at the end of a line continues it on the next; "
    '""" begins and ends several lines.'
)
DEFAULT_CONTEXT = 4096  # tokens; a model's own maximum may need gigabytes for its cache
STDIN = "-"


def chat(
    model: Path,
    prompt: str | None,
    sampling: Sampling,
    n_ctx: int = DEFAULT_CONTEXT,
    n_threads: int | None = None,
    routing: str = "off",
    quiet: bool = False,
    system: str | None = None,
    template: Path | None = None,
    raw: bool = False,
) -> None:
    """Load the model and answer `prompt` on stdout; without a prompt, talk until the user leaves.

    `system` is what the model is told first. "-" as the prompt or as `system` stands for the text on stdin.
    `template` is a file with a Jinja template in place of the model's; `raw` uses none.
    Without `n_threads`, as many threads run as cores are free now.

    At the end, one line on stderr says what dynamic routing saved, unless `routing` (see Routing.parse) is
    off, or `quiet` is set.
    """
    if template is not None and raw:
        raise McError("these exclude each other; give one of them", parameter=("template", "raw"))
    prompt, system = _texts(prompt, system)
    source = None if template is None else _read_template(template)
    from mc_gguf.run.llama import Llama
    from mc_gguf.run.opening import check_file

    check_file(model)
    threads = threads_for_now(n_threads)
    llama = Llama(model, n_ctx=n_ctx, n_threads=threads, routing=routing, chat_template=source)
    with contextlib.closing(llama) as llm:
        conversation = Conversation(llm, sampling, system, raw)
        conversation.check()
        try:
            if prompt is not None:
                say(conversation, prompt, sys.stdout)
            else:
                talk(conversation, sys.stdout)
        finally:
            if llm.routing.policy != "off" and not quiet:
                with contextlib.suppress(McError):  # it would hide why the chat ended
                    sys.stderr.write(f"{saving(llm)}\n")


def _texts(prompt: str | None, system: str | None) -> tuple[str | None, str | None]:
    """Both, with what is on stdin in the place of "-"."""
    if system == STDIN and prompt in (None, STDIN):
        raise McError(
            "- is the text on stdin; give the prompt in another way", parameter=("system", "prompt")
        )
    if sys.stdin is None and (prompt in (None, STDIN) or system == STDIN):
        raise McError("stdin is closed, so nothing can be typed; give a prompt", parameter="prompt")
    return _text(prompt, "prompt"), _text(system, "system")


def _text(argument: str | None, parameter: str) -> str | None:
    if argument is None:
        return None
    with about(parameter):
        return read_all() if argument == STDIN else as_text(argument)


def _read_template(path: Path) -> str:
    what = "the template"
    data = read_bytes(path, what)
    if instead := placeholder(data[:HEAD_BYTES]):
        raise SourceError(f"{what} {path} {instead}")
    return decode(data, path, what)


def saving(llm: Llama) -> str:
    """One line on what dynamic routing saved."""
    policy = llm.routing.policy
    return f"Routing {policy}" if policy == "off" else f"Routing {policy}: {llm.routing_stats()}"


def say(conversation: Conversation, prompt: str, out: TextIO) -> None:
    """Write the answer to `out` while it is generated, and a newline after what was written."""
    begun = False
    with contextlib.closing(conversation.answer(prompt)) as pieces:
        try:
            for piece in pieces:
                out.write(piece)
                out.flush()
                begun = True
            begun = True
        finally:
            if begun:
                out.write("\n")
                out.flush()


def talk(conversation: Conversation, out: TextIO) -> None:
    """The interactive loop, until the user leaves."""
    with contextlib.suppress(ImportError):  # line editing and history, where Python has it
        import readline  # noqa: F401  importing it is what switches it on
    out.write(f"{HELP}\n")
    while (message := read_message(out)) is not None:
        match message.rstrip():
            case blank if not blank.strip():
                continue
            case "/exit":
                return
            case "/reset":
                conversation.reset()
            case "/stats":
                out.write(f"{saving(conversation.llm)}\n")
            case "/help":
                out.write(f"{HELP}\n")
            case command if _is_command(message):
                out.write(f"There is no {command}. {HELP} A line that begins with a space is a message.\n")
            case _:
                _answer_once(conversation, message, out)


def _is_command(message: str) -> bool:
    """Whether this was meant as a command: /word and nothing else, so that paths are messages."""
    return message.startswith("/") and message.strip().removeprefix("/").isalpha()


def _answer_once(conversation: Conversation, message: str, out: TextIO) -> None:
    try:
        say(conversation, message, out)
    except KeyboardInterrupt:
        out.write("(stopped)\n")
    except McError as error:  # the conversation goes on, for the user can /reset
        out.write(f"Error: {error}\n")
