"""convert() and make_plan(): a file or a plan in one call."""

from __future__ import annotations

from pathlib import Path

from mc_gguf.artifacts import Calibration, Plan
from mc_gguf.common.arguments import Names, PathLike, Paths
from mc_gguf.common.errors import about
from mc_gguf.common.extras import require_extra
from mc_gguf.common.files import check_output
from mc_gguf.common.progress import ProgressListener, listening
from mc_gguf.container import MixedGguf
from mc_gguf.conversion import Conversion, ConversionRequest, file_bytes_for
from mc_gguf.plan.request import PlanRequest


def convert(
    source: PathLike,
    output: PathLike,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    bits_per_layer: int | None = None,
    strategy: str | None = None,
    objective: str | None = None,
    types: Names | None = None,
    others: Names | None = None,
    attn_type: str | None = None,
    attn_kv_type: str | None = None,
    embd_type: str | None = None,
    output_type: str | None = None,
    text: Paths = (),
    tokens: int = 65_536,
    ctx: int = 512,
    rows: int = 256,
    calibration: PathLike | None = None,
    compensate: bool = True,
    refine: str | float | None = None,
    seed: int = 0,
    threads: int | None = None,
    gpu_layers: int = 0,
    cpu_moe: int = 0,
    resume: bool = True,
    quiet: bool = False,
    progress: ProgressListener | None = None,
) -> MixedGguf:
    """Make a mixed-expert GGUF of a model within a budget: calibrate, plan, refine and quantize.

    The calibration and the plan stay beside the output. A killed run continues where it was when it is
    started again with the same arguments, and gives the same bytes. (With `refine` the result depends on how
    far the search came in its time; the plan that it found is kept too.)

    Args:
        source: a Hugging Face directory or a GGUF; of a quantized one, what its types stand for.
        output: the GGUF to write.
        size: largest size of the whole file, "15.5GiB" or bytes.
        bpw: average bits per routed expert weight; 16 makes a plain 16-bit file.
        bits_per_layer: nominal bits summed over a layer's experts, for strategy mc. Give exactly one of these
            three budgets.
        strategy: a name in mc_gguf.plan.STRATEGIES; by default mc with `bits_per_layer`, else pmq.
        objective: what the strategy minimises, a name in mc_gguf.plan.OBJECTIVES.
        types: ggml types to measure and to choose from for experts; by default all candidates.
        others, attn_type, attn_kv_type, embd_type, output_type: types of other tensors; see PlanRequest.
        text: UTF-8 files to calibrate on; by default the mixture that comes with mc_gguf.
        tokens: tokens to use, spread over the whole text.
        ctx: tokens per row of text; at most the model's context.
        rows: rows of a matrix on which the errors of the types are measured.
        calibration: use this calibration file; by default the one beside the output if it was made from the
            same model, text and options, else a new one.
        compensate: round experts with error compensation, on the calibration's text.
        refine: search this long ("10m", or seconds) for a better plan of the same size.
        seed: random seed of every step.
        threads: threads; by default all usable cores.
        gpu_layers: layers that the runtime computes on a GPU while it calibrates; 0 computes on the CPU.
        cpu_moe: how many of these layers keep their experts in the CPU's memory.
        resume: continue a killed run; False starts again.
        quiet: show no progress on stderr.
        progress: called with a ProgressState for every bit of progress, instead of showing it on stderr.

    Returns:
        The file that was written, opened and validated.

    Raises:
        NoBudgetError: no budget was given; it carries sizes to choose from.
        BudgetError: the budget cannot be met, or there are several.
        MissingExtraError: torch or another package of mc-gguf[convert] is not installed.
        SourceError: the model or the text cannot be read, or the architecture is not supported.
        ArtifactError: the given calibration belongs to another model.
        McError: arguments contradict each other; `parameters` names them.

    Example:
        >>> from mc_gguf import convert
        >>> few = {"tokens": 2048, "ctx": 128, "types": "Q2_K,Q3_K"}
        >>> model = convert("models/tiny-mixtral", "m.gguf", size="6.5MiB", **few)
        >>> model.header.file_bytes <= 6.5 * 2**20
        True
    """
    request = ConversionRequest(
        size=size,
        bpw=bpw,
        bits_per_layer=bits_per_layer,
        strategy=strategy,
        objective=objective,
        types=types,
        others=others,
        attn_type=attn_type,
        attn_kv_type=attn_kv_type,
        embd_type=embd_type,
        output_type=output_type,
        text=text,
        tokens=tokens,
        ctx=ctx,
        rows=rows,
        calibration=calibration,
        compensate=compensate,
        refine=refine,
        seed=seed,
        threads=threads,
        gpu_layers=gpu_layers,
        cpu_moe=cpu_moe,
        resume=resume,
        quiet=quiet,
    )
    work = Conversion(Path(source), Path(output), request)
    with listening(progress), work.reserved():
        return work.write(work.plan())


def make_plan(
    calibration: PathLike,
    output: PathLike | None = None,
    *,
    size: str | int | None = None,
    bpw: float | None = None,
    bits_per_layer: int | None = None,
    strategy: str | None = None,
    objective: str | None = None,
    types: Names | None = None,
    others: Names | None = None,
    attn_type: str | None = None,
    attn_kv_type: str | None = None,
    embd_type: str | None = None,
    output_type: str | None = None,
    seed: int = 0,
) -> Plan:
    """Decide the type of every expert under a budget.

    Args:
        calibration: a file made by calibrate(), or published statistics (JSON; with `bits_per_layer` only).
        output: the plan to write (JSON); None writes nothing.
        size, bpw, bits_per_layer: give exactly one budget, as for convert().
        strategy, objective, types, seed: how types are chosen for experts, and from which; see PlanRequest.
        others, attn_type, attn_kv_type, embd_type, output_type: types of other tensors; see PlanRequest.

    Returns:
        The plan; with its fingerprint if it was written.

    Raises:
        MissingExtraError: scipy of mc-gguf[convert] is not installed.
        BudgetError: there is no budget, there are several, or the budget cannot be met.
        ArtifactError: the calibration cannot be read, or lacks what the strategy needs.
        McError: a name is unknown, or arguments contradict each other; `parameters` names them.

    Example:
        >>> from mc_gguf import make_plan
        >>> plan = make_plan("m.calib.safetensors", "m.plan.json", bpw=2.8)
        >>> plan.expert_bpw <= 2.8
        True
        >>> plan.type_of(layer=0, expert=3, projection="down") in ("Q2_K", "Q3_K")
        True
    """
    request = PlanRequest(
        size=size,
        bpw=bpw,
        bits_per_layer=bits_per_layer,
        strategy=strategy,
        objective=objective,
        types=types,
        others=others,
        attn_type=attn_type,
        attn_kv_type=attn_kv_type,
        embd_type=embd_type,
        output_type=output_type,
        seed=seed,
    )
    require_extra("convert", "scipy")
    if output is not None:
        with about("output"):
            check_output(Path(output), [Path(calibration)])
    known = Calibration.load(Path(calibration))
    plan = request.plan(known, file_bytes_for(known))
    return plan if output is None else plan.save(Path(output))
