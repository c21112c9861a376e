"""llama.cpp's functions and llama_cpp's wrappers around them, so that what goes wrong is an LlamaError.

A failed assertion ends the process, and so does a C++ exception, which Python cannot catch. The patched
libllama hands out functions that report both (mc_guarded in patches/src/include/mc.h). They take the place of
those that llama_cpp has loaded. What would fail without a word is checked in subclasses of llama_cpp's
wrappers, which take their places as well: llama_cpp.Llama makes them by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jinja2
import llama_cpp
import numpy as np
from llama_cpp import _internals as internals
from llama_cpp import llama_chat_format as chat_format
from numpy.typing import NDArray

from mc_gguf.common.errors import LlamaError
from mc_gguf.common.machine import memory_bytes
from mc_gguf.common.units import format_size
from mc_gguf.runtime.closed import Closed, closed_type
from mc_gguf.runtime.llama_log import listen, reason

# std::regex, which splits a text for the tokenizer, calls itself for every character that it matches, and the
# parser of grammars for every parenthesis. For regular expressions 300 to 550 bytes were measured.
_STACK_PER_BYTE = 1024
_SMALL_TEXT = 1024  # bytes, for which every thread's stack is large enough
_MAX_STACK = 1 << 40  # of the address space; only what is used takes memory
_MAX_GRAMMAR = 1 << 20  # bytes
_INT32 = 1 << 31
# The bounds of a repetition. Texts, sets of characters and comments, which may look like one, give none.
_REPETITION = re.compile(
    r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\{\s*(\d+)\s*,\s*(\d+)\s*\}', re.DOTALL
)

_api: Any = llama_cpp.llama_cpp


def install() -> None:
    """Put the guarded functions and wrappers into llama_cpp. Doing it twice does nothing."""
    if internals.LlamaModel is Model:
        return
    library = _api._lib
    library.mc_guarded.restype = ctypes.c_void_p
    library.mc_guarded.argtypes = [ctypes.c_char_p]
    library.mc_error.restype = ctypes.c_char_p
    library.mc_error.argtypes = []
    for name in [name for name in vars(_api) if name.startswith("llama_")]:
        if address := library.mc_guarded(name.encode()):
            function = _guarded(getattr(_api, name), address, library.mc_error)
            setattr(_api, name, function)
            setattr(llama_cpp, name, function)
    for module, name, ours in (
        (internals, "LlamaModel", Model),
        (internals, "LlamaContext", Context),
        (internals, "LlamaBatch", Batch),
        (internals, "LlamaSampler", Sampler),
        (chat_format, "Jinja2ChatFormatter", ChatFormatter),
    ):
        setattr(module, name, ours)


def _guarded(original: Any, address: int, error: Callable[[], bytes | None]) -> Any:
    """The function at `address`, of the type of `original`; it raises LlamaError."""

    def check(result: Any, _function: Any, _arguments: Any) -> Any:
        if (message := error()) is not None:
            raise LlamaError(f"llama.cpp failed: {_without_folder(message.decode('utf-8', 'replace'))}")
        is_null = isinstance(result, ctypes._Pointer) and not result  # llama_cpp looks for None only
        return None if is_null else result

    function = ctypes.CFUNCTYPE(original.restype, *original.argtypes)(address)
    function.errcheck = check
    return function


def _without_folder(message: str) -> str:
    """An assertion names the source file; the folder in which it was built says nothing."""
    return re.sub(r"^\S*/(?=[\w.-]+:\d+: )", "", message)


class Model(internals.LlamaModel):
    """llama_cpp's wrapper of a llama_model, without its limits on the length of a text, a token and a key."""

    def __init__(self, *, path_model: str, params: Any, verbose: bool = True) -> None:
        super().__init__(path_model=to_path(path_model), params=params, verbose=verbose)

    def close(self) -> None:
        _close(self, super().close)

    def tokenize(self, text: bytes, add_bos: bool, special: bool) -> list[int]:
        """Token ids of `text`; see tokens()."""
        found: list[int] = self.tokens(text, add_bos, special).tolist()
        return found

    def tokens(self, text: bytes, add_bos: bool, special: bool) -> NDArray[np.int32]:
        """Token ids of `text`. Raises LlamaError when the vocabulary has no tokens for it.

        add_bos: begin and end as the model wants it; special: what looks like a special token is one.
        """
        if not isinstance(text, bytes | bytearray | memoryview):
            raise LlamaError(f"tokenize() takes bytes, not {type(text).__name__}: encode the text as UTF-8")
        text = bytes(text)
        found = np.empty(len(text) + 8, dtype=np.int32)  # a token for every byte, BOS and EOS
        n_tokens = self._tokens_into(found, text, add_bos, special)
        if -_INT32 < n_tokens < 0:  # of a tokenizer that makes a text longer first
            found = np.empty(-n_tokens, dtype=np.int32)
            n_tokens = self._tokens_into(found, text, add_bos, special)
        if n_tokens < 0:
            raise LlamaError(f"llama.cpp cannot tokenize the {len(text)} bytes {_excerpt(text)}")
        return found[:n_tokens].copy()

    def _tokens_into(self, found: NDArray[np.int32], text: bytes, add_bos: bool, special: bool) -> int:
        """How many tokens there are in `found`; negative: how many there would be."""
        room = found.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        call = partial(_api.llama_tokenize, self.vocab, text, len(text), room, len(found), add_bos, special)
        try:
            return int(on_large_stack(len(text), call))
        except LlamaError as error:
            raise LlamaError(
                f"the model's vocabulary has no tokens for {_excerpt(text)} ({error})"
            ) from error

    def token_to_piece(self, token: int, special: bool = False) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        length = _api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if length < 0:
            buffer = ctypes.create_string_buffer(-length)
            length = _api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:length]

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> bytes:
        tokens = check_tokens(tokens, self.n_vocab())
        text = b"".join(self.token_to_piece(token, special) for token in tokens)
        # SentencePiece puts a space before the first word of a text.
        follows_bos = len(tokens) > 0 and tokens[0] == self.token_bos()
        return text.removeprefix(b" ") if follows_bos else text

    def token_get_text(self, token: int) -> str:
        text: bytes = _api.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", "replace")

    def metadata(self) -> dict[str, str]:
        """The metadata but for arrays. Bytes that are not UTF-8 are replaced, in the value that has them."""
        count = _api.llama_model_meta_count(self.model)
        return {
            self._text_at(_api.llama_model_meta_key_by_index, i): self._text_at(
                _api.llama_model_meta_val_str_by_index, i
            )
            for i in range(count)
        }

    def _text_at(self, function: Any, index: int) -> str:
        buffer = ctypes.create_string_buffer(256)
        length = function(self.model, index, buffer, len(buffer))
        if length >= len(buffer):  # without the zero at the end
            buffer = ctypes.create_string_buffer(length + 1)
            function(self.model, index, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")


def _close(wrapper: Any, close: Callable[[], None]) -> None:
    """Free what one of llama_cpp's wrappers holds; all else that it is asked for is an error from now on."""
    if not isinstance(wrapper, Closed):
        close()
        wrapper.__class__ = closed_type(type(wrapper))  # type: ignore[arg-type]  # a class is hashable


def to_path(path: str | os.PathLike[str]) -> str:
    """`path` as llama_cpp takes it."""
    return _Path(os.fspath(path))


class _Path(str):
    """A path that llama_cpp encodes as Python does: a name on a disk need not be UTF-8."""

    def encode(self, *_arguments: Any, **_options: Any) -> bytes:
        return os.fsencode(str(self))


class Sampler(internals.LlamaSampler):
    """llama_cpp's wrapper of a chain of samplers. A sampler that cannot be made is an error at once, where
    llama_cpp puts a null pointer into the chain.
    """

    def add_grammar(self, model: Any, grammar: Any) -> None:
        text, root = grammar._grammar.encode("utf-8"), grammar._root.encode("utf-8")
        if not text.strip() or len(text) > _MAX_GRAMMAR:
            raise LlamaError(f"the grammar has {len(text)} bytes; give one of 1 to {_MAX_GRAMMAR}")
        for least, most in _REPETITION.findall(grammar._grammar):  # for which llama.cpp loops without an end
            if least and int(least[:10]) > int(most[:10]):
                raise LlamaError(f"the grammar repeats at least {least} and at most {most} times")
        listen()
        init = partial(_api.llama_sampler_init_grammar, model.vocab, text, root)
        sampler = on_large_stack(len(text), init)
        if not sampler:
            raise LlamaError(f"the grammar cannot be used: {reason() or 'llama.cpp does not parse it'}")
        _api.llama_sampler_chain_add(self.sampler, sampler)


class Context(internals.LlamaContext):
    """llama_cpp's wrapper of a llama_context, which is not made when its cache cannot fit into memory."""

    def __init__(self, *, model: Any, params: Any, verbose: bool = True) -> None:
        n_ctx = params.n_ctx or model.n_ctx_train()
        needed = 0 if model.params.vocab_only else n_ctx * _least_cache_bytes(model.model)
        available = memory_bytes()
        if needed > available and model.params.n_gpu_layers == 0:
            self._exit_stack = contextlib.ExitStack()  # for __del__
            raise LlamaError(
                f"a context of {n_ctx} tokens takes at least {format_size(needed)}, but this machine has "
                f"{format_size(available)}; give a smaller n_ctx",
                parameter="ctx",
            )
        super().__init__(model=model, params=params, verbose=verbose)

    def close(self) -> None:
        _close(self, super().close)


class Batch(internals.LlamaBatch):
    """llama_cpp's wrapper of a llama_batch. A token of it is in one sequence: the ids of n_ctx, which
    llama_cpp asks for, would take n_batch * n_ctx * 4 bytes.
    """

    def __init__(self, *, n_tokens: int, embd: int, n_seq_max: int, verbose: bool = True) -> None:
        super().__init__(n_tokens=n_tokens, embd=embd, n_seq_max=min(n_seq_max, 1), verbose=verbose)


def _least_cache_bytes(model: Any) -> int:
    """The least that keys and values of a token take: in 4 bits, and where layers with a sliding window or a
    state of their own keep none, in one layer of eight.
    """
    heads = _api.llama_model_n_head_kv(model) / max(1, _api.llama_model_n_head(model))
    elements = 2 * _api.llama_model_n_embd(model) * heads * _api.llama_model_n_layer(model)
    is_sparse = (
        _api.llama_model_n_swa(model)
        or _api.llama_model_is_recurrent(model)
        or _api.llama_model_is_hybrid(model)
    )
    return int(elements / 2 / (8 if is_sparse else 1))


# What the expressions of a template can raise. raise_exception() of a template is a ValueError.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


class ChatFormatter(chat_format.Jinja2ChatFormatter):
    """llama_cpp's chat template. One that does not compile is an error when it is used, not when the model is
    loaded, for most of what a model does needs no template.
    """

    def __init__(self, template: str, *arguments: Any, **options: Any) -> None:
        self._error: str | None = None
        try:
            super().__init__(template, *arguments, **options)
        except _TEMPLATE_ERRORS as error:
            self._error = _one_line(error)

    def check(self) -> None:
        """Raises LlamaError when the template does not compile."""
        if self._error is not None:
            raise LlamaError(f"the chat template does not compile: {self._error}; {_OTHER_WAYS}")

    def to_chat_handler(self) -> Any:
        """llama_cpp's function that answers a chat, with this object as its attribute `formatter`."""
        handler: Any = super().to_chat_handler()
        handler.formatter = self
        return handler

    def __call__(self, **options: Any) -> Any:
        self.check()
        try:
            found = super().__call__(**options)
        except _TEMPLATE_ERRORS as error:
            raise LlamaError(f"the chat template fails: {_one_line(error)}; {_OTHER_WAYS}") from error
        if not found.prompt:
            raise LlamaError(f"the chat template makes nothing of the messages; {_OTHER_WAYS}")
        to_utf8(found.prompt)
        found.stop = [self.eos_token] if self.eos_token else []  # "" would end every answer
        return found


def to_utf8(text: str) -> bytes:
    """Raises LlamaError for a text with surrogates, which stand for bytes that were no text."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise LlamaError(
            f"the text is not UTF-8 near {around!r}; set the terminal, or whatever it came from, to "
            "UTF-8, or convert it with iconv"
        ) from error


_OTHER_WAYS = "give another template, or let the model continue plain text"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_tokens(tokens: Iterable[int], n_vocab: int) -> list[int]:
    """`tokens` as a list. Raises LlamaError unless all are ids of a vocabulary of `n_vocab` tokens."""
    if isinstance(tokens, str | bytes | bytearray) or not isinstance(tokens, Iterable):
        raise LlamaError(f"give a list of token ids, not {type(tokens).__name__}")
    found = list(tokens)
    for token in found:
        if not is_whole(token) or not 0 <= token < n_vocab:
            raise LlamaError(f"there is no token {token!r}; this model's are 0 to {n_vocab - 1}")
    return [int(token) for token in found]


def is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def on_large_stack(n_bytes: int, call: Callable[[], Any]) -> Any:
    """The result of `call`, whose recursion may be as deep as a text of `n_bytes` is long."""
    if n_bytes <= _SMALL_TEXT:
        return call()
    results: list[Any] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001  the thread that waits raises it
            failures.append(error)

    thread = threading.Thread(target=run)
    size = _STACK_PER_BYTE * n_bytes + (1 << 20)
    with _stack_size_lock:
        before = threading.stack_size(min(-(-size // 4096) * 4096, _MAX_STACK))
        try:
            thread.start()
        except RuntimeError as error:
            raise LlamaError(
                f"a text of {n_bytes} bytes needs {size} bytes of stack ({error}); cut it"
            ) from error
        finally:
            threading.stack_size(before)
    thread.join()
    for failure in failures:
        raise failure
    return results[0]


_stack_size_lock = threading.Lock()  # it is a setting of the whole process


def _excerpt(text: bytes) -> str:
    start = text[:40].decode("utf-8", "replace")
    return repr(start) if len(text) <= 40 else f"{start!r}..."
