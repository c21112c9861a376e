"""HarnessModel: lm-evaluation-harness's model class over our Llama, in this process. It imports lm_eval."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mc_gguf.common.errors import McError
from mc_gguf.common.progress import progress
from mc_gguf.evaluate.sequences import Sequences
from mc_gguf.evaluate.tasks.continuations import Generation, generate, log_likelihoods

N_SEQ = 64  # sequences at once
BATCH = 512  # tokens, and so the most rows of logits
SAMPLING = frozenset({"until", "max_gen_toks", "do_sample", "temperature"})


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is optional: mypy does not read it
    """Loads the model for up to n_ctx tokens of context, less if it was trained on less. Use it in a `with`.

    Text is tokenized as transformers would: with BOS in front where the model adds one, and special tokens
    recognised. Text that is longer than the context loses its beginning.
    """

    def __init__(
        self, model: Path, n_ctx: int, routing: str = "off", n_threads: int = 0, quiet: bool = False
    ) -> None:
        super().__init__()
        self.name, self.quiet = model.name, quiet
        self.llm = Sequences(
            model,
            n_ctx=n_ctx,
            n_seq=N_SEQ,
            n_batch=BATCH,
            unified=True,
            as_trained=True,
            n_threads=n_threads,
            routing=routing,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.llm.close()

    @property
    def max_length(self) -> int:
        return self.llm.n_ctx_seq

    @property
    def eot_token_id(self) -> int:
        return int(self.llm.token_eos())

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = int(self.llm.token_bos())
        return bos if bos >= 0 else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        add_bos = self.llm.adds_bos if add_special_tokens is None else add_special_tokens
        tokens = self.llm.tokenize(string.encode(), add_bos=add_bos, special=True)
        bos = self.llm.token_bos()
        return tokens[1:] if tokens[:2] == [bos, bos] else tokens  # the text itself began with it

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        with progress(f"{self.name}: log-likelihoods", len(pairs), quiet=self.quiet) as bar:
            return log_likelihoods(self.llm, pairs, bar.advance)

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Both, cut to fit the context; at least one token of `context` is kept."""
        continuation = continuation[-self.max_length :]
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods of whole texts, each token with as much context as there is."""
        windows = [list(self._windows(request.args[0])) for request in requests]
        flat = self._loglikelihood_tokens([(None, *pair) for several in windows for pair in several])
        values = iter(value for value, _ in flat)
        return [sum(next(values) for _ in several) for several in windows]

    def _windows(self, text: str) -> Any:
        tokens = self.tok_encode(text, add_special_tokens=False)
        windows = get_rolling_token_windows(
            token_list=tokens, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return map(make_disjoint_window, windows)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Answers to all requests; those with the same options are generated together."""
        groups: dict[Generation, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._options(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        with progress(f"{self.name}: answers", len(requests), quiet=self.quiet) as bar:
            for options, members in groups.items():
                room = self.max_length - options.max_tokens
                prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
                for i, text in zip(members, generate(self.llm, prompts, options, bar.advance), strict=True):
                    answers[i] = text
        return answers

    def _options(self, arguments: dict[str, Any]) -> Generation:
        found = normalize_gen_kwargs(arguments, default_max_gen_toks=256)
        temperature = float(found.get("temperature") or 0) if found.get("do_sample") else 0.0
        if temperature and (unknown := sorted(set(found) - SAMPLING)):
            raise McError(
                f"this task samples with {', '.join(unknown)}, which eval does not know; choose another task"
            )
        max_tokens = min(int(found["max_gen_toks"]), self.max_length - 1)
        return Generation(max_tokens, tuple(found["until"]), temperature)
