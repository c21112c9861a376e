"""Make a Mixtral-shaped Hugging Face checkpoint of random BF16 weights, in several shards, in little memory.

    python -m tools.experiments.make_model /tmp/mixtral-2 --layers 2

It is for measuring memory and time, not quality: the weights are Gaussian with a standard deviation of 0.02,
the norms are 1. One tensor at a time is in memory. The default sizes are those of Mixtral-8x7B, 2.9 GB per
layer. The tokenizer is the bundled model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from tools.common import copy_tokenizer

_PIECE = 1 << 22


@dataclass(frozen=True)
class Sizes:
    """The shape of the model."""

    layers: int
    embd: int
    ff: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    vocab: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The Hugging Face name and the shape of every tensor."""
        kv = self.embd // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, self.embd)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.embd,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.embd,)
            for name, rows in (("q", self.embd), ("k", kv), ("v", kv), ("o", self.embd)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, self.embd)
            yield f"{prefix}.block_sparse_moe.gate.weight", (self.experts, self.embd)
            for expert in range(self.experts):
                for name, shape in (
                    ("w1", (self.ff, self.embd)),
                    ("w2", (self.embd, self.ff)),
                    ("w3", (self.ff, self.embd)),
                ):
                    yield f"{prefix}.block_sparse_moe.experts.{expert}.{name}.weight", shape
        yield "model.norm.weight", (self.embd,)
        yield "lm_head.weight", (self.vocab, self.embd)

    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocab,
            "hidden_size": self.embd,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.embd // self.heads,
            "hidden_act": "silu",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "num_experts_per_tok": self.top_k,
            "num_local_experts": self.experts,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


def bf16(values: NDArray[np.float32]) -> bytes:
    """The values truncated to BF16."""
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


def random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[bytes]:
    """The bytes of a random BF16 tensor in pieces; a norm is all ones."""
    left = int(np.prod(shape))
    if len(shape) == 1:
        yield bf16(np.ones(left, dtype=np.float32))
        return
    while left:
        count = min(left, _PIECE)
        yield bf16(rng.standard_normal(count, dtype=np.float32) * np.float32(0.02))
        left -= count


def shards(sizes: Sizes, max_bytes: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in shards of at most `max_bytes`, or of one tensor that is larger."""
    found: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in sizes.tensors():
        n_bytes = 2 * int(np.prod(shape))
        if found[-1] and filled + n_bytes > max_bytes:
            found.append([])
            filled = 0
        found[-1].append((name, shape))
        filled += n_bytes
    return found


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator) -> None:
    """Write one safetensors file: length, JSON header, then one tensor after another."""
    header, offset = {}, 0
    for name, shape in tensors:
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, shape in tensors:
            file.writelines(random_bytes(rng, shape))


def make_model(folder: Path, sizes: Sizes, max_shard_bytes: int, seed: int) -> None:
    """Write the whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parts = shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for i, tensors in enumerate(parts):
        name = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / name, tensors, rng)
        weight_map |= {tensor: name for tensor, _ in tensors}
        click.echo(f"{i + 1}/{len(parts)} {name}", err=True)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(sizes.config(), indent=1))
    copy_tokenizer(folder)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--layers", default=2, show_default=True)
@click.option("--embd", default=4096, show_default=True)
@click.option("--ff", default=14336, show_default=True)
@click.option("--experts", default=8, show_default=True)
@click.option("--top-k", default=2, show_default=True)
@click.option("--heads", default=32, show_default=True)
@click.option("--kv-heads", default=8, show_default=True)
@click.option("--vocab", default=32000, show_default=True)
@click.option("--max-shard-mb", default=2000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, max_shard_mb: int, seed: int, **sizes: int) -> None:
    """Write a random Mixtral-shaped checkpoint into FOLDER."""
    make_model(folder, Sizes(**sizes), max_shard_mb * 1_000_000, seed)


if __name__ == "__main__":
    main()
