"""`mc-gguf runtime`: build the patched llama.cpp and say what is there."""

from __future__ import annotations

import click

from mc_gguf.cli import options as o
from mc_gguf.cli.command import Command, SuggestingGroup
from mc_gguf.cli.result import show


@click.group(cls=SuggestingGroup)
def command() -> None:
    """Build the patched llama.cpp, or show what is built."""


@command.command(cls=Command)
@click.option(
    "--backend",
    type=click.Choice(["cpu", "cuda", "vulkan", "metal"]),
    default="cpu",
    show_default=True,
    help="Device to build for.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Files to compile at once.  [default: all usable cores]"
)
@click.option("--force", is_flag=True, help="Build again, from nothing, what is already built.")
@click.option(
    "--unpatched", is_flag=True, help="Build stock llama.cpp, the reference of tests and benchmarks."
)
@click.option("--tests", is_flag=True, help="Build llama.cpp's test-backend-ops, too.")
@o.quiet_option
def build(backend: str, jobs: int | None, force: bool, unpatched: bool, tests: bool, quiet: bool) -> None:
    """Fetch the pinned llama.cpp through pip, check it, patch it, and build it into the user's cache.

    Needs git, cmake, make or ninja, a C++ compiler and 1 GB of disk. A second call is instant.
    """
    from mc_gguf.runtime import builder

    built = builder.build(backend=backend, jobs=jobs, force=force, patched=not unpatched, quiet=quiet)
    click.echo(built.path)
    if tests:
        click.echo(builder.build_tests(built))


@command.command(cls=Command)
@o.json_option
def info(as_json: bool) -> None:
    """Print versions, commit, patch digest, backends and path."""
    from mc_gguf.runtime.facts import render_facts, runtime_facts

    facts = runtime_facts()
    show(facts, render_facts(facts), as_json)
