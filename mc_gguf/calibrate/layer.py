"""One layer's measurement: what its experts see, do and would lose under every type.

Every expert is handled once: its weights are read, its tokens pushed through, its statistics collected
(frequency, routing weight, importance matrices, output norm), the error of every candidate type measured
(expert_errors.py), the branches pushed through it (sensitivity.py), and its weights freed.

An expert that no token reached keeps a zero importance matrix, which quantizers treat like ones, and counts
as if one token had reached it: by the rule of succession no more can be said. Its error is the mean over the
tokens that come nearest to being routed there (Decoder.nearest_tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mc_gguf.calibrate.attention import attention_types, run_attention
from mc_gguf.calibrate.expert_errors import ExpertErrors, Sample, draw, expert_errors
from mc_gguf.calibrate.finite import check_finite, place
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.calibrate.sensitivity import Branches
from mc_gguf.calibrate.statistics import N_QUANTILES, LayerStatistics
from mc_gguf.common.progress import Progress
from mc_gguf.ggml.types import TYPES
from mc_gguf.source.decoder import CHUNK, Decoder, Expert, RoutedTokens, RouterOutput


@dataclass(frozen=True)
class LayerMeasurement:
    """Measures layer `layer` of a model for `types`."""

    decoder: Decoder
    layer: int
    types: tuple[str, ...]
    options: CalibrationOptions
    threads: int

    def run(self, hidden: Tensor, branches: Branches, bar: Progress) -> LayerStatistics:
        """Advance `hidden` [n_rows, ctx, n_embd] and `branches` by this layer, in place, and collect its
        statistics.
        """
        stats = self._zeros()
        bar.advance(0, f"layer {self.layer}: attention")
        few = self.options.sensitivity_tokens
        with place(self.layer, "attention"):
            attention = run_attention(self.decoder, self.layer, hidden, few, self.threads)
        stats.attention_error[...] = attention.errors
        stats.attention_in[...], stats.attention_mid[...] = attention.into, attention.mid
        flat = hidden.view(-1, hidden.shape[-1])
        routing, norm = self.decoder.route(self.layer, flat), self.decoder.ffn_norm(self.layer)
        with place(self.layer, "router"):
            check_finite(routing.probs, "probabilities")
        branches.enter(self.layer)
        added = self.decoder.unrouted(self.layer)(flat)
        for number in range(self.decoder.shape.n_expert):
            expert = self.decoder.expert(self.layer, number)
            with place(self.layer, f"expert {number}"):
                self._expert(number, expert, flat, norm, routing, added, stats)
            branches.push(number, expert)
            del expert  # before the next one is read
            bar.advance(1, f"layer {self.layer}")
        stats.block_score[...] = 1 - _mean_cosine(flat, added)
        flat += added
        del added
        with place(self.layer, "sum of the experts"):
            check_finite(flat, "hidden states")
            check_finite(stats.block_score, "cosines of the hidden states")
        stats.hidden_max[...] = max(float(part.abs().max()) for part in torch.split(flat, CHUNK))
        stats.hidden_median[...] = float(flat[:CHUNK].abs().median())
        ratios = (routing.probs[:, 1:] / routing.probs[:, :1]).double().numpy()
        stats.ratio_quantiles[:] = np.quantile(ratios, np.linspace(0, 1, N_QUANTILES), axis=0).T
        stats.routing_curve[:], stats.rounding_error[...] = branches.leave(stats.ratio_quantiles)
        with place(self.layer, "sensitivity"):
            check_finite(stats.routing_curve, "errors of dropped experts")
            check_finite(stats.rounding_error, "errors of rounded experts")
        return stats

    def _zeros(self) -> LayerStatistics:
        info = self.decoder.checkpoint.info
        width = self.decoder.shape.n_head * self.decoder.shape.head_dim
        return LayerStatistics.zeros(info, self.types, attention_types(info), width)

    def _expert(
        self,
        number: int,
        expert: Expert,
        flat: Tensor,
        norm: Tensor,
        routing: RouterOutput,
        added: Tensor,
        stats: LayerStatistics,
    ) -> None:
        """Add the output of one expert to `added` and fill in its share of `stats`."""
        tokens = routing.tokens_of(number)
        norms_sq, hidden_sq = (torch.zeros(len(tokens), dtype=torch.float64) for _ in range(2))
        for part in torch.split(torch.arange(len(tokens)), CHUNK):
            x = self.decoder.norm(flat[tokens.index[part]], norm)
            h = expert.hidden(x)
            y = h @ expert.down.T
            if len(y):
                stats.down_max[number] = max(stats.down_max[number], float(y.abs().max()))
            y.mul_(tokens.weights[part, None])
            added.index_add_(0, tokens.index[part], y)
            norms_sq[part] = y.square().sum(1, dtype=torch.float64)
            hidden_sq[part] = y.add_(flat[tokens.index[part]]).square().sum(1, dtype=torch.float64)
            stats.imatrix_in[number] += x.square().sum(0, dtype=torch.float64).numpy()
            stats.imatrix_mid[number] += h.square().sum(0, dtype=torch.float64).numpy()
        stats.frequency[number] = len(tokens)
        stats.routing_weight[number] = float(tokens.probs.sum(dtype=torch.float64))
        stats.output_sq[number] = float(norms_sq.sum())
        # The sums, not the means: error compensation adds them up in float32.
        for sums, what in ((stats.imatrix_in, "inputs"), (stats.imatrix_mid, "inputs of down")):
            check_finite(sums[number], f"sums of squared {what}")
            sums[number] /= max(1, len(tokens))
        check_finite(stats.output_sq[number], "sums of squared outputs")
        sample = self._sample(number, flat, norm, routing, tokens, norms_sq, hidden_sq)
        found = self._errors(number, expert, sample, stats)
        stats.sq_error[number], stats.relative_error[number] = found.block, found.relative
        stats.weight_error[number], stats.hessian_trace[number] = found.weight, found.trace
        self._check_errors(expert, found)

    def _check_errors(self, expert: Expert, found: ExpertErrors) -> None:
        """Raises McError for errors that are not finite; where a type does not fit they are infinite."""
        check_finite(found.trace, "curvatures")
        matrices = (expert.gate, expert.up, expert.down)
        for t, name in enumerate(self.types):
            fits = [TYPES[name].fits(m.shape[1]) for m in matrices]
            for errors in (found.block, found.relative, found.weight):
                check_finite(errors[fits, t], f"errors of {name}")

    def _sample(
        self,
        number: int,
        flat: Tensor,
        norm: Tensor,
        routing: RouterOutput,
        tokens: RoutedTokens,
        norms_sq: Tensor,
        hidden_sq: Tensor,
    ) -> Sample:
        """Up to max_tokens of the expert's tokens; for an expert without any the nearest, worth one together.

        `hidden_sq` [n]: squared norm of the hidden state after the expert. Where an expert makes a massive
        activation, that is what the next layer's norm divides by.
        """
        limit = self.options.max_tokens
        if not len(tokens):
            tokens = self.decoder.nearest_tokens(routing, number, limit)
            hidden = flat[tokens.index]
            weights = tokens.weights / len(tokens) ** 0.5
            return Sample(self.decoder.norm(hidden, norm), weights, _inverse_norm(hidden.square().sum(1)))
        rng = np.random.default_rng([self.options.seed, self.layer, number, 1])
        relative = norms_sq / hidden_sq.clamp(min=1e-30)
        # Tokens that matter to either sum of errors.
        importance = norms_sq / norms_sq.sum().clamp(min=1e-30) + relative / relative.sum().clamp(min=1e-30)
        drawn = draw(importance.numpy(), limit, rng)
        x = self.decoder.norm(flat[tokens.index[drawn.index]], norm)
        scale = _inverse_norm(hidden_sq[drawn.index])
        return Sample(x, tokens.weights[drawn.index] * drawn.weight.sqrt(), scale)

    def _errors(self, number: int, expert: Expert, sample: Sample, stats: LayerStatistics) -> ExpertErrors:
        return expert_errors(
            expert,
            sample,
            stats.imatrix_in[number].astype(np.float32),
            stats.imatrix_mid[number].astype(np.float32),
            self.types,
            max_rows=self.options.max_rows,
            seed=(self.options.seed, self.layer, number),
            threads=self.threads,
        )


def _mean_cosine(before: Tensor, added: Tensor) -> float:
    """Mean cosine between the hidden states [n, n_embd] before and after the feed-forward block adds to
    them.
    """
    parts = zip(torch.split(before, CHUNK), torch.split(added, CHUNK), strict=True)
    total = sum(float(torch.cosine_similarity(a, a + b, dim=-1).sum(dtype=torch.float64)) for a, b in parts)
    return total / len(before)


def _inverse_norm(sq: Tensor) -> Tensor:
    return sq.clamp(min=1e-30).rsqrt().float()
