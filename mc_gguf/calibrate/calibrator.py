"""From a checkpoint and token rows to a Calibration, one decoder layer after another, resumable.

Per layer: attention over all rows, router, then every expert once: read its weights, push its tokens through,
collect (frequency, routing weight, importance matrices, output norm), measure the error of every candidate
type (losses.py), push the branches through it (sensitivity.py), free it. Memory is the hidden states (16 KB a
token at n_embd 4096, twice), one branch, one expert in float32 and its activations: the same for any number
of layers. Disk: see calibrate_state.py and sensitivity.py.

After each layer the results so far and the hidden states go to a directory beside the output; a killed run
continues from there and gives the same arrays bit for bit. The directory belongs to one model, text and set
of options.

Experts that no token reached keep a zero importance matrix (quantize takes ones) and count as if one token
had reached them: by the rule of succession no more can be said. Its error is the mean over the tokens nearest
to being routed there, with the weight they would give the expert in the last place. `calibrate` warns about
them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mc_gguf.artifacts import PROJECTIONS, Calibration, Floats, ModelInfo
from mc_gguf.calibrate.attention import attention_types, run_attention
from mc_gguf.calibrate.losses import (
    MAX_ROWS,
    MAX_TOKENS,
    ExpertErrors,
    Sample,
    draw,
    expert_errors,
    nominal_errors,
)
from mc_gguf.calibrate.sensitivity import SENSITIVITY_TOKENS, Branches, branch_rows
from mc_gguf.calibrate.state import N_QUANTILES, LayerStats, State
from mc_gguf.calibrate.super_experts import super_experts
from mc_gguf.common.errors import McError, SourceError
from mc_gguf.common.machine import return_large_blocks, usable_cores
from mc_gguf.common.progress import Progress, progress
from mc_gguf.ggml.quantizers import init
from mc_gguf.ggml.types import CANDIDATES, FALLBACKS, TYPES, ggml_type
from mc_gguf.source.decoder import CHUNK, Decoder, Expert, Routing
from mc_gguf.source.text import Corpus

if TYPE_CHECKING:
    from mc_gguf.source import Checkpoint

FEW_TOKENS = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What is measured, how exactly, and with how many threads (0: all cores).

    `max_rows` rows of a matrix and `max_tokens` tokens of an expert are used for the errors; the rest is
    scaled. Up to `sensitivity_tokens` tokens show how sensitive each layer is to dropped experts.
    """

    types: tuple[str, ...] | None = None
    max_rows: int = MAX_ROWS
    max_tokens: int = MAX_TOKENS
    sensitivity_tokens: int = SENSITIVITY_TOKENS
    seed: int = 0
    threads: int = 0


def calibrate_to_file(
    checkpoint: Checkpoint,
    text: Corpus,
    output: Path,
    options: Options = Options(),
    resume: bool = True,
    quiet: bool = False,
) -> Calibration:
    """calibrate() into `output`, continuing what a killed run left beside it (unless `resume` is False)."""
    if not resume:
        forget_partial(output)
    calibration = calibrate(checkpoint, text, options, partial_directory(output), quiet).save(output)
    forget_partial(output)
    return calibration


def partial_directory(output: Path) -> Path:
    """Where a calibration that goes to `output` keeps its state until it is complete."""
    return output.parent / f".{output.name}.partial"


def forget_partial(output: Path) -> None:
    """Removes the state that a killed calibration to `output` may have left."""
    shutil.rmtree(partial_directory(output), ignore_errors=True)


