"""One layer's measurement, from the spool: what its experts see, do and would lose under every type.

Every expert is handled once: its weights are read, its statistics collected (frequency, routing weight,
importance matrices, output norm), the error of every candidate type measured (expert_errors.py), the effect
of rounding it computed for the sampled tokens (disturbance.py), and its weights freed.

An expert that no token reached keeps a zero importance matrix, which quantizers treat like ones, and counts
as if one token had reached it: by the rule of succession no more can be said. Its error is the mean over the
tokens that come nearest to being routed there (Routing.nearest).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_gguf.artifacts import Floats
from mc_gguf.calibrate.disturbance import Disturbance
from mc_gguf.calibrate.expert_errors import ExpertErrors, Sample, draw, expert_errors, imatrix_errors
from mc_gguf.calibrate.finite import check_finite, place
from mc_gguf.calibrate.options import CalibrationOptions
from mc_gguf.calibrate.routed import RoutedTokens, Routing
from mc_gguf.calibrate.statistics import N_QUANTILES, LayerStatistics
from mc_gguf.calibrate.verify import verified_function
from mc_gguf.capture.capture import LayerRows
from mc_gguf.capture.expert import aligned, read_expert
from mc_gguf.capture.function import ExpertFunction
from mc_gguf.common.progress import Progress
from mc_gguf.ggml.types import TYPES
from mc_gguf.source import Checkpoint

_CHUNK = 2048  # rows of inputs at once

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LayerResult:
    """What was measured of one layer: its statistics, and what rounding and dropping changes in its output
    for the sampled tokens, float32 [2, S, n_embd] (dropped, rounded).
    """

    statistics: LayerStatistics
    disturbances: Tensor


@dataclass(frozen=True)
class LayerMeasurement:
    """Measures a layer of a model for `types`; `samples` are the numbers of the sampled tokens."""

    checkpoint: Checkpoint
    rows: LayerRows
    types: tuple[str, ...]
    samples: NDArray[np.int64]
    options: CalibrationOptions
    threads: int

    @property
    def layer(self) -> int:
        return self.rows.layer

    def run(self, bar: Progress) -> LayerResult:
        """Measure. Raises SourceError for values that are not finite."""
        info, rows, layer = self.checkpoint.info, self.rows, self.layer
        stats = LayerStatistics.zeros(info, self.types)
        with place(layer, "router"):
            routing = Routing(rows)
            check_finite(routing.probs, "probabilities")
        for number, squares in enumerate(rows.sum("middle_sq")):  # before the output, which is made of them
            with place(layer, f"expert {number}"):
                check_finite(squares, "sums of squared inputs of down")
        with place(layer, "output"):
            check_finite(rows.hidden_sq.astype(np.float64), "squared hidden states")
        disturbance = Disturbance(routing, self.samples, info.expert_width)
        function, why = verified_function(self.checkpoint, routing)
        if function is None:
            log.warning(
                "layer %d: what its experts compute is not recognised (%s), so errors are measured with "
                "importance matrices alone, which is less exact",
                layer,
                why,
            )
        for number in range(info.n_expert):
            with place(layer, f"expert {number}"):
                self._expert(number, routing, function, disturbance, stats)
            bar.advance(1, f"layer {layer}")
        self._of_layer(routing, stats)
        with place(layer, "sensitivity"):
            if function is None:
                self._make_up(disturbance)
            thresholds = stats.ratio_quantiles[: routing.experts.shape[1] - 1]
            median = thresholds[:, thresholds.shape[1] // 2]
            stats.routing_curve[:] = disturbance.curve(thresholds)
            stats.rounding_error[...] = disturbance.error / len(self.samples)
            check_finite(stats.routing_curve, "errors of dropped experts")
            check_finite(stats.rounding_error, "errors of rounded experts")
            return LayerResult(stats, torch.stack([disturbance.dropped(median), disturbance.rounded]))

    def _of_layer(self, routing: Routing, stats: LayerStatistics) -> None:
        rows = self.rows
        stats.block_score[...] = 1 - float(rows.sum("cosine", float(rows.n))[0]) / rows.n
        stats.hidden_max[...] = float(rows.sum("hidden_max")[0])
        stats.hidden_median[...] = float(rows.sum("hidden_median")[0])
        probs = routing.sorted_probs
        ratios = probs[:, 1:] / np.maximum(probs[:, :1], 1e-30)
        n_rank = ratios.shape[1]
        stats.ratio_quantiles[:n_rank] = np.quantile(ratios, np.linspace(0, 1, N_QUANTILES), axis=0).T

    def _expert(
        self,
        number: int,
        routing: Routing,
        function: ExpertFunction | None,
        disturbance: Disturbance,
        stats: LayerStatistics,
    ) -> None:
        """Fill in one expert's share of `stats`, and add it to the disturbance."""
        rows, tokens = self.rows, routing.tokens_of(number)
        stats.frequency[number] = len(tokens)
        stats.routing_weight[number] = float(tokens.probs.sum())
        norms_sq = rows.output_sq[tokens.index, tokens.slots].astype(np.float64)
        stats.output_sq[number] = float(norms_sq.sum())
        stats.down_max[number] = float(rows.output_max[tokens.index, tokens.slots].max(initial=0.0))
        middle = rows.sum("middle_sq")[number]
        sums = np.zeros(stats.imatrix_in.shape[1])
        for first in range(0, len(tokens), _CHUNK):
            part = slice(first, first + _CHUNK)
            x = rows.inputs(tokens.index[part], tokens.slots[part])
            sums += x.square().sum(0, dtype=torch.float64).numpy()
        # The sums, not the means, here and in run(): error compensation adds them up in float32.
        check_finite(sums, "sums of squared inputs")
        stats.imatrix_in[number] = sums / max(1, len(tokens))
        stats.imatrix_mid[number][: len(middle)] = middle / max(1, len(tokens))
        check_finite(stats.output_sq[number], "sums of squared outputs")
        found = self._errors(number, routing, tokens, norms_sq, function, disturbance, stats)
        stats.sq_error[number], stats.relative_error[number] = found.block, found.relative
        stats.weight_error[number], stats.hessian_trace[number] = found.weight, found.trace
        self._check_errors(found)

    def _errors(
        self,
        number: int,
        routing: Routing,
        tokens: RoutedTokens,
        norms_sq: Floats,
        function: ExpertFunction | None,
        disturbance: Disturbance,
        stats: LayerStatistics,
    ) -> ExpertErrors:
        into = stats.imatrix_in[number].astype(np.float32)
        middle = stats.imatrix_mid[number, : self._n_ff].astype(np.float32)
        max_rows, seed = self.options.max_rows, (self.options.seed, self.layer, number)
        if function is None:
            projections = self.checkpoint.info.projections
            matrices = {p: aligned(self.checkpoint.expert(self.layer, p, number)) for p in projections}
            relative = float((norms_sq / np.maximum(self.rows.hidden_sq[tokens.index], 1e-30)).sum())
            total = float(norms_sq.sum())
            return imatrix_errors(
                matrices, total, relative, into, middle, self.types, max_rows, seed, self.threads
            )
        expert = read_expert(self.checkpoint, self.layer, number, function)
        disturbance.add_rounded(number, expert)
        sample = self._sample(number, routing, tokens, norms_sq)
        return expert_errors(expert, sample, into, middle, self.types, max_rows, seed, self.threads)

    @property
    def _n_ff(self) -> int:
        return self.checkpoint.info.expert_shape("down", self.layer)[1]

    def _sample(self, number: int, routing: Routing, tokens: RoutedTokens, norms_sq: Floats) -> Sample:
        """Up to max_tokens of the expert's tokens; for an expert without any the nearest, worth one together.

        Errors are relative to the hidden state after the layer: where an expert makes a massive activation,
        that is what the next layer's norm divides by.
        """
        limit, hidden_sq = self.options.max_tokens, self.rows.hidden_sq
        if not len(tokens):
            tokens = routing.nearest(number, limit)
            weights, index = tokens.weights / len(tokens) ** 0.5, tokens.index
            return self._sample_of(index, tokens.slots, weights)
        rng = np.random.default_rng([self.options.seed, self.layer, number, 1])
        relative = norms_sq / np.maximum(hidden_sq[tokens.index], 1e-30)
        # Tokens that matter to either sum of errors.
        importance = norms_sq / max(norms_sq.sum(), 1e-30) + relative / max(relative.sum(), 1e-30)
        drawn = draw(importance, limit, rng)
        at = drawn.index.numpy()
        weights = tokens.weights[at] * drawn.weight.double().sqrt().numpy()
        return self._sample_of(tokens.index[at], tokens.slots[at], weights)

    def _sample_of(self, index: NDArray[np.int64], slots: NDArray[np.int64], weights: Floats) -> Sample:
        hidden_sq = torch.from_numpy(self.rows.hidden_sq[index].astype(np.float64))
        scale = hidden_sq.clamp(min=1e-30).rsqrt().float()
        return Sample(self.rows.inputs(index, slots), torch.from_numpy(weights).float(), scale)

    def _check_errors(self, found: ExpertErrors) -> None:
        """Raises McError for errors that are not finite; where a type does not fit they are infinite."""
        check_finite(found.trace, "curvatures")
        info = self.checkpoint.info
        widths = [info.expert_shape(p, self.layer)[1] for p in info.projections]
        for t, name in enumerate(self.types):
            fits = [TYPES[name].fits(width) for width in widths]
            for errors in (found.block, found.relative, found.weight):
                check_finite(errors[fits, t], f"errors of {name}")

    def _make_up(self, disturbance: Disturbance) -> None:
        """Without a function nothing can be rounded: a tenth of the outputs' energy in random directions."""
        outputs = self.rows.sampled_outputs()
        generator = torch.Generator().manual_seed(self.options.seed)
        noise = torch.randn(outputs.shape, generator=generator)
        size = outputs.square().sum(2, keepdim=True) * 0.1
        noise *= (size / noise.square().sum(2, keepdim=True)).sqrt()
        hidden = torch.from_numpy(self.rows.hidden_sq[self.samples].astype(np.float64)).clamp(min=1e-30)
        disturbance.error = float((size[..., 0].sum(1) / hidden).sum())
        disturbance.rounded = noise.sum(1)
