"""The runtime's routing decisions, slot by slot: a context whose eval callback reads tensors of every ubatch.

It uses the low-level llama_cpp on the patched libraries, because llama_cpp.Llama takes neither several
sequences in a batch nor cb_eval.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mc_gguf.routing.params import RoutingParams
from mc_gguf.run.routing_api import read_counters, reset_counters, set_routing
from mc_gguf.runtime.locate import load_ggml_base, use_in_llama_cpp

_GGML_TYPES = {0: np.dtype(np.float32), 26: np.dtype(np.int32)}  # enum ggml_type: F32, I32
_WANTED = re.compile(rb"(ffn_moe_(?:topk|weights|routed|importance)|attn_received)-(\d+)")


@dataclass(frozen=True, eq=False)
class Batch:
    """What one llama_decode gets: int64 arrays [n], and bool [n] that says which tokens' logits are wanted.

    `shared` has the tokens, by index, that belong to several sequences, and their sequences after the first.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    sequences: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    shared: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Decision:
    """The router of one layer in one ubatch, R rows, K experts each, in slot order.

    experts int32 [R, K] are those selected; routed int32 [R, K] holds the number of experts instead where a
    slot is dropped; weights float32 [R, K] are those before anything is dropped; importance is float32 [R];
    received float32 [n] is the mean attention that each token of the ubatch receives. The last two are None
    where they are not computed.
    """

    experts: NDArray[Any]
    routed: NDArray[Any]
    weights: NDArray[Any]
    importance: NDArray[Any] | None
    received: NDArray[Any] | None


@dataclass
class Context:
    """A llama_context on an F32 model; the KV cache is F32 too, so that only the order of sums is left.

    `n_used` is the number of experts per token, if not the model's. Several sequences share a KV cache when
    it is `unified`; otherwise each has its own stream.
    """

    model_path: Path
    n_ubatch: int = 512
    flash_attention: bool = False
    unified: bool = True
    n_seq_max: int = 4
    n_used: int | None = None
    n_threads: int = 1
    _captured: list[tuple[str, int, NDArray[Any]]] = field(default_factory=list)

    def __enter__(self) -> Self:
        llama = self._llama = use_in_llama_cpp()
        self._ggml = load_ggml_base()
        self._ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t] * 2
        self._ggml.ggml_nbytes.argtypes, self._ggml.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
        self._ggml.ggml_get_name.argtypes, self._ggml.ggml_get_name.restype = (
            [ctypes.c_void_p],
            ctypes.c_char_p,
        )

        model_params = llama.llama_model_default_params()
        overrides = (llama.llama_model_kv_override * 2)()  # ends with an empty key
        if self.n_used is not None:
            overrides[0].key, overrides[0].value.val_i64 = b"llama.expert_used_count", self.n_used
            model_params.kv_overrides = overrides
        self._model = llama.llama_model_load_from_file(str(self.model_path).encode(), model_params)

        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 512 * self.n_seq_max, 1024, self.n_ubatch
        params.n_seq_max, params.kv_unified = self.n_seq_max, self.unified
        params.n_threads = params.n_threads_batch = self.n_threads
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.flash_attn_type = int(self.flash_attention)
        self._callback = llama.ggml_backend_sched_eval_callback(self._on_tensor)
        params.cb_eval = self._callback
        self.handle = llama.llama_init_from_model(self._model, params)
        assert self.handle, "llama.cpp made no context"
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._llama.llama_free(self.handle)
        self._llama.llama_model_free(self._model)

    def set_routing(self, params: RoutingParams) -> None:
        set_routing(self.handle, params)
        reset_counters(self.handle)

    def counters(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """As mc_gguf.run.routing_api.read_counters."""
        return read_counters(self.handle)

    def remove(self, sequence: int, start: int) -> None:
        """Forget a sequence's positions from `start` on."""
        memory = self._llama.llama_get_memory(self.handle)
        assert self._llama.llama_memory_seq_rm(memory, sequence, start, -1)

    def decode(self, batch: Batch) -> tuple[NDArray[np.float32], list[list[Decision]]]:
        """Logits of the wanted tokens [n_wanted, n_vocab], and the decisions of each ubatch, by layer."""
        llama, n = self._llama, len(batch.tokens)
        most = 1 + max((len(more) for more in batch.shared.values()), default=0)
        raw = llama.llama_batch_init(n, 0, most)
        raw.n_tokens = n
        for i in range(n):
            raw.token[i], raw.pos[i] = int(batch.tokens[i]), int(batch.positions[i])
            sequences = (int(batch.sequences[i]), *batch.shared.get(i, ()))
            raw.n_seq_id[i] = len(sequences)
            for j, sequence in enumerate(sequences):
                raw.seq_id[i][j] = sequence
            raw.logits[i] = bool(batch.wanted[i])
        self._captured.clear()
        status = llama.llama_decode(self.handle, raw)
        llama.llama_batch_free(raw)
        assert status == 0, f"llama_decode returned {status}"
        logits = [
            np.ctypeslib.as_array(llama.llama_get_logits_ith(self.handle, int(i)), (self._n_vocab,)).copy()
            for i in np.flatnonzero(batch.wanted)
        ]
        return np.array(logits), _decisions(self._captured)

    def _on_tensor(self, tensor: int, ask: bool, _user_data: object) -> bool:
        if match := _WANTED.fullmatch(self._ggml.ggml_get_name(tensor)):
            if not ask:
                self._captured.append((match[1].decode(), int(match[2]), self._read(tensor)))
            return True
        return not ask  # not wanted; go on after it

    def _read(self, tensor: int) -> NDArray[Any]:
        """The tensor, which may be strided, as an array with the dimensions in numpy's order."""
        header = _TensorHeader.from_address(tensor)
        buffer = np.empty(self._ggml.ggml_nbytes(tensor), dtype=np.uint8)
        self._ggml.ggml_backend_tensor_get(tensor, buffer.ctypes.data, 0, buffer.nbytes)
        view: NDArray[Any] = np.ndarray(
            tuple(header.ne)[::-1], _GGML_TYPES[header.type], buffer.data, strides=tuple(header.nb)[::-1]
        )
        return view.copy()


class _TensorHeader(ctypes.Structure):
    """The first fields of struct ggml_tensor."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


def _decisions(captured: Sequence[tuple[str, int, NDArray[Any]]]) -> list[list[Decision]]:
    """Tensors come in the order of the graph, so a ubatch begins where the layer number falls."""
    ubatches: list[list[dict[str, NDArray[Any]]]] = []
    last = None
    for name, layer, array in captured:
        if last is None or layer < last:
            ubatches.append([])
        if layer != last:
            assert layer == len(ubatches[-1]), "a layer without a decision"
            ubatches[-1].append({})
        ubatches[-1][-1][name] = array
        last = layer
    return [[_decision(layer) for layer in ubatch] for ubatch in ubatches]


def _decision(arrays: dict[str, NDArray[Any]]) -> Decision:
    """Arrays have four dimensions, those of ggml in numpy's order."""
    routed = arrays["ffn_moe_routed"][0, 0]
    importance, received = (arrays.get(name) for name in ("ffn_moe_importance", "attn_received"))
    return Decision(
        experts=arrays["ffn_moe_topk"][0, 0],
        routed=routed,
        weights=arrays["ffn_moe_weights"].reshape(routed.shape),
        importance=None if importance is None else importance[0, 0, 0],
        received=None if received is None else received[0, 0, 0],
    )
