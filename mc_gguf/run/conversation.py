"""A conversation with a model, without any terminal: history, prompts in, answers out.

A model with a chat template gets messages in that template. A base model, which has none, continues the
running text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mc_gguf.common.errors import McError, about

if TYPE_CHECKING:
    from mc_gguf.run.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """How answers are generated. Temperature 0 is greedy; with seed None every answer has a new seed."""

    max_tokens: int = 256
    temperature: float = 0.8
    seed: int | None = None


@dataclass
class Conversation:
    """One conversation with its history: as messages, or as running text.

    It is running text when the model has no chat template, or when `raw` asks for that. `system` is what the
    model is told before the first message; it needs a template.
    """

    llm: Llama
    sampling: Sampling = Sampling()
    system: str | None = None
    raw: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def has_template(self) -> bool:
        template = self.llm.chat_template or self.llm.metadata.get("tokenizer.chat_template", "")
        return not self.raw and bool(template.strip())

    def check(self) -> None:
        """Raises McError when no message can be written: the template fails, or knows no system prompt."""
        if self.has_template:
            hello = {"role": "user", "content": "Hello"}
            try:
                self.llm.check_template([*self._instructions(), hello])
            except McError as error:
                with about("template", "raw"):
                    self.llm.check_template([hello])
                raise McError(str(error), parameter=("system", "template")) from error
        elif self.system is not None:
            why = "raw text has no place for one" if self.raw else "this model has no chat template"
            raise McError(
                f"{why}; begin the prompt with it, or give a template", parameter=("system", "template")
            )

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages.clear()
        self.text = ""

    def answer(self, prompt: str) -> Generator[str, None, None]:
        """The answer to `prompt`, piece by piece.

        The history is extended even when the iterator is closed early; after an error it is as before. Raises
        McError when history and prompt do not fit the context, and what Llama raises.
        """
        pieces: list[str] = []
        stream = self._chat(prompt) if self.has_template else self._complete(self.text + prompt)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        except Exception as error:  # whatever it is, the history stays as it was
            pieces.clear()
            if isinstance(error, McError) or "exceed context window" not in str(error):
                raise
            raise McError(
                f"{error}: shorten the prompt, /reset, or give a larger context", parameter="ctx"
            ) from error
        finally:
            if pieces:
                self._remember(prompt, "".join(pieces))

    def _instructions(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _chat(self, prompt: str) -> Iterator[str]:
        messages: Any = [*self._instructions(), *self.messages, {"role": "user", "content": prompt}]
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