def calibrate(
    checkpoint: Checkpoint,
    text: Corpus,
    options: Options = Options(),
    partial: Path | None = None,
    quiet: bool = False,
) -> Calibration:
    """Statistics of every expert of `checkpoint` on `text`. `partial`, a directory for nothing else, is
    where the state after each layer is kept.

    Raises SourceError for a model that is not supported or gives values that are not finite, McError for
    types that do not fit the model.
    """
    info = checkpoint.info
    decoder, types = Decoder(checkpoint), measured_types(info, options.types)
    if info.expert_layers != tuple(range(info.n_layer)):
        raise SourceError("calibration supports models with experts in every layer only")
    return_large_blocks()
    with (
        State.resume(partial, _identity(info, text, types, options)) as state,
        _threads(options.threads) as threads,
        torch.inference_mode(),
    ):
        init(types)
        hidden, branches = _hidden_states(decoder, text, options, state)
        todo = range(len(state.layers), info.n_layer)
        with progress("calibrate", len(todo) * info.n_expert, "experts", quiet) as bar:
            for layer in todo:
                work = _Layer(decoder, layer, types, options, threads)
                state.add(work.run(hidden, branches, bar), hidden)
            del hidden
            bar.advance(0, "sensitivity of the layers")
            divergences = branches.divergences()
    corpus = text.to_json() | {"measured": _identity(info, text, types, options)}
    calibration = _assemble(info, corpus, types, state.layers, divergences)
    _warn(calibration)
    return calibration


def _hidden_states(decoder: Decoder, text: Corpus, options: Options, state: State) -> tuple[Tensor, Branches]:
    """Where `state` stopped, or the embeddings."""
    few = branch_rows(text.rows, options.sensitivity_tokens)
    branches = Branches(decoder, state.directory, few, len(state.layers))
    if state.hidden is None:
        return decoder.embed(text.rows), branches
    hidden, state.hidden = state.hidden, None  # so that it can be freed
    return hidden, branches


