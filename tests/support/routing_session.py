"""A llama_context under low-level control, for tests of dynamic routing.

It gives batches of several sequences, some of the logits, the memory and the state. The model is borrowed
from a Llama, so that several sessions can share one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mc_gguf.routing import Routing, RoutingStats, resolve
from mc_gguf.run.llama import Llama
from mc_gguf.run.routing_api import read_counters, reset_counters, routing_shape, set_routing

import llama_cpp  # isort: skip  after mc_gguf.run.llama, which chooses its libraries

Token = tuple[int, int, int]  # token, position, sequence
Logits = NDArray[np.float32]


class Session:
    """One context of 1024 cells. `options` are fields of llama_context_params."""

    def __init__(self, llm: Llama, flash: bool = False, threads: int = 2, **options: Any) -> None:
        self.llm = llm
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 1024, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        params.kv_unified = True
        for name, value in options.items():
            setattr(params, name, value)
        self.ctx = llama_cpp.llama_init_from_model(llm.model, params)
        assert self.ctx
        self.memory = llama_cpp.llama_get_memory(self.ctx)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        llama_cpp.llama_free(self.ctx)

    def route(self, routing: str) -> None:
        set_routing(self.ctx, resolve(Routing.parse(routing), None, routing_shape(self.ctx)))

    def stats(self) -> RoutingStats:
        slots, experts = read_counters(self.ctx)
        return RoutingStats.of(slots, experts, np.ones_like(experts[:, 0]))

    def reset_stats(self) -> None:
        reset_counters(self.ctx)

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, True)

    def decode(self, tokens: Sequence[Token], outputs: Sequence[int] | None = None) -> Logits:
        """Logits [n_outputs, n_vocab] of the tokens at these places of the batch, by default of all."""
        wanted = range(len(tokens)) if outputs is None else outputs
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, i in wanted
            batch.seq_id[i][0] = sequence
        assert llama_cpp.llama_decode(self.ctx, batch) == 0
        llama_cpp.llama_batch_free(batch)
        found = llama_cpp.llama_get_logits(self.ctx)
        return np.ctypeslib.as_array(found, (len(wanted), self.llm.n_vocab())).copy()

    def run(self, tokens: Sequence[int], n_step: int = 4, start: int = 0, sequence: int = 0) -> Logits:
        """Logits [n, n_vocab] of `tokens` from position `start`; the last `n_step` come one by one."""
        placed = [(token, start + i, sequence) for i, token in enumerate(tokens)]
        n_prompt = len(placed) - n_step
        return np.concatenate(
            [
                *([self.decode(placed[:n_prompt])] if n_prompt else []),
                *(self.decode([t]) for t in placed[n_prompt:]),
            ]
        )

    def save(self) -> bytes:
        size = llama_cpp.llama_state_get_size(self.ctx)
        buffer = (ctypes.c_uint8 * size)()
        assert llama_cpp.llama_state_get_data(self.ctx, buffer, size) <= size
        return bytes(buffer)

    def restore(self, state: bytes) -> None:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        assert llama_cpp.llama_state_set_data(self.ctx, buffer, len(state)) > 0

    def n_reused(self) -> int:
        """The number of graphs that were not built anew."""
        return int(llama_cpp.llama_perf_context(self.ctx).n_reused)


def write_lora(path: Path, n_embd: int, n_ff: int, n_expert: int, layers: int, rank: int = 4) -> Path:
    """A LoRA adapter for a Mixtral: attention outputs and the experts' up projections."""
    from mc_gguf.runtime.packages import load_gguf

    writer = load_gguf().GGUFWriter(path, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    rng = np.random.default_rng(11)
    for layer in range(layers):
        for name, a, b in (
            ("attn_output", (rank, n_embd), (n_embd, rank)),
            ("ffn_up_exps", (n_expert, rank, n_embd), (n_expert, n_ff, rank)),
        ):
            for part, shape in (("a", a), ("b", b)):
                data = 0.1 * rng.standard_normal(shape, dtype=np.float32)
                writer.add_tensor(f"blk.{layer}.{name}.weight.lora_{part}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
