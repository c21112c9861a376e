"""Talk with a model in the terminal: one prompt, or a conversation with history.

A model with a chat template gets messages in that template; a base model, which has none, continues the
running text. Ctrl-C stops an answer (what was said so far stays in the history), Ctrl-D or /exit leaves.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from mc_gguf.common.errors import McError

if TYPE_CHECKING:
    from mc_gguf.run.llama import Llama

HELP = (
    "/reset forgets the conversation, /stats shows what dynamic routing saved, /exit or Ctrl-D leaves, "
    "Ctrl-C stops an answer."
)
DEFAULT_CONTEXT = 4096  # tokens; a model's own maximum may need gigabytes of cache


@dataclass(frozen=True)
class Sampling:
    """How answers are generated: temperature 0 is greedy, seed None is a new one each time."""

    max_tokens: int = 256
    temperature: float = 0.8
    seed: int | None = None


@dataclass
class Conversation:
    """The history of one conversation, as messages (chat template) or as text (none)."""

    llm: Llama
    sampling: Sampling = Sampling()
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def has_template(self) -> bool:
        return "tokenizer.chat_template" in self.llm.metadata

    def reset(self) -> None:
        self.messages.clear()
        self.text = ""

    def answer(self, prompt: str) -> Iterator[str]:
        """The pieces of the answer to `prompt`. McError when history and prompt do not fit the context.

        The history is extended also when the iterator is closed early; it is unchanged after an error.
        """
        pieces: list[str] = []
        stream = self._chat(prompt) if self.has_template else self._complete(self.text + prompt)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        except (ValueError, RuntimeError) as error:  # llama_cpp's ways to say that the context is full
            pieces.clear()
            raise McError(f"{error}: shorten the prompt, /reset, or give a larger --ctx") from error
        finally:
            if pieces:
                self._remember(prompt, "".join(pieces))

    def _chat(self, prompt: str) -> Iterator[str]:
        messages: Any = [*self.messages, {"role": "user", "content": prompt}]
        stream: Any = self.llm.create_chat_completion(messages, stream=True, **self._options())
        for chunk in stream:
            yield chunk["choices"][0]["delta"].get("content") or ""

    def _complete(self, text: str) -> Iterator[str]:
        stream: Any = self.llm.create_completion(text, stream=True, **self._options())
        for chunk in stream:
            yield chunk["choices"][0]["text"]

    def _options(self) -> dict[str, Any]:
        options = self.sampling
        return {"max_tokens": options.max_tokens, "temperature": options.temperature, "seed": options.seed}

    def _remember(self, prompt: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        self.text += prompt + answer


def chat(
    model: Path,
    prompt: str | None,
    sampling: Sampling,
    n_ctx: int = DEFAULT_CONTEXT,
    n_threads: int | None = None,
    routing: str = "off",
) -> None:
    """Loads the model and answers `prompt` on stdout, or talks until the user leaves when there is none. At
    the end what dynamic routing (`routing`, see Routing.parse) saved goes to stderr.
    """
    from mc_gguf.run.llama import Llama

    with contextlib.closing(Llama(model, n_ctx=n_ctx, n_threads=n_threads, routing=routing)) as llm:
        conversation = Conversation(llm, sampling)
        try:
            if prompt is not None:
                say(conversation, prompt, sys.stdout)
            else:
                talk(conversation, sys.stdout)
        finally:
            if llm.routing.policy != "off":
                with contextlib.suppress(McError):  # which would hide why the chat ended
                    sys.stderr.write(f"{saving(llm)}\n")


def saving(llm: Llama) -> str:
    """One line on what dynamic routing saved."""
    policy = llm.routing.policy
    return f"Routing {policy}" if policy == "off" else f"Routing {policy}: {llm.routing_stats()}"


def say(conversation: Conversation, prompt: str, out: TextIO) -> None:
    """Writes the answer to `out` as it is generated, and a newline after it."""
    with contextlib.closing(conversation.answer(prompt)) as pieces:  # type: ignore[type-var]  # a generator: it has close
        try:
            for piece in pieces:
                out.write(piece)
                out.flush()
        finally:
            out.write("\n")
            out.flush()


def talk(conversation: Conversation, out: TextIO) -> None:
    """The interactive loop. Returns when the user leaves."""
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
    """A line from the user; "" after Ctrl-C, None at the end of input."""
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
    except McError as error:  # the conversation goes on: the user can /reset
        out.write(f"Error: {error}\n")
