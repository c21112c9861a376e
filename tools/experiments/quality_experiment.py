"""Measure how close every allocation and quantizer comes to the 16-bit model, at equal file bytes.

    python -m tools.experiments.quality_experiment run DIR [--model HF_DIR] [--tokens 2048]
        [--seeds 3] [--jobs 2]
    python -m tools.experiments.quality_experiment report DIR

The sizes are those of the files that one stock type makes (IQ1_M 1.75 bits per expert weight, IQ2_XXS 2.06,
IQ2_XS 2.31, IQ2_S 2.56, IQ3_XXS 3.06, Q3_K and IQ3_S 3.44) and those of llama-quantize's recipes. Every other
arm is planned for the bytes of that very file. All arms have the same attention, embedding and output types,
and those of one seed have the same importance matrix. The recipes go through llama_model_quantize with these
types as overrides; llama.cpp itself decides their expert types. One arm differs: pmq-attention decides the
types of the attention matrices within the same bytes too, as `plan --size` does by default.

None of the texts is calibration text. They are WikiText-2 test (in domain, because the calibration mixture
holds WikiText-2 valid), and C++ (src/llama-vocab.cpp) and Markdown (tools/server/README.md) of the pinned
llama.cpp. `run` prints how many of their 8-word sequences occur in the calibration text.

results.json holds one record per file and text; what it holds is not measured again. `report` writes table.md
and curves.svg (with matplotlib: pip install 'mc-gguf[plot]').
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from tools.common import CALIBRATION_TEXT, MODEL, WIKITEXT

MARKDOWN = "vendor/llama.cpp/tools/server/README.md"
UNIFORM = ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q3_K")
# enum llama_ftype
RECIPES = {
    "IQ1_S": 24,
    "IQ1_M": 31,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "IQ2_S": 28,
    "Q2_K": 10,
    "IQ3_XXS": 23,
    "Q3_K_M": 12,
}
ONLY_UNIFORM = ("Q3_K",)  # as large as IQ3_S, at which the other arms are measured
MAIN = ("pmq", "pmq-attention", "layer", "mc")
RECIPE_ARMS = ("pmq", "pmq-attention")
CONTROLS = ("bsp", "frequency", "routing-weight", "f-norm", "hessian", "random", "inverted")
EVERY = (*MAIN, *CONTROLS)
FIXED_PATTERNS = {r"attn_[kv]\.weight": "attn_kv", r"attn_(q|output)\.weight": "attn"}


@dataclass(frozen=True)
class Arm:
    """How a file is made: by `strategy`, within the bytes of `size` (a stock type or "recipe X")."""

    size: str
    strategy: str
    compensated: bool
    seed: int

    @property
    def name(self) -> str:
        return f"{self.strategy}{' + compensation' if self.compensated else ''}"

    @property
    def file_name(self) -> str:
        return "-".join([self.size, self.strategy, "c" if self.compensated else "p", str(self.seed)]).replace(
            " ", "-"
        )


def arms(n_seed: int, sizes: Sequence[str], compensate: bool) -> Iterator[Arm]:
    """The arms in the order in which they are measured; the one that gives the bytes comes first."""
    for seed in range(n_seed):
        for size in sizes:
            is_recipe = size.startswith("recipe ")
            if is_recipe and seed:
                continue
            others: tuple[str, ...] = () if size in ONLY_UNIFORM else RECIPE_ARMS if is_recipe else EVERY
            for strategy in ("llama-quantize" if is_recipe else "uniform", *others):
                yield Arm(size, strategy, False, seed)
                if compensate and strategy != "llama-quantize":
                    yield Arm(size, strategy, True, seed)


class Workshop:
    """Makes the files; calibrations and quantized matrices are made once.

    `tokens` to calibrate on (None: as many as mc-gguf by default) and `types` to measure (None: all).
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        threads: int,
        tokens: int | None = None,
        types: tuple[str, ...] | None = None,
    ) -> None:
        from mc_gguf.artifacts import Calibration
        from mc_gguf.source import open_checkpoint

        self.folder, self.threads, self.tokens, self.types = folder, threads, tokens, types
        self.checkpoint = open_checkpoint(model)
        self.calibrations: dict[int, Calibration] = {}
        self.banks: dict[int, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def calibration(self, seed: int) -> Any:
        from mc_gguf.artifacts import Calibration
        from mc_gguf.calibrate.calibrator import calibrate_to_file
        from mc_gguf.calibrate.options import CalibrationOptions
        from mc_gguf.source.text import DEFAULT_TOKENS, load_corpus

        if seed not in self.calibrations:
            path = self.folder / f"seed-{seed}.calib.safetensors"
            if not path.exists():
                text = load_corpus(self.checkpoint, tokens=self.tokens or DEFAULT_TOKENS, seed=seed)
                options = CalibrationOptions(types=self.types, seed=seed, threads=self.threads)
                calibrate_to_file(self.checkpoint, text, path, options)
            self.calibrations[seed] = Calibration.load(path)
        return self.calibrations[seed]

    def sixteen_bit(self) -> Path:
        """The reference. It carries the routing metadata, so that what is made from it has it too."""
        from mc_gguf.plan import Budget

        path = self.folder / "16-bit.gguf"
        if not path.exists():
            self._quantize(self._plan(Budget(bpw=16.0), "pmq", 0, self.calibration(0)), 0, None, path)
        return path

    def make(self, arm: Arm) -> Path:
        from mc_gguf.plan import Budget

        path = self.folder / f"{arm.file_name}.gguf"
        if path.exists():
            return path
        if arm.strategy == "llama-quantize":
            self._recipe(arm, path)
            return path
        calibration = self.calibration(arm.seed)
        if arm.strategy == "uniform":
            plan = self._plan(Budget(bpw=_bpw(arm.size)), "uniform", arm.seed, calibration, (arm.size,))
        else:
            first = "llama-quantize" if arm.size.startswith("recipe ") else "uniform"
            size = self.make(Arm(arm.size, first, False, arm.seed)).stat().st_size
            plan = self._plan(Budget(size_bytes=size), arm.strategy, arm.seed, calibration)
        self._quantize(plan, arm.seed, self._bank(plan, arm), path)
        return path

    def _plan(self, budget: Any, strategy: str, seed: int, calibration: Any, types: Any = None) -> Any:
        from mc_gguf.conversion import file_bytes_for
        from mc_gguf.plan.request import PlanRequest

        base = strategy.removesuffix("-attention")
        others = "fixed" if base == strategy else "auto"
        request = PlanRequest(
            bpw=budget.bpw, size=budget.size_bytes, strategy=base, types=types, seed=seed, others=others
        )
        name = "-".join([strategy, str(seed), *(f"{v:g}" for v in budget.to_json().values()), *(types or ())])
        plan = request.plan(calibration, file_bytes_for(calibration))
        return plan.save(self.folder / f"{name}.plan.json")

    def _bank(self, plan: Any, arm: Arm) -> Any:
        """The plan's matrices, quantized with or without compensation."""
        from mc_gguf.artifacts import PROJECTIONS
        from mc_gguf.common.progress import progress
        from mc_gguf.compensate import experts as compensation

        calibration = self.calibration(arm.seed)
        if not arm.compensated:
            return _plain_bank(self.folder, self.checkpoint, calibration, plan, self.threads)
        if arm.seed not in self.banks:  # every matrix in every type: the Hessians are collected once
            bank = compensation.open_bank(self.folder / "bank", calibration)
            text = compensation.calibration_text(self.checkpoint, calibration)
            every = frozenset((p, t) for p in PROJECTIONS for t in calibration.types)
            experts = range(self.checkpoint.info.n_expert)
            wanted = {(layer, expert): every for layer in calibration.layers for expert in experts}
            with progress(f"compensation, seed {arm.seed}", unit="matrices") as bar:
                compensation.compensate(self.checkpoint, calibration, wanted, text, bank, self.threads, bar)
            self.banks[arm.seed] = bank
        return self.banks[arm.seed]

    def _quantize(self, plan: Any, seed: int, bank: Any, path: Path) -> None:
        from mc_gguf.quantize.writer import write_model

        calibration = self.calibration(seed)
        write_model(self.checkpoint, calibration, plan, path, self.threads, resume=False, bank=bank)

    def _recipe(self, arm: Arm, path: Path) -> None:
        from mc_gguf.artifacts import FixedTypes
        from mc_gguf.ggml.types import ggml_type
        from mc_gguf.runtime import use_in_llama_cpp
        from tools.bench_quantize import upstream_imatrix

        llama_cpp = use_in_llama_cpp()
        fixed = FixedTypes()
        params = llama_cpp.llama_model_quantize_default_params()
        params.nthread, params.ftype = self.threads, RECIPES[arm.size.removeprefix("recipe ")]
        params.output_tensor_type = ggml_type(fixed.output).id
        params.token_embedding_type = ggml_type(fixed.token_embd).id
        kept = upstream_imatrix(llama_cpp, self.checkpoint.info, self.calibration(arm.seed))
        params.imatrix = kept
        overrides = _overrides(
            llama_cpp, {p: ggml_type(getattr(fixed, n)).id for p, n in FIXED_PATTERNS.items()}
        )
        params.tt_overrides = overrides
        source, partial_path = self.sixteen_bit(), path.with_suffix(".partial")
        if llama_cpp.llama_model_quantize(
            str(source).encode(), str(partial_path).encode(), ctypes.byref(params)
        ):
            raise click.ClickException(f"llama_model_quantize failed for {arm.size}")
        partial_path.replace(path)


def _overrides(llama_cpp: Any, types: dict[str, int]) -> Any:
    """A null-terminated array of llama_model_tensor_override."""
    kind = llama_cpp.llama_model_tensor_override
    entries = [kind(pattern.encode(), number) for pattern, number in types.items()]
    return (kind * (len(entries) + 1))(*entries)


def _bpw(type_name: str) -> float:
    from mc_gguf.ggml.types import ggml_type

    return ggml_type(type_name).bpw


def _plain_bank(folder: Path, checkpoint: Any, calibration: Any, plan: Any, threads: int) -> Any:
    """The plan's matrices, quantized by ggml's quantizers."""
    from mc_gguf.artifacts import PROJECTIONS
    from mc_gguf.compensate.bank import Bank, bank_key
    from mc_gguf.ggml.quantizers import quantize_rows

    info = checkpoint.info
    bank = Bank(folder / "bank", bank_key(info.fingerprint, calibration.fingerprint, "ggml"))
    for layer in plan.layers:
        for expert in range(info.n_expert):
            for projection in PROJECTIONS:
                name = plan.type_of(layer, expert, projection)
                if bank.get(layer, projection, expert, name) is None:
                    weights = checkpoint.expert(layer, projection, expert)
                    imatrix = calibration.imatrix(layer, projection, expert)
                    blocks = quantize_rows(weights, name, imatrix, threads)
                    bank.put(layer, projection, expert, name, blocks)
    return bank


def text_files(folder: Path) -> dict[str, Path]:
    """WikiText-2 test, and code and prose from the pinned source distribution."""
    from mc_gguf.runtime import packages, upstream

    markdown = folder / "server-readme.md"
    if not markdown.exists():
        name = upstream.pin().sdist_name
        with tarfile.open(upstream.cache_dir() / "downloads" / name) as archive:
            member = archive.extractfile(f"{name.removesuffix('.tar.gz')}/{MARKDOWN}")
            assert member is not None
            markdown.write_bytes(member.read())
    code = packages.source_dir() / "src" / "llama-vocab.cpp"
    return {"WikiText-2": WIKITEXT, "C++": code, "Markdown": markdown}


def overlap(text: Path) -> float:
    """The share of the text's 8-word sequences that occur in the bundled calibration text."""
    known = set(_sequences(CALIBRATION_TEXT.read_text(encoding="utf-8")))
    found = list(_sequences(text.read_text(encoding="utf-8")))
    return sum(sequence in known for sequence in found) / max(1, len(found))


def _sequences(text: str) -> Iterator[tuple[str, ...]]:
    words = text.split()
    return zip(*(words[i:] for i in range(8)), strict=False)


def measure(
    path: Path, sixteen: Path, texts: dict[str, Path], n_ctx: int, n_tokens: int
) -> list[dict[str, Any]]:
    """One record per text, measured by the runtime on one thread."""
    from mc_gguf.evaluate.cache import references
    from mc_gguf.evaluate.evaluation import evaluate_model
    from mc_gguf.evaluate.text import Text

    read = [Text.read(p) for p in texts.values()]
    stored = references(sixteen, read, n_ctx, n_tokens, 1)
    found = evaluate_model(path, read, stored, n_ctx=n_ctx, n_tokens=n_tokens, n_threads=1, quiet=True)
    return [r.to_json() | {"text": name} for name, r in zip(texts, found, strict=True)]


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), default=MODEL, show_default=True)
@click.option("--tokens", "n_tokens", default=2048, show_default=True, help="Tokens of each text to score.")
@click.option("--ctx", "n_ctx", default=512, show_default=True)
@click.option("--seeds", default=3, show_default=True, help="Calibrations, each on other token rows.")
@click.option("--sizes", default=",".join([*UNIFORM, *(f"recipe {r}" for r in RECIPES)]), show_default=True)
@click.option("--compensate/--no-compensate", default=True, show_default=True)
@click.option("--strategies", help="Only these, separated by commas.  [default: all]")
@click.option("--jobs", default=1, show_default=True, help="Files to measure at once, on a thread each.")
@click.option("--calibration-tokens", type=int, help="Tokens to calibrate on.  [default: mc-gguf's own]")
@click.option("--types", help="Types to measure, separated by commas.  [default: all]")
def run(
    folder: Path,
    model: Path,
    n_tokens: int,
    n_ctx: int,
    seeds: int,
    sizes: str,
    compensate: bool,
    strategies: str | None,
    jobs: int,
    calibration_tokens: int | None,
    types: str | None,
) -> None:
    """Make and measure what is not in FOLDER yet."""
    from mc_gguf.common.errors import BudgetError

    shop = Workshop(folder, model, jobs, calibration_tokens, tuple(types.split(",")) if types else None)
    texts, results = text_files(folder), folder / "results.json"
    for name, path in texts.items():
        click.echo(f"{name}: {overlap(path):.2%} of the 8-word sequences are in the calibration text")
    records = json.loads(results.read_text()) if results.exists() else []
    done = {(r["size"], r["arm"], r["seed"]) for r in records}
    wanted = [
        a
        for a in arms(seeds, sizes.split(","), compensate)
        if strategies is None or a.strategy in strategies.split(",")
    ]
    todo = [a for a in wanted if (a.size, a.name, a.seed) not in done]
    sixteen = shop.sixteen_bit()
    measure(sixteen, sixteen, texts, n_ctx, n_tokens)  # stores the reference before the workers need it
    work = partial(measure, sixteen=sixteen, texts=texts, n_ctx=n_ctx, n_tokens=n_tokens)
    # a forked worker would inherit locks of libraries that run threads here
    workers = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    with workers as pool, click.progressbar(todo, label="files", file=sys.stderr) as bar:
        waiting: list[tuple[Arm, Any]] = []
        for arm in bar:
            try:
                path = shop.make(arm)
            except BudgetError as error:  # mc reaches from 1.81 to 2.94 bits
                click.echo(f"\n{arm.name} at {arm.size}: {error}", err=True)
                continue
            waiting.append((arm, pool.submit(work, path)))
            while len(waiting) > 2 * jobs:
                _collect(*waiting.pop(0), records, results)
        for arm, future in waiting:
            _collect(arm, future, records, results)


def _collect(arm: Arm, future: Any, records: list[dict[str, Any]], results: Path) -> None:
    key = {"size": arm.size, "arm": arm.name, "seed": arm.seed}
    records += [record | key for record in future.result()]
    results.write_text(json.dumps(records, indent=1))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Write table.md and curves.svg of what was measured."""
    from tools.experiments.quality_report import plot, tables

    records = json.loads((folder / "results.json").read_text())
    (folder / "table.md").write_text(tables(records))
    click.echo(tables(records))
    plot(records, folder / "curves.svg")


if __name__ == "__main__":
    main()
