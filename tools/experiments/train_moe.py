"""Train a small Qwen3-MoE from scratch on the CPU: a test model of another shape than models/tiny-mixtral.

    python -m tools.experiments.train_moe /tmp/tiny-qwen3moe --steps 1000 --text a.txt --text b.txt

It writes a Hugging Face directory with bfloat16 safetensors and the tokenizer of the bundled model. The
defaults give 28.9 M parameters in 58 MB: 4 layers with 32 experts of width 256, of which each token uses the
best 4. The forward and backward passes run in bfloat16 and are compiled, which needs a C++ compiler and is
2.8 times as fast; AdamW updates weights in float32. A load-balance loss keeps all experts in use. The
learning rate is constant between a short rise and a linear fall over the last part of the steps.

The seed and the step alone decide which windows of the concatenated texts are read, so a seed gives the same
model on one machine with one number of threads. A killed run continues from FOLDER/training.safetensors with
the same options; only --steps may differ, until the fall has begun.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.common.files import atomic_write
from tools.common import CALIBRATION_TEXT, MODEL, ROOT, copy_tokenizer

BOS, EOS, N_VOCAB = 1, 2, 4096
RISE_STEPS = 50
FALL_SHARE = 0.35
LOG_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """Everything that the trained weights depend on but the texts; a step has `rows` windows of `ctx`."""

    layers: int
    embd: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_ff: int
    steps: int
    rows: int
    ctx: int
    rate: float
    balance: float
    seed: int

    def model(self) -> Any:
        """A new transformers model, float32."""
        import transformers

        kind: Any = transformers.Qwen3MoeConfig
        config = kind(
            vocab_size=N_VOCAB,
            hidden_size=self.embd,
            intermediate_size=self.expert_ff * self.top_k,
            moe_intermediate_size=self.expert_ff,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.0,
            max_position_embeddings=2 * self.ctx,
            bos_token_id=BOS,
            eos_token_id=EOS,
            use_cache=False,
        )
        torch.manual_seed(self.seed)
        new: Any = transformers.Qwen3MoeForCausalLM._from_config
        return new(config, attn_implementation="sdpa", experts_implementation="grouped_mm")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step."""
        fall = max(1, round(self.steps * FALL_SHARE))
        return self.rate * min(1.0, (step + 1) / RISE_STEPS, (self.steps - step) / fall)


def imbalance(logits: Tensor, top_k: int) -> Tensor:
    """Switch Transformer's balance loss of one layer's router logits [N, E]: 1 when all experts get the same.

    transformers' own loss adds the layers up, so that an expert may starve in one of them.
    """
    probs = torch.softmax(logits.float(), dim=-1)
    chosen = torch.topk(probs, top_k, dim=-1).indices
    share = torch.zeros_like(probs).scatter_(1, chosen, 1 / top_k).mean(0)
    return logits.shape[1] * (share * probs.mean(0)).sum()


