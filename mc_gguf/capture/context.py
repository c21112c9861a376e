"""A llama_context that evaluates whole batches of rows while an eval callback listens."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mc_gguf.capture.graph import check_layout
from mc_gguf.common.errors import McError, SourceError
from mc_gguf.runtime.locate import library_path

CONTEXT_STEP = 256  # tokens

Callback = Callable[[int, bool, object], bool]  # a Listener, for one


@dataclass(frozen=True)
class Devices:
    """Where and how the runtime computes: threads, layers on a GPU, and of these how many keep their experts
    on the CPU.
    """

    threads: int = 1
    gpu_layers: int = 0
    cpu_moe: int = 0


class _Override(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def _on_cpu(n_layer: int) -> Any:
    """Overrides that keep the experts of the first `n_layer` layers in the CPU's memory."""
    library: Any = ctypes.CDLL(str(library_path("ggml-base")))
    library.ggml_backend_cpu_buffer_type.restype = ctypes.c_void_p
    where = library.ggml_backend_cpu_buffer_type()
    found = (_Override * (n_layer + 1))()  # ends with an empty one
    for layer in range(n_layer):
        pattern = rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
        found[layer] = _Override(pattern.encode(), where)
    return found


class Context:
    """The model in the GGUF `path`, with `n_seq` sequences of `n_ctx` tokens, all of them in one ubatch.

    A context manager. Raises SourceError, with llama.cpp's reason, when the model cannot be loaded, and
    McError when there is no memory for the context.
    """

    def __init__(self, path: Path, n_ctx: int, n_seq: int, devices: Devices, callback: Callback) -> None:
        self.path, self.n_ctx, self.n_seq = path, n_ctx, n_seq
        self._devices, self._python_callback = devices, callback
        self._model: Any = None
        self.handle: Any = None

    def __enter__(self) -> Self:
        from mc_gguf.runtime.llama_library import listen, llama_cpp, reason

        check_layout()
        self._llama = llama_cpp
        listen()
        model_params: Any = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = self._devices.gpu_layers
        if self._devices.cpu_moe:
            self._overrides = _on_cpu(self._devices.cpu_moe)
            model_params.tensor_buft_overrides = ctypes.cast(self._overrides, ctypes.c_void_p)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), model_params)
        if not self._model:
            raise SourceError(f"the runtime cannot load {self.path}: {reason() or 'it does not say why'}")
        params: Any = llama_cpp.llama_context_default_params()
        per_sequence = -(-self.n_ctx // CONTEXT_STEP) * CONTEXT_STEP
        params.n_ctx = self.n_seq * per_sequence
        params.n_batch = params.n_ubatch = self.n_seq * self.n_ctx
        params.n_seq_max = self.n_seq
        params.kv_unified = False
        params.n_threads = params.n_threads_batch = self._devices.threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        params.no_perf = True
        # Kept as an attribute: C holds no reference to it.
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self._python_callback)
        params.cb_eval = self._callback
        self.handle = llama_cpp.llama_init_from_model(self._model, params)
        if not self.handle:
            why = reason() or "there may be too little memory"
            self._close()
            raise McError(f"{self.path}: llama.cpp cannot make a context of {params.n_ctx} tokens: {why}")
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.handle:
            self._llama.llama_free(self.handle)
        if self._model:
            self._llama.llama_model_free(self._model)
        self.handle = self._model = None

    def evaluate(self, rows: NDArray[np.int32]) -> None:
        """Compute `rows` [n <= n_seq, length <= n_ctx], each a sequence of its own that begins at its first
        token, in one ubatch in this order. What was computed before is forgotten.
        """
        llama = self._llama
        llama.llama_memory_clear(llama.llama_get_memory(self.handle), True)
        n, length = rows.shape
        tokens = np.ascontiguousarray(rows, dtype=np.int32).ravel()
        positions = np.tile(np.arange(length, dtype=np.int32), n)
        sequences = np.repeat(np.arange(n, dtype=np.int32), length)
        counts, wanted = np.ones(n * length, dtype=np.int32), np.ones(n * length, dtype=np.int8)
        addresses = np.uintp(sequences.ctypes.data) + np.arange(n * length, dtype=np.uintp) * np.uintp(4)
        ints = ctypes.POINTER(ctypes.c_int32)
        batch = llama.llama_batch(
            n_tokens=n * length,
            token=tokens.ctypes.data_as(ints),
            embd=None,
            pos=positions.ctypes.data_as(ints),
            n_seq_id=counts.ctypes.data_as(ints),
            seq_id=addresses.ctypes.data_as(ctypes.POINTER(ints)),
            logits=wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = llama.llama_decode(self.handle, batch)
        if status:
            raise McError(
                f"{self.path}: llama.cpp could not compute {n * length} tokens (llama_decode returned "
                f"{status})"
            )

    def logits(self, n_tokens: int) -> NDArray[np.float32]:
        """Logits [n_tokens, n_vocab] of what was just evaluated: llama.cpp's own memory."""
        found: Any = self._llama.llama_get_logits(self.handle)
        return np.ctypeslib.as_array(found, (n_tokens, self.n_vocab))
