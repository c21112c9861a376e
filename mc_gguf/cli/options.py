"""The options that several commands share. One name means the same everywhere, and is the name of the
parameter of the function that the command calls.

Cheap to import, so names and defaults are spelled here; a test compares them with the library's.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from mc_gguf.cli.command import Decorator, OptionMaker, section, together


class _PathName(click.Path):
    """A path; an empty text, which Path takes for the current directory, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("an empty text is no path; is a variable of the shell not set?", param, ctx)
        return super().convert(value, param, ctx)


PATH = _PathName(path_type=Path)


class FiniteFloat(click.FloatRange):
    """A number in a range; NaN, which is neither below nor above anything, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


output = section("Output")
budget = section("Output and budget")
calibration = section("Calibration")
tensors = section("Types of experts and other tensors")
speed = section("Speed and quality")
resume = section("Resume")
printed = section("What is printed")
research = section("For research")


def output_option(what: str, required: bool = True, option: OptionMaker = output) -> Decorator:
    """-o, under the heading that `option` stands for."""
    return option("-o", "--output", type=PATH, required=required, help=what)


threads_option = speed(
    "--threads",
    type=click.IntRange(1, 512),  # as many as ggml has
    help="Threads.  [default: all usable cores; chat and eval leave out those that are busy]",
)
gpu_options = together(
    speed(
        "-ngl",
        "--gpu-layers",
        type=click.IntRange(0, 9999),
        default=0,
        show_default=True,
        help="Layers that the runtime computes on a GPU.",
    ),
    speed(
        "--n-cpu-moe",
        "cpu_moe",
        type=click.IntRange(0, 9999),
        default=0,
        show_default=True,
        help="How many of them keep their experts in the CPU's memory.",
    ),
)
routing_option = speed(
    "--routing",
    default="off",
    show_default=True,
    metavar="R",
    help="Which experts a token may do without: off, auto (what the file says), or a policy with options: "
    "odp:target_drop=15%, odp:quantile=0.3,protect=0.05, threshold:threshold=0.5, keep_min:ratio=0.4, "
    "top_p:top_p=0.9, random:rate=0.2,seed=1. `mc-gguf routing policies` explains them all.",
)
seed_option = research(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Random seed."
)
compensate_option = speed(
    "--compensate/--no-compensate",
    default=True,
    show_default=True,
    help="Round experts with error compensation: slower, and much closer to 16 bits.",
)
bank_option = speed(
    "--bank",
    type=PATH,
    help="Keep and reuse quantized experts in this folder. refine and quantize share the compensated ones.",
)
calibration_text_option = calibration(
    "--calibration-text",
    type=PATH,
    multiple=True,
    help="The text that the calibration was made from; may be repeated.  [default: the bundled mixture]",
)
plan_calibration_option = calibration(
    "--calibration", type=PATH, help="The plan's calibration file.  [default: found beside the plan]"
)
resume_option = resume(
    "--resume/--no-resume", default=True, show_default=True, help="Continue a run that was killed."
)
quiet_option = printed("--quiet", is_flag=True, help="Show no progress on stderr; warnings remain.")
json_option = printed(
    "--json", "as_json", is_flag=True, help="Print the result as one JSON document, and nothing else."
)

budget_options = together(
    budget("--size", metavar="SIZE", help="Largest size of the whole file: 15.5GiB, 16GB, or bytes."),
    budget(
        "--bpw",
        type=float,
        metavar="X",
        help="Instead: average bits per routed expert weight; 16 makes a plain 16-bit file.",
    ),
)

tensor_options = together(
    tensors(
        "--types",
        metavar="T,T,...",
        help="ggml types to choose from for experts.  [default: all that are measured]",
    ),
    tensors(
        "--strategy",
        metavar="NAME",
        help="pmq (one program over the whole model), layer (one type per layer and projection, so that "
        "stock llama.cpp runs the file), or uniform (one type for all experts). For research: mc (the "
        "published allocation, layer by layer), the published baselines bsp, frequency, routing-weight, "
        "f-norm and hessian, and the controls random and inverted.  [default: pmq]",
    ),
    tensors(
        "--others",
        metavar="NAME|T,T,...",
        help="Types of the matrices that are not experts (attention, shared experts, dense layers): fixed "
        "(those of the next two options), or chosen within the same --size: auto (from all measured types), "
        "or from the types given here.  [default: auto with --size, strategy pmq or layer and objective kld, "
        "unless one of the next two options is given; else fixed]",
    ),
    tensors(
        "--attn-type",
        metavar="T",
        help="Type of attention q and output, and of all without an option.  [default: Q6_K]",
    ),
    tensors("--attn-kv-type", metavar="T", help="Type of attention k and v.  [default: Q8_0]"),
    tensors("--embd-type", metavar="T", help="Type of the token embeddings.  [default: Q6_K]"),
    tensors("--output-type", metavar="T", help="Type of the output matrix.  [default: Q6_K]"),
)

research_options = together(
    research(
        "--bits-per-layer",
        type=int,
        metavar="N",
        help="A budget in nominal bits, summed over a layer's experts. Implies strategy mc.",
    ),
    research(
        "--objective",
        metavar="NAME",
        help="What pmq, layer and the controls minimise: kld (divergence of the model's output), block "
        "(error of the MoE block's output), relative (the same, relative to the hidden states), published, "
        "or what a baseline minimises: bsp, frequency, routing-weight, f-norm or hessian.  [default: kld]",
    ),
    seed_option,
)


def text_options(what: str, tokens: int, of_tokens: str) -> Decorator:
    """--text, --tokens and --ctx: what a command reads."""
    return together(
        calibration(
            "--text",
            type=PATH,
            multiple=True,
            help=f"{what}, UTF-8; may be repeated.  [default: the bundled mixture]",
        ),
        calibration(
            "--tokens", type=click.IntRange(min=2), default=tokens, show_default=True, help=of_tokens
        ),
        calibration(
            "--ctx",
            type=click.IntRange(min=2),
            default=512,
            show_default=True,
            help="Tokens per row of text; at most the model's context.",
        ),
    )


calibration_options = together(
    text_options("Text to calibrate on", 65_536, "Tokens to use, spread over the whole text."),
    calibration(
        "--rows",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Rows of a matrix on which the errors of the types are measured.",
    ),
)
