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
from mc_gguf.common.errors import FormatError, LlamaError, McError, about
from mc_gguf.container import expert_bytes, has_own_keys, read_routing
from mc_gguf.routing import Routing, RoutingMetadata, RoutingStats, resolve
from mc_gguf.run import routing_api, turns
from mc_gguf.run.arguments import check_names, check_sampling, to_seed
from mc_gguf.run.opening import no_context, to_file, with_defaults
from mc_gguf.run.requests import as_scores, biased, check_chat, check_completion, check_state
from mc_gguf.run.turns import computing, in_turn
from mc_gguf.runtime.closed import closed_type
from mc_gguf.runtime.llama_library import (
    ChatFormatter,
    check_tokens,
    ignored_override,
    listen,
    llama_cpp,
    reason,
    to_path,
    to_utf8,
)


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
    _in_callback: bool  # of a logits processor

    def __new__(cls, *_arguments: Any, **_options: Any) -> Llama:
        made = super().__new__(cls)
        made._stack = contextlib.ExitStack()  # what close() needs, also after an __init__ that raised early
        turns.register(made)
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
        path = to_file("model_path", model_path)
        with about("routing"):
            wanted_routing = Routing.of(routing)
        self._changes = 0  # of the context, so that a stream notices when it is not its own any more
        self._failure: BaseException | None = None  # of a logits processor, until it can be raised
        self.chat_template = chat_template
        check_names(options, inspect.signature(super().__init__).parameters)  # llama_cpp ignores others
        self._open(path, verbose, with_defaults(options))
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
            options["lora_path"] = to_path(to_file("lora_path", adapter))
        listen()
        try:
            super().__init__(str(path), verbose=verbose, **options)
            self._seed = options["seed"]  # llama_cpp takes 0 for none
            self._fit_arrays()
        except MemoryError as error:  # numpy's, for scores
            raise LlamaError(
                f"{path}: there is too little memory for the logits ({error}); take a smaller context or "
                "n_batch, or do without logits_all and speculative decoding",
                parameter="ctx",
            ) from error
        except (ValueError, RuntimeError) as error:
            is_about_the_file = str(error).startswith("Failed to ")
            if not is_about_the_file:  # but about an argument
                raise
            why = reason() or str(error)
            if str(error).startswith("Failed to create llama_context"):
                raise no_context(path, why, options) from error
            about_adapter = str(error).startswith(("Failed to initialize LoRA", "Failed to set LoRA"))
            raise FormatError(f"{adapter if about_adapter else path}: {why}") from error
        if wrong := ignored_override():
            self.close()
            raise LlamaError(f"kv_overrides: {wrong}")

    def _fit_arrays(self) -> None:
        """llama_cpp sizes its arrays by the context that was asked for, which llama.cpp rounds up to a
        multiple of 256, and forgets that speculative decoding needs all logits.
        """
        n_ctx = self.n_ctx()
        self.input_ids = np.zeros((n_ctx,), dtype=np.intc)
        self.last_n_tokens_size = min(self.last_n_tokens_size, n_ctx)
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
            if self._in_callback:
                raise LlamaError("a logits processor cannot close the Llama that calls it")
            super().close()
            self.__class__ = closed_type(type(self))  # type: ignore[arg-type]  # a class is hashable

    def __del__(self) -> None:
        self._stack.close()

    def set_seed(self, seed: int | None) -> None:
        """The seed of what is generated next; None and -1: a random one."""
        self._seed = to_seed(seed)

    @computing
    def eval(self, tokens: Sequence[int]) -> None:
        """Compute `tokens`, which follow those in the context."""
        tokens = check_tokens(tokens, self._n_vocab)
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise LlamaError(
                f"the context of {self._n_ctx} tokens is full: {self.n_tokens} are in it, {len(tokens)} "
                "more do not fit"
            )
        self._check_computable()
        self._changes += 1
        listen()
        try:
            super().eval(tokens)
        except RuntimeError as error:
            raise LlamaError(f"{error}: {reason()}" if reason() else str(error)) from error

    def _check_computable(self) -> None:
        if self.model_params.vocab_only:
            raise LlamaError("this model was opened with vocab_only=True, so it computes nothing")
        turns.check_threads(max(self.n_threads, self.n_threads_batch))

    @computing
    def reset(self) -> None:
        """Forget what is in the context."""
        self._changes += 1
        super().reset()  # type: ignore[no-untyped-call]  # llama_cpp has few types

    @computing
    def load_state(self, state: Any) -> None:
        """Continue from what save_state() returned, on this model with the same context. When that fails, the
        context is empty.
        """
        check_state(state, self)
        self._changes += 1
        try:
            super().load_state(state)
            n_cached = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.ctx), 0) + 1
            if n_cached < state.n_tokens:
                raise ValueError(f"keys and values of {n_cached} tokens instead of {state.n_tokens}")
        except (RuntimeError, ValueError, LlamaError) as error:
            self.reset()
            raise LlamaError(f"{error}: the state is damaged, or of another model") from error

    @computing
    def embed(self, input: str | list[str], *arguments: Any, **options: Any) -> Any:
        """Embeddings of one text or several. Raises LlamaError when the model was opened without
        embedding=True, and for a text without tokens.
        """
        if not self.context_params.embeddings:
            raise LlamaError("open the model with embedding=True for embeddings")
        if int(self.pooling_type()) == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            raise LlamaError("pooling_type RANK gives scores and not embeddings, which cannot be read here")
        self._check_computable()
        texts = [input] if isinstance(input, str) else input
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise LlamaError("give a text, or a list of texts, to embed")
        for text in texts:
            if not self.tokenize(to_utf8(text)):
                raise LlamaError("an empty text has no embedding with this model")
        self._changes += 1
        return super().embed(input, *arguments, **options)

    @computing
    def sample(self, *arguments: Any, **options: Any) -> int:
        """The next token, from the logits of the last one that was computed."""
        if self.n_tokens == 0:
            raise LlamaError("nothing has been computed yet: the prompt is empty, and this model adds no BOS")
        if self._requires_eval:  # a state that was loaded has no logits
            self.n_tokens -= 1
            self.eval([int(self.input_ids[self.n_tokens])])
        sampler = self._sampler
        try:
            token = int(super().sample(*arguments, **options))
        finally:
            self._sampler = sampler
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        return token

    def generate(self, tokens: Sequence[int], *arguments: Any, **options: Any) -> Generator[int, Any, None]:
        """Tokens that continue `tokens`, one at a time, as those of llama_cpp."""
        if self.context_params.embeddings:
            raise LlamaError("this model was opened with embedding=True, so it generates nothing")
        stream = super().generate(check_tokens(tokens, self._n_vocab), *arguments, **options)
        changes, given, sampler = None, None, None
        with contextlib.closing(stream):
            while True:
                with self._lock:
                    if changes not in (None, self._changes):
                        raise LlamaError(
                            "another call has used this Llama's context since, so this stream cannot go on; "
                            "finish one before the next, or load the model twice"
                        )
                    others, self._sampler = self._sampler, sampler
                    try:
                        token = stream.send(given)
                    except StopIteration:
                        return
                    finally:  # sample() has its own
                        sampler, self._sampler = self._sampler, others
                    changes = self._changes
                given = yield token

    def create_completion(self, *arguments: Any, **options: Any) -> Any:
        """As that of llama_cpp, but what it would ignore is an error: a logit_bias for a token that does not
        exist, a stop that is no text, and a suffix, for which it puts token 0 where the tokens for infilling
        belong.
        """
        given = _COMPLETION.bind(self, *arguments, **options).arguments
        del given["self"]
        if given.get("suffix") is not None:
            raise LlamaError("suffix is not supported; write the prompt in your model's format for infilling")
        check_completion(given)
        if bias := given.pop("logit_bias", None):
            given["logits_processor"] = [*(given.get("logits_processor") or ()), biased(bias, self._n_vocab)]
        prompt = given["prompt"]
        if isinstance(prompt, str):
            to_utf8(prompt)
        else:
            given["prompt"] = check_tokens(prompt, self._n_vocab)
        with self._lock:
            return super().create_completion(**given)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """create_completion."""
        return self.create_completion(*arguments, **options)

    def create_chat_completion(self, *arguments: Any, **options: Any) -> Any:
        """As that of llama_cpp, but what it would ignore is an error."""
        given = _CHAT.bind(self, *arguments, **options).arguments
        check_chat(given)
        del given["self"]
        with self._lock:
            return super().create_chat_completion(**given)

    def _init_sampler(self, **options: Any) -> Any:  # type: ignore[override]  # llama_cpp gives all by name
        check_sampling(options)
        if options.get("logits_processor") is not None:
            options["logits_processor"] = [partial(self._processed, options["logits_processor"])]
        return super()._init_sampler(**options)

    def _processed(self, processors: Any, ids: Any, scores: Any) -> Any:
        """`scores` after the processors. C calls it and would drop an exception: sample() raises that."""
        self._in_callback, found = True, scores
        try:
            for process in processors:
                found = as_scores(process(ids, found), scores)
        except BaseException as error:  # noqa: BLE001  sample() raises it
            self._failure = error
            return scores
        finally:
            self._in_callback = False
        return found

    @property
    def routing(self) -> Routing:
        """The routing that was set last; "auto" has become odp or off.

        A new one, which may be text, holds from the next token on; the context with all that was computed
        stays. When it does not fit the model, setting it raises McError and changes nothing.
        """
        return self._routing

    @routing.setter
    @computing
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

    @in_turn
    def routing_stats(self) -> RoutingStats:
        """What was routed and dropped since the model was loaded or reset_routing_stats() was called."""
        context = self.ctx
        slots, experts = routing_api.read_counters(context)
        return RoutingStats.of(slots, experts, self._expert_bytes)

    @computing
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


_COMPLETION = inspect.signature(llama_cpp.Llama.create_completion)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)

# What is not written above: a model that another thread closes meanwhile must not be read.
for _name, _method in vars(llama_cpp.Llama).items():
    if inspect.isfunction(_method) and not _name.startswith("_") and _name not in vars(Llama):
        setattr(Llama, _name, in_turn(_method))