def measured_types(info: ModelInfo, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Types to measure, by size: `wanted`, or the candidates that some projection can have, with FALLBACKS
    for others.

    Raises McError when a type is unknown, or a projection can have none of them.
    """
    widths = {p: info.expert_shape(p)[1] for p in PROJECTIONS}
    names = [ggml_type(name).name for name in wanted] if wanted else list(CANDIDATES)
    if not wanted and any(not TYPES[n].fits(w) for n in CANDIDATES for w in widths.values()):
        names += FALLBACKS
    usable = {n for n in names if any(TYPES[n].fits(w) for w in widths.values())}
    for projection, width in widths.items():
        if not any(TYPES[n].fits(width) for n in usable):
            raise McError(
                f"none of the types {', '.join(names)} fits rows of {width} weights ({projection}); "
                "try --types F16"
            )
    return tuple(sorted(usable, key=lambda n: (TYPES[n].bpw, n)))


def _identity(info: ModelInfo, text: Corpus, types: Sequence[str], options: Options) -> dict[str, Any]:
    """All that the result depends on; threads do not belong."""
    return {
        "model": info.fingerprint,
        "corpus": text.to_json(),
        "types": list(types),
        "max_rows": options.max_rows,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "sensitivity_tokens": options.sensitivity_tokens,
    }


def is_calibration_of(calibration: Calibration, info: ModelInfo, text: Corpus, options: Options) -> bool:
    """Whether `calibration` holds what calibrate() with these arguments would measure, types at least."""
    wanted = _identity(info, text, measured_types(info, options.types), options)
    found = dict(calibration.corpus.get("measured", {}))
    types = found.pop("types", ())
    return set(wanted.pop("types")) <= set(types) and found == wanted


@contextmanager
def _threads(wanted: int) -> Iterator[int]:
    threads, before = wanted or usable_cores(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True, eq=False)
class _Tokens:
    """Tokens of one expert: their numbers [n], the router's probability and the final weight [n]."""

    index: Tensor
    prob: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Layer:
    decoder: Decoder
    layer: int
    types: tuple[str, ...]
    options: Options
    threads: int

    def run(self, hidden: Tensor, branches: Branches, bar: Progress) -> LayerStats:
        """Advance `hidden` [n_rows, ctx, n_embd] and `branches` by this layer, in place, and collect."""
        bar.advance(0, f"layer {self.layer}: attention")
        attention = run_attention(
            self.decoder, self.layer, hidden, self.options.sensitivity_tokens, self._check, self.threads
        )
        stats = LayerStats.empty(self.decoder.checkpoint.info, len(self.types), attention)
        flat = hidden.view(-1, hidden.shape[-1])
        routing, norm = self.decoder.route(self.layer, flat), self.decoder.ffn_norm(self.layer)
        branches.enter(self.layer)
        added = self.decoder.unrouted(self.layer)(flat)
        for number in range(self.decoder.shape.n_expert):
            expert = self.decoder.expert(self.layer, number)
            self._expert(number, expert, flat, norm, routing, added, stats)
            branches.push(number, expert)
            del expert  # before the next one is read
            bar.advance(1, f"layer {self.layer}")
        stats.block_score[...] = 1 - _mean_cosine(flat, added)
        flat += added
        del added
        self._check(flat)
        stats.hidden_max[...] = max(float(part.abs().max()) for part in torch.split(flat, CHUNK))
        stats.hidden_median[...] = float(flat[:CHUNK].abs().median())
        ratios = (routing.probs[:, 1:] / routing.probs[:, :1]).double().numpy()
        stats.ratio_quantiles[:] = np.quantile(ratios, np.linspace(0, 1, N_QUANTILES), axis=0).T
        stats.routing_curve[:], stats.rounding_error[...] = branches.leave(stats.ratio_quantiles)
        return stats

    def _check(self, hidden: Tensor) -> None:
        if not torch.isfinite(hidden).all():
            raise SourceError(f"layer {self.layer} gives values that are not finite; is the source damaged?")

    def _expert(
        self,
        number: int,
        expert: Expert,
        flat: Tensor,
        norm: Tensor,
        routing: Routing,
        added: Tensor,
        stats: LayerStats,
    ) -> None:
        tokens = _routed(routing, number)
        norms_sq, hidden_sq = (torch.zeros(len(tokens.index), dtype=torch.float64) for _ in range(2))
        for part in torch.split(torch.arange(len(tokens.index)), CHUNK):
            x = self.decoder.norm(flat[tokens.index[part]], norm)
            h = expert.hidden(x)
            y = h @ expert.down.T
            if len(y):
                stats.down_max[number] = max(stats.down_max[number], float(y.abs().max()))
            y.mul_(tokens.weight[part, None])
            added.index_add_(0, tokens.index[part], y)
            norms_sq[part] = y.square().sum(1, dtype=torch.float64)
            hidden_sq[part] = y.add_(flat[tokens.index[part]]).square().sum(1, dtype=torch.float64)
            stats.imatrix_in[number] += x.square().sum(0, dtype=torch.float64).numpy()
            stats.imatrix_mid[number] += h.square().sum(0, dtype=torch.float64).numpy()
        stats.frequency[number] = len(tokens.index)
        stats.routing_weight[number] = float(tokens.prob.sum(dtype=torch.float64))
        stats.output_sq[number] = float(norms_sq.sum())
        for sums in (stats.imatrix_in, stats.imatrix_mid):
            sums[number] /= max(1, len(tokens.index))
        sample = self._sample(number, flat, norm, routing, tokens, norms_sq, hidden_sq)
        found = self._errors(number, expert, sample, stats)
        stats.sq_error[number], stats.relative_error[number] = found.block, found.relative
        stats.weight_error[number], stats.hessian_trace[number] = found.weight, found.trace

    def _sample(
        self,
        number: int,
        flat: Tensor,
        norm: Tensor,
        routing: Routing,
        tokens: _Tokens,
        norms_sq: Tensor,
        hidden_sq: Tensor,
    ) -> Sample:
        """Up to max_tokens of the expert's tokens; for an expert without any the nearest, worth one.

        `hidden_sq` [n]: squared norm of the hidden state after the expert. Where an expert makes a massive
        activation it is that which the next layer's norm divides by.
        """
        limit = self.options.max_tokens
        if len(tokens.index) == 0:
            tokens = _nearest(self.decoder, routing, number, limit)
            hidden = flat[tokens.index]
            weight = tokens.weight / len(tokens.index) ** 0.5
            return Sample(self.decoder.norm(hidden, norm), weight, _inverse_norm(hidden.square().sum(1)))
        rng = np.random.default_rng([self.options.seed, self.layer, number, 1])
        relative = norms_sq / hidden_sq.clamp(min=1e-30)
        # Tokens that matter to either sum of errors.
        importance = norms_sq / norms_sq.sum().clamp(min=1e-30) + relative / relative.sum().clamp(min=1e-30)
        drawn = draw(importance.numpy(), limit, rng)
        x = self.decoder.norm(flat[tokens.index[drawn.index]], norm)
        scale = _inverse_norm(hidden_sq[drawn.index])
        return Sample(x, tokens.weight[drawn.index] * drawn.weight.sqrt(), scale)

    def _errors(self, number: int, expert: Expert, sample: Sample, stats: LayerStats) -> ExpertErrors:
        seed = (self.options.seed, self.layer, number)
        importance = (
            stats.imatrix_in[number].astype(np.float32),
            stats.imatrix_mid[number].astype(np.float32),
        )
        return expert_errors(
            expert,
            sample,
            *importance,
            self.types,
            max_rows=self.options.max_rows,
            seed=seed,
            threads=self.threads,
        )


def _mean_cosine(before: Tensor, added: Tensor) -> float:
    """Of the hidden states [n, n_embd] before and after the feed-forward block adds to them."""
    parts = zip(torch.split(before, CHUNK), torch.split(added, CHUNK), strict=True)
    total = sum(float(torch.cosine_similarity(a, a + b, dim=-1).sum(dtype=torch.float64)) for a, b in parts)
    return total / len(before)


def _inverse_norm(sq: Tensor) -> Tensor:
    return sq.clamp(min=1e-30).rsqrt().float()


def _routed(routing: Routing, number: int) -> _Tokens:
    index, slots = torch.nonzero(routing.experts == number, as_tuple=True)
    return _Tokens(index, routing.probs[index, slots], routing.weights[index, slots])


def _nearest(decoder: Decoder, routing: Routing, number: int, limit: int) -> _Tokens:
    """The tokens with the highest probability of an expert that none is routed to, as if it took their last
    place.
    """
    prob, index = torch.topk(routing.all_probs[:, number], min(limit, len(routing.all_probs)))
    probs = torch.cat([routing.probs[index, :-1], prob[:, None]], dim=1)
    return _Tokens(index, prob, decoder.weights(probs)[:, -1])


def _assemble(
    info: ModelInfo,
    corpus: dict[str, Any],
    types: tuple[str, ...],
    layers: Sequence[LayerStats],
    divergences: Floats,
) -> Calibration:
    """`divergences` [L, 2]: of the layers with dropped and with rounded experts."""

    def stack(name: str) -> Floats:
        return np.stack([getattr(layer, name) for layer in layers])

    sq_error, rounding_error = stack("sq_error"), stack("rounding_error")
    return Calibration(
        model=info,
        layers=info.expert_layers,
        types=types,
        corpus=corpus,
        frequency=stack("frequency"),
        routing_weight=stack("routing_weight"),
        sq_error=sq_error,
        output_sq=stack("output_sq"),
        imatrix_in=stack("imatrix_in").astype(np.float32),
        imatrix_mid=stack("imatrix_mid").astype(np.float32),
        ratio_quantiles=stack("ratio_quantiles"),
        routing_sensitivity=divergences[:, 0],
        routing_curve=stack("routing_curve"),
        nominal_error=nominal_errors(sq_error, types),
        relative_error=stack("relative_error"),
        weight_error=stack("weight_error"),
        hessian_trace=stack("hessian_trace"),
        kld_per_error=divergences[:, 1] / np.maximum(rounding_error, np.finfo(np.float64).tiny),
        block_score=stack("block_score"),
        hidden_max=stack("hidden_max"),
        hidden_median=stack("hidden_median"),
        down_max=stack("down_max"),
        attention_types=attention_types(info),
        attention_error=stack("attention_error"),
        attention_in=stack("attention_in").astype(np.float32),
        attention_mid=stack("attention_mid").astype(np.float32),
    )


def _warn(calibration: Calibration) -> None:
    for found in super_experts(calibration):
        log.warning("super expert: %s", found)
    rare = calibration.frequency < FEW_TOKENS
    if not rare.any():
        return
    names = [f"{calibration.layers[i]}/{e}" for i, e in zip(*np.nonzero(rare), strict=True)]
    log.warning(
        "%d of %d experts saw fewer than %d tokens, %d of them none (layer/expert %s): "
        "their types are a guess; calibrate with more text",
        rare.sum(),
        rare.size,
        FEW_TOKENS,
        (calibration.frequency == 0).sum(),
        ", ".join(names[:5]) + (" ..." if len(names) > 5 else ""),
    )
