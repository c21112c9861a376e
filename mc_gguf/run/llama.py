"""Llama: llama_cpp.Llama on the patched runtime, with dynamic expert routing. All of its methods work.

    from mc_gguf import Llama
    llm = Llama("model.gguf", n_ctx=2048)
    print(llm("Once upon a time", max_tokens=32)["choices"][0]["text"])
    llm.routing = "threshold:threshold=0.5"      # from the next token on
    print(llm.routing_stats())

Importing this module loads the runtime and checks its patch set; RuntimeBuildError says what to run when
that fails.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Generator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.artifacts import Calibration
from mc_gguf.common.downloads import HEAD_BYTES, placeholder
from mc_gguf.common.errors import FormatError, LlamaError, McError, SourceError, about
from mc_gguf.common.machine import usable_cores
from mc_gguf.container import expert_bytes, has_own_keys, read_routing
from mc_gguf.ggml.gguf_file import MAGIC, read_header
from mc_gguf.ggml.shards import check_first
from mc_gguf.routing import Routing, RoutingMetadata, RoutingStats, resolve
from mc_gguf.run import routing_api
from mc_gguf.run.arguments import check_metadata, check_names, check_options, check_sampling, to_seed
from mc_gguf.run.closed import closed_type
from mc_gguf.runtime.llama_library import ChatFormatter, check_tokens, listen, llama_cpp, reason, to_utf8

LogitsProcessorList = llama_cpp.LogitsProcessorList

CONTEXT_STEP = 256  # tokens


class Llama(llama_cpp.Llama):
    """A llama_cpp.Llama that is quiet, uses all cores, and has a new seed each time by default.

    Args:
        model_path: a GGUF file, plain or mixed-expert.
        routing: a Routing or its text (Routing.parse). "auto" does what the file says.
        chat_template: a Jinja template for chats, in place of the file's.
        verbose: print llama.cpp's log.
        options: all other keyword arguments are those of llama_cpp.Llama.

    Raises:
        SourceError: there is no such file.
        FormatError: llama.cpp cannot load it, for the reason that the message gives.
        LlamaError: an argument is out of range. All methods raise it, too, for arguments that llama.cpp would
            answer with the end of the process, and after close().
        McError: the routing does not fit the model.

    A Llama has one context. Calls from several threads wait for each other; a stream whose context another
    call has used since raises LlamaError when it is continued.

    With policy odp the runtime measures how much attention each token of a prompt receives within the part
    of the prompt that is computed at once (n_ubatch tokens). Without flash attention it reads the softmax
    that is there anyway. With flash_attn=True it computes the same sums from queries and keys: the measure
    stays exact, and the prompt takes a little longer. Generated tokens come one at a time and cost nothing
    extra either way.
    """

    _lock: threading.RLock

    def __new__(cls, *_arguments: Any, **_options: Any) -> Llama:
        made = super().__new__(cls)
        made._stack = contextlib.ExitStack()  # what close() needs, also after an __init__ that raised early
        made._lock = threading.RLock()
        return made

    def __init__(
        self,
        model_path: str | Path,
        *,
        routing: Routing | str = "off",
        chat_template: str | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        path = Path(model_path)
        check_file(path)
        with about("routing"):
            wanted_routing = Routing.of(routing)
        self._changes = 0  # of the context, so that a stream notices when it is not its own any more
        self._failure: BaseException | None = None  # of a logits processor, until it can be raised
        self.chat_template = chat_template
        check_names(options, inspect.signature(super().__init__).parameters)  # llama_cpp ignores others
        self._open(path, verbose, _with_defaults(options))
        try:
            if chat_template is not None:
                self._use_template(chat_template)
            self._routing = Routing("off")
            with about("routing"):
                self.routing = wanted_routing
        except McError:
            self.close()
            raise

    def _open(self, path: Path, verbose: bool, options: dict[str, Any]) -> None:
        adapter = options.get("lora_path")
        if adapter is not None:
            check_file(Path(adapter))
            options["lora_path"] = str(adapter)
        listen()
        try:
            super().__init__(str(path), verbose=verbose, **options)
            self._fit_arrays()
        except MemoryError as error:  # numpy's, for scores
            raise LlamaError(
                f"{path}: there is too little memory for the logits ({error}); take a smaller context, or do "
                "without logits_all and speculative decoding",
                parameter="ctx",
            ) from error
        except (ValueError, RuntimeError) as error:
            is_about_the_file = str(error).startswith("Failed to ")
            if not is_about_the_file:  # but about an argument
                raise
            why = reason() or str(error)
            if "context" in str(error) and "GGML_ASSERT" in why:  # memory that is missing asserts nothing
                stored = {key: found.value for key, found in read_header(path).kv.items()}
                check_metadata(stored | (options.get("kv_overrides") or {}))
                raise FormatError(f"{path}: llama.cpp cannot compute with such a model ({why})") from error
            if "context" in str(error):
                raise LlamaError(
                    f"{path}: llama.cpp cannot make the context ({why}); there may be too "
                    "little memory, of which a smaller context needs less",
                    parameter="ctx",
                ) from error
            about_adapter = adapter is not None and "LoRA" in str(error)
            raise FormatError(f"{adapter if about_adapter else path}: {why}") from error

    def _fit_arrays(self) -> None:
        """llama_cpp sizes its arrays by the context that was asked for, which llama.cpp rounds up to a
        multiple of 256, and forgets that speculative decoding needs all logits.
        """
        n_ctx = self.n_ctx()
        self.input_ids = np.zeros((n_ctx,), dtype=np.intc)
        rows = n_ctx if self._logits_all else self.n_batch
        self.scores = np.zeros((rows, self._n_vocab), dtype=np.single)

    def _use_template(self, template: str) -> None:
        model = self._model
        formatter = ChatFormatter(
            template=template,
            eos_token=model.token_get_text(self.token_eos()) if self.token_eos() != -1 else "",
            bos_token=model.token_get_text(self.token_bos()) if self.token_bos() != -1 else "",
            stop_token_ids=[self.token_eos()],
        )
        formatter.check()
        self.chat_format = "chat_template.default"
        self._chat_handlers[self.chat_format] = formatter.to_chat_handler()

    def check_template(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Raises LlamaError when the chat template does not compile, or makes no prompt of these messages."""
        formatter = getattr(self._chat_handlers.get(self.chat_format or ""), "formatter", None)
        if formatter is not None:
            formatter(messages=messages)

    def close(self) -> None:
        """Free the model. Everything but close() raises LlamaError from now on."""
        with self._lock:
            super().close()
            self.__class__ = closed_type(type(self))  # type: ignore[arg-type]  # a class is hashable

    def __del__(self) -> None:
        self._stack.close()

    def set_seed(self, seed: int | None) -> None:
        """The seed of what is generated next; None and -1: a random one."""
        self._seed = to_seed(seed)

    def eval(self, tokens: Sequence[int]) -> None:
        """Compute `tokens`, which follow those in the context."""
        with self._lock:
            check_tokens(tokens, self._n_vocab)
            if self.n_tokens + len(tokens) > self._n_ctx:
                raise LlamaError(
                    f"the context of {self._n_ctx} tokens is full: {self.n_tokens} are in it, {len(tokens)} "
                    "more do not fit"
                )
            self._changes += 1
            listen()
            try:
                super().eval(tokens)
            except RuntimeError as error:
                raise LlamaError(f"{error}: {reason()}" if reason() else str(error)) from error

    def reset(self) -> None:
        """Forget what is in the context."""
        with self._lock:
            self._changes += 1
            super().reset()  # type: ignore[no-untyped-call]  # llama_cpp has few types

    def load_state(self, state: Any) -> None:
        """Continue from what save_state() returned, on this model with the same context."""
        with self._lock:
            if state.scores.shape[1] != self._n_vocab or state.input_ids.shape != self.input_ids.shape:
                raise LlamaError("this state is of another model, or of a context of another size")
            if state.scores.shape != self.scores[: state.n_tokens].shape or state.n_tokens < 0:
                raise LlamaError("this state is damaged: it has not the logits of its tokens")
            self._changes += 1
            try:
                super().load_state(state)
            except RuntimeError as error:
                raise LlamaError(f"{error}: it is damaged, or of another model") from error

    def embed(self, input: str | list[str], *arguments: Any, **options: Any) -> Any:
        """Embeddings of one text or several. Raises LlamaError when the model was opened without
        embedding=True, and for a text without tokens.
        """
        with self._lock:
            if not self.context_params.embeddings:
                raise LlamaError("open the model with embedding=True for embeddings")
            if int(self.pooling_type()) == llama_cpp.LLAMA_POOLING_TYPE_RANK:
                raise LlamaError(
                    "pooling_type RANK gives scores and not embeddings, which cannot be read here"
                )
            if not input:
                raise LlamaError("there is no text to embed")
            for text in [input] if isinstance(input, str) else input:
                if not self.tokenize(text.encode("utf-8")):
                    raise LlamaError("an empty text has no embedding with this model")
            self._changes += 1
            return super().embed(input, *arguments, **options)

    def sample(self, *arguments: Any, **options: Any) -> int:
        """The next token, from the logits of the last one that was computed."""
        with self._lock:
            if self.n_tokens == 0:
                raise LlamaError(
                    "nothing has been computed yet: the prompt is empty, and this model adds no BOS"
                )
            token = int(super().sample(*arguments, **options))
            if (failure := self._failure) is not None:
                self._failure = None
                raise failure
            return token

    def generate(self, tokens: Sequence[int], *arguments: Any, **options: Any) -> Generator[int, Any, None]:
        """Tokens that continue `tokens`, one at a time, as those of llama_cpp."""
        if self.context_params.embeddings:
            raise LlamaError("this model was opened with embedding=True, so it generates nothing")
        stream = super().generate(tokens, *arguments, **options)
        changes, given = None, None
        with contextlib.closing(stream):
            while True:
                with self._lock:
                    if changes not in (None, self._changes):
                        raise LlamaError(
                            "another call has used this Llama's context since, so this stream cannot go on; "
                            "finish one before the next, or load the model twice"
                        )
                    try:
                        token = stream.send(given)
                    except StopIteration:
                        return
                    changes = self._changes
                given = yield token

    def create_completion(
        self, prompt: Any, suffix: str | None = None, *arguments: Any, **options: Any
    ) -> Any:
        """As that of llama_cpp, but a logit_bias for a token that does not exist is an error, and so is a
        suffix: llama_cpp puts token 0 where the tokens for infilling belong.
        """
        if suffix is not None:
            raise LlamaError("suffix is not supported; write the prompt in your model's format for infilling")
        if bias := options.pop("logit_bias", None):
            options["logits_processor"] = self._biased(bias, options.get("logits_processor"))
        if isinstance(prompt, str):
            to_utf8(prompt)
        with self._lock:
            return super().create_completion(prompt, None, *arguments, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """create_completion."""
        return self.create_completion(*arguments, **options)

    def create_chat_completion(self, *arguments: Any, **options: Any) -> Any:
        """As that of llama_cpp."""
        with self._lock:
            return super().create_chat_completion(*arguments, **options)

    def save_state(self) -> Any:
        """What is in the context, for load_state()."""
        with self._lock:
            return super().save_state()

    def _biased(self, bias: Mapping[Any, Any], others: Any) -> LogitsProcessorList:
        tokens = [int(token) for token in bias]
        check_tokens(tokens, self._n_vocab)
        amounts = np.array([float(amount) for amount in bias.values()], dtype=np.single)

        def add(_ids: Any, scores: NDArray[np.single]) -> NDArray[np.single]:
            scores = scores.copy()
            scores[tokens] += amounts
            return scores

        return LogitsProcessorList([*(others or []), add])

    def _init_sampler(self, **options: Any) -> Any:  # type: ignore[override]  # llama_cpp gives all by name
        check_sampling(options)
        if options.get("logits_processor") is not None:
            options["logits_processor"] = [partial(self._processed, options["logits_processor"])]
        return super()._init_sampler(**options)

    def _processed(self, processors: Any, ids: Any, scores: Any) -> Any:
        """`scores` after the processors. C calls it and would drop an exception: sample() raises that."""
        try:
            for process in processors:
                scores = process(ids, scores)
        except BaseException as error:  # noqa: BLE001  sample() raises it
            self._failure = error
        return scores

    @property
    def routing(self) -> Routing:
        """The routing that was set last; "auto" has become odp or off.

        A new one, which may be text, holds from the next token on; the context with all that was computed
        stays. When it does not fit the model, setting it raises McError and changes nothing.
        """
        return self._routing

    @routing.setter
    def routing(self, routing: Routing | str) -> None:
        wanted = Routing.of(routing)
        context = self.ctx
        metadata = None if wanted.policy == "off" else self._routing_metadata
        wanted = wanted.settled(metadata)
        calibration = None if wanted.calibration is None else Calibration.load(Path(wanted.calibration))
        params = resolve(wanted, metadata, routing_api.routing_shape(context), calibration)
        if wanted != self._routing or wanted.policy != "off":  # a new context is off already
            routing_api.set_routing(context, params)
        self._routing = wanted

    def routing_stats(self) -> RoutingStats:
        """What was routed and dropped since the model was loaded or reset_routing_stats() was called."""
        context = self.ctx
        slots, experts = routing_api.read_counters(context)
        return RoutingStats.of(slots, experts, self._expert_bytes)

    def reset_routing_stats(self) -> None:
        """Start counting from zero again. The routing stays as it is."""
        routing_api.reset_counters(self.ctx)

    @cached_property
    def _expert_bytes(self) -> NDArray[np.int64]:
        shape = routing_api.routing_shape(self.ctx)
        return expert_bytes(Path(self.model_path), shape.n_layer, shape.n_expert)

    @cached_property
    def _routing_metadata(self) -> RoutingMetadata | None:
        """What the file says about routing.

        Only a file that mc_gguf wrote is read here once more: for others that would be slow, and our reader
        is stricter than llama.cpp.
        """
        has_experts = routing_api.routing_shape(self.ctx).n_expert > 0  # not with vocab_only
        return read_routing(Path(self.model_path)) if has_experts and has_own_keys(self.metadata) else None

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return state | {"routing": self.routing, "chat_template": self.chat_template}


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, checked, with our defaults for those that are not given."""
    checked = {name: value for name, value in options.items() if value is not None}
    for name in ("n_threads", "n_threads_batch"):
        checked[name] = checked.get(name) or (checked.get("n_threads") or usable_cores())
    check_options(checked)
    checked["seed"] = to_seed(checked.get("seed"))
    if checked.get("n_ctx"):  # llama_cpp allocates n_batch rows of logits
        checked["n_batch"] = min(
            checked.get("n_batch", 512), -(-checked["n_ctx"] // CONTEXT_STEP) * CONTEXT_STEP
        )
    return checked


def check_file(path: Path) -> None:
    """Raises SourceError unless `path` is a readable file, FormatError unless it begins like a GGUF,
    and when it is a shard other than the first, or others are missing.
    """
    if not path.exists():
        raise SourceError(
            f"{path}: no such file; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    if path.is_dir():
        raise SourceError(
            f"{path} is a directory; give the path of a GGUF, for instance one made by mc-gguf convert"
        )
    if not path.is_file():
        raise SourceError(f"{path} is not a regular file; give the path of a GGUF")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if what := placeholder(head):
        raise FormatError(f"{path} {what}")
    if not head.startswith(MAGIC):
        raise FormatError(f"{path} is not a GGUF: it begins with {head[:4]!r}, not {MAGIC!r}")
    check_first(path)