class Training:
    """The bfloat16 model, its float32 weights, AdamW's moments, and the file that keeps them."""

    def __init__(self, folder: Path, settings: Settings, texts_sha256: str, compiled: bool) -> None:
        self.settings, self.step = settings, 0
        self._file = folder / "training.safetensors"
        self._identity = asdict(settings) | {"texts": texts_sha256}
        model = settings.model()
        self._master = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
        self.model = model.bfloat16().train()
        self._forward: Any = torch.compile(self.model) if compiled else self.model
        matrices = [p for p in self._master.values() if p.dim() > 1]
        others = [p for p in self._master.values() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        if self._file.is_file():
            self._load()

    def advance(self, rows: Tensor) -> float:
        """Make one step on token rows [rows, ctx]. Returns the loss before it, in nats per token and with the
        balance loss.
        """
        output = self._forward(input_ids=rows, labels=rows)
        balance = sum(imbalance(logits, self.settings.top_k) for logits in output.router_logits)
        loss = output.loss + self.settings.balance * balance / self.settings.layers
        loss.backward()
        for name, weight in self.model.named_parameters():
            self._master[name].grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._master.values(), 1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self._optimizer.step()
        self._publish()
        self.step += 1
        return float(loss.detach())

    @torch.no_grad()
    def _publish(self) -> None:
        for name, weight in self.model.named_parameters():
            weight.copy_(self._master[name])

    def save(self) -> None:
        """Store what a killed run continues from."""
        from safetensors.torch import save

        tensors = {f"weight.{n}": p.detach() for n, p in self._master.items()}
        for name, weight in self._master.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self._optimizer.state[weight][key]
        metadata = {"step": str(self.step), "identity": json.dumps(self._identity)}
        with atomic_write(self._file) as file:
            file.write(save(tensors, metadata))

    @torch.no_grad()
    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self._file, "pt") as state:
            metadata = state.metadata()
            self.step, found = int(metadata["step"]), json.loads(metadata["identity"])
            steps = self._identity["steps"]
            same = {**found, "steps": steps} == self._identity
            falling = self.step > (1 - FALL_SHARE) * min(steps, found["steps"])
            if not same or (falling and found["steps"] != steps):
                raise click.ClickException(f"{self._file} is of a run with other options or texts; remove it")
            for name, weight in self._master.items():
                weight.copy_(state.get_tensor(f"weight.{name}"))
                moments = {k: state.get_tensor(f"{k}.{name}") for k in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[weight] = {"step": torch.tensor(float(self.step)), **moments}
        self._publish()

    def finish(self, folder: Path) -> None:
        """Write the Hugging Face directory and forget the state."""
        self.model.config.use_cache = True
        self.model.config.output_router_logits = False
        self.model.save_pretrained(folder)
        copy_tokenizer(folder)
        self._file.unlink(missing_ok=True)


def read_stream(texts: tuple[Path, ...]) -> tuple[NDArray[np.int32], str]:
    """The tokens of all texts one after another, and the SHA-256 of their bytes."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    data = [path.read_bytes() for path in texts]
    ids = [tokenizer.encode(d.decode("utf-8"), add_special_tokens=False).ids for d in data]
    return np.concatenate([np.asarray(i, dtype=np.int32) for i in ids]), hashlib.sha256(
        b"".join(data)
    ).hexdigest()


def default_texts() -> tuple[Path, ...]:
    """The bundled mixture and the documents: all text of the repository on which nothing is measured."""
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    return (CALIBRATION_TEXT, *sorted(documents))


def windows(stream: NDArray[np.int32], settings: Settings, step: int) -> Tensor:
    """The token rows [rows, ctx] of a step, each with BOS in front."""
    width = settings.ctx - 1
    starts = np.random.default_rng([settings.seed, step]).integers(0, len(stream) - width, settings.rows)
    rows = stream[starts[:, None] + np.arange(width)]
    return torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS).astype(np.int64))


def train(
    folder: Path, settings: Settings, texts: tuple[Path, ...], save_every: int, compiled: bool = True
) -> None:
    """Train, or continue, and write the model into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stream, digest = read_stream(texts)
    run = Training(folder, settings, digest, compiled)
    n_million = sum(p.numel() for p in run.model.parameters()) / 1e6
    click.echo(f"{n_million:.1f} M parameters, {len(stream)} tokens of text, at step {run.step}", err=True)
    losses, since = [], time.monotonic()
    while run.step < settings.steps:
        losses.append(run.advance(windows(stream, settings, run.step)))
        if run.step % LOG_EVERY == 0:
            speed = len(losses) * settings.rows * settings.ctx / (time.monotonic() - since)
            loss = f"loss {np.mean(losses):.4f}"
            click.echo(f"{run.step}/{settings.steps} {loss} {speed:.0f} tokens/s", err=True)
            losses, since = [], time.monotonic()
        if run.step % save_every == 0:
            run.save()
    run.finish(folder)


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--layers", default=4)
@click.option("--embd", default=256)
@click.option("--heads", default=4)
@click.option("--kv-heads", default=2)
@click.option("--head-dim", default=128)
@click.option("--experts", default=32)
@click.option("--top-k", default=4)
@click.option("--expert-ff", default=256)
@click.option("--steps", default=1000)
@click.option("--rows", default=4, help="Windows per step.")
@click.option("--ctx", default=512)
@click.option("--rate", default=2e-3, help="Learning rate.")
@click.option("--balance", default=0.01, help="Weight of the load-balance loss.")
@click.option("--seed", default=0)
@click.option("--threads", default=1)
@click.option("--save-every", default=100, help="Steps between two saves.")
@click.option("--compile/--no-compile", "compiled", default=True)
def main(
    folder: Path, texts: tuple[Path, ...], threads: int, save_every: int, compiled: bool, **settings: Any
) -> None:
    """Train a small Qwen3-MoE into FOLDER. A text given twice is seen twice as often."""
    torch.set_num_threads(threads)
    train(folder, Settings(**settings), texts or default_texts(), save_every, compiled)


if __name__ == "__main__":
    main()
