"""`mc-gguf runtime`: build the patched llama.cpp and say what is there."""

from __future__ import annotations

import json

import click


@click.group()
def command() -> None:
    """Build the patched llama.cpp, and show what is built."""


@command.command()
@click.option(
    "--backend", type=click.Choice(["cpu", "cuda", "vulkan", "metal"]), default="cpu", show_default=True
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Compile so many files at once.  [default: all cores]"
)
@click.option("--force", is_flag=True, help="Build again, from nothing, what is already built.")
@click.option(
    "--unpatched", is_flag=True, help="Build stock llama.cpp: the reference of tests and benchmarks."
)
@click.option("--tests", is_flag=True, help="Build llama.cpp's test-backend-ops too.")
def build(backend: str, jobs: int | None, force: bool, unpatched: bool, tests: bool) -> None:
    """Fetch the pinned llama.cpp through pip, check it, patch it, build it into the user's cache.

    Needs git, cmake, make or ninja, a C++ compiler and 1 GB of disk. A second call is instant.
    """
    from mc_gguf.runtime import builder

    built = builder.build(backend=backend, jobs=jobs, force=force, patched=not unpatched)
    click.echo(built.path)
    if tests:
        click.echo(builder.build_tests(built))


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Print versions, commit, patch digest, backends and path."""
    from mc_gguf.runtime.facts import render_facts, runtime_facts

    facts = runtime_facts()
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    click.echo(render_facts(facts))
