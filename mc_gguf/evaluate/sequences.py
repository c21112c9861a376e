"""Sequences: a Llama whose context holds several sequences, and whose batches are arrays.

llama_cpp.Llama has one sequence and copies logits row by row. Scoring needs several chunks in one batch,
logits where llama.cpp wrote them, and flash attention where llama.cpp chooses it, as in its own tools.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.common.errors import McError, about
from mc_gguf.routing import Routing
from mc_gguf.run.llama import Llama  # first: it picks the libraries that llama_cpp loads
from mc_gguf.run.opening import CONTEXT_STEP
from mc_gguf.runtime.vocabulary import token_texts, tokens_sha256

import llama_cpp  # isort: skip
from llama_cpp import _internals  # isort: skip

UBATCH = 512  # tokens computed at once; llama.cpp's default


class Sequences(Llama):
    """`n_seq` sequences with room for `n_ctx` tokens each.

    unified     they share one cache, of n_ctx tokens in all, so that a token may belong to several sequences;
                otherwise each has its own, which is faster when they have nothing in common
    as_trained  n_ctx is reduced to the context with which the model was trained, if that is less

    Raises what Llama raises, and McError when there is too little memory.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        n_ctx: int,
        n_seq: int = 1,
        n_batch: int = 2048,
        unified: bool = False,
        as_trained: bool = False,
        n_threads: int | None = None,
        routing: Routing | str = "off",
    ) -> None:
        # llama_cpp makes a context with one sequence; it is a small one, because it is replaced.
        super().__init__(model_path, n_ctx=CONTEXT_STEP, n_batch=32, n_threads=n_threads)
        params = self.context_params
        self.n_ctx_seq = min(n_ctx, self._model.n_ctx_train()) if as_trained else n_ctx
        params.n_ctx = (1 if unified else n_seq) * -(-self.n_ctx_seq // CONTEXT_STEP) * CONTEXT_STEP
        params.n_batch = self.n_batch = min(n_batch, params.n_ctx)
        params.n_ubatch = min(n_batch, UBATCH)
        self.n_seq = params.n_seq_max = n_seq
        params.kv_unified = unified
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        self._ctx.close()  # type: ignore[no-untyped-call]  # llama_cpp has no type information
        try:
            context = _internals.LlamaContext(model=self._model, params=params, verbose=self.verbose)
        except ValueError as error:
            self.close()
            raise McError(
                f"{model_path}: llama.cpp cannot make a context of {params.n_ctx} tokens; there may be too "
                "little memory, of which a smaller context needs less",
                parameter="ctx",
            ) from error
        self._ctx = self._stack.enter_context(contextlib.closing(context))
        self.vocabulary = int(self.n_vocab())
        try:
            with about("routing"):
                self.routing = routing
        except McError:
            self.close()
            raise

    @property
    def adds_bos(self) -> bool:
        return bool(self._model.add_bos_token())

    @cached_property
    def vocabulary_sha256(self) -> str:
        return tokens_sha256(token_texts(self._model))

    def tokens(self, text: bytes) -> NDArray[np.int32]:
        """The text's tokens, with BOS in front where the model adds one; special tokens are plain text."""
        model: Any = self._model  # a guarded.Model
        found: NDArray[np.int32] = model.tokens(text, add_bos=True, special=False)
        return found

    def clear(self) -> None:
        """Forget all sequences."""
        self._ctx.kv_cache_clear()  # type: ignore[no-untyped-call]

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32] | Sequence[Sequence[int]],
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Compute a batch of n <= n_batch tokens; returns the logits [wanted.sum(), V] in their order.

        `sequences` has one sequence for every token, or (unified only) all those that a token belongs to.
        What is returned is llama.cpp's own memory, valid until the next call.
        """
        if isinstance(sequences, np.ndarray):
            flat, counts = _int32(sequences), np.ones(len(tokens), dtype=np.int32)
        else:
            flat = _int32([s for several in sequences for s in several])
            counts = _int32([len(several) for several in sequences])
        starts = (np.cumsum(counts, dtype=np.uintp) - counts.astype(np.uintp)) * np.uintp(flat.itemsize)
        addresses = np.uintp(flat.ctypes.data) + starts
        columns = (_int32(tokens), _int32(positions), counts)
        logits = np.ascontiguousarray(wanted, dtype=np.int8)
        as_ints = ctypes.POINTER(ctypes.c_int32)
        token, pos, n_seq_id = (column.ctypes.data_as(as_ints) for column in columns)
        batch = llama_cpp.llama_batch(
            n_tokens=len(tokens),
            token=token,
            embd=None,
            pos=pos,
            n_seq_id=n_seq_id,
            seq_id=addresses.ctypes.data_as(ctypes.POINTER(as_ints)),
            logits=logits.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        context = self.ctx
        status = llama_cpp.llama_decode(context, batch)
        if status:
            raise McError(
                f"{self.model_path}: llama.cpp could not compute a batch of {len(tokens)} tokens "
                f"(llama_decode returned {status}); its log says why: load the model with "
                "mc_gguf.Llama(path, verbose=True)"
            )
        n_wanted = int(logits.sum())
        if not n_wanted:
            return np.empty((0, self.vocabulary), dtype=np.float32)
        found: Any = llama_cpp.llama_get_logits(context)
        return np.ctypeslib.as_array(found, (n_wanted, self.vocabulary))


def _int32(values: Any) -> NDArray[np.int32]:
    return np.ascontiguousarray(values, dtype=np.int32)
