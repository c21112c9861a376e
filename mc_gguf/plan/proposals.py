"""Sizes to choose from when no budget was given: exact sizes of files with one type for all experts.

A mixed-expert file of the same size has about the same bits per expert weight, and less error.
"""

from __future__ import annotations

from mc_gguf.artifacts import Calibration
from mc_gguf.common.errors import BudgetError, SizeProposal
from mc_gguf.plan.problem import FileBytes
from mc_gguf.plan.request import PlanRequest

PROPOSED_BPW = (1.75, 2.0625, 2.5625, 3.0625, 3.4375, 4.25)  # of ggml types from IQ1_M to IQ4_XS
MEMORY_SHARE = 0.85  # of the memory may be the file's; the rest is for the context and everything else


def propose_sizes(
    stand_in: Calibration, file_bytes: FileBytes, memory_bytes: int
) -> tuple[SizeProposal, ...]:
    """Sizes for the model of `stand_in` (see mc_gguf.plan.stand_in), smallest first."""
    found: dict[int, SizeProposal] = {}
    for bpw in PROPOSED_BPW:
        try:
            plan = PlanRequest(bpw=bpw, strategy="uniform").plan(stand_in, file_bytes)
        except BudgetError:  # the model's rows fit no type that is so small
            continue
        assert plan.file_bytes is not None  # file_bytes was given
        fits = plan.file_bytes <= MEMORY_SHARE * memory_bytes
        found[plan.file_bytes] = SizeProposal(plan.file_bytes, plan.expert_bpw, fits)
    return tuple(found[size] for size in sorted(found))
