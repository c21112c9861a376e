"""A conversation with a model, without any terminal: history, prompts in, answers out.

A model with a chat template gets messages in that template. A base model, which has none, continues the
running text.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mc_gguf.common.errors import McError

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
    """One conversation with its history: as messages, or as running text when there is no chat template."""

    llm: Llama
    sampling: Sampling = Sampling()
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def has_template(self) -> bool:
        return "tokenizer.chat_template" in self.llm.metadata

    def reset(self) -> None:
        """Forget everything that was said."""
        self.messages.clear()
        self.text = ""

    def answer(self, prompt: str) -> Generator[str, None, None]:
        """The answer to `prompt`, piece by piece.

        The history is extended even when the iterator is closed early; after an error it is as before. Raises
        McError when history and prompt do not fit the context.
        """
        pieces: list[str] = []
        stream = self._chat(prompt) if self.has_template else self._complete(self.text + prompt)
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        except (ValueError, RuntimeError) as error:  # so llama_cpp says that the context is full
            pieces.clear()
            raise McError(
                f"{error}: shorten the prompt, /reset, or give a larger context", parameter="ctx"
            ) from error
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
