"""The command line mirrors the library: an option is a parameter, with the same name and default."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import click
import pytest

from mc_gguf.calibrate import calibrate
from mc_gguf.calibrate.arguments import CalibrationRequest
from mc_gguf.calibrate.expert_errors import MAX_ROWS
from mc_gguf.cli import COMMANDS, main
from mc_gguf.common.errors import McError
from mc_gguf.container import update_routing
from mc_gguf.conversion import Conversion, ConversionRequest
from mc_gguf.evaluate import evaluate
from mc_gguf.pipeline import convert, make_plan
from mc_gguf.plan.request import PlanRequest
from mc_gguf.quantize import quantize
from mc_gguf.refine import refine
from mc_gguf.refine.options import RefinementOptions
from mc_gguf.source import text

# Commands with what only the terminal knows, and what only Python does.
MIRRORS: list[tuple[str, Callable[..., Any], set[str], set[str]]] = [
    ("convert", convert, {"dry_run", "as_json"}, {"progress"}),
    ("calibrate", calibrate, {"as_json"}, {"progress"}),
    ("plan", make_plan, {"dry_run", "as_json"}, set()),
    ("refine", refine, {"as_json"}, {"progress"}),
    ("quantize", quantize, {"as_json"}, {"progress"}),
    ("eval", evaluate, {"as_json"}, {"command", "hashes", "progress"}),
    ("routing set", update_routing, {"as_json"}, set()),
]


def find(path: str) -> click.Command:
    command: click.Command = main
    for name in path.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return command


@pytest.mark.parametrize(("path", "function", "of_terminal", "of_python"), MIRRORS)
def test_options_are_parameters(
    path: str, function: Callable[..., Any], of_terminal: set[str], of_python: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    options = {parameter.name: parameter for parameter in find(path).params}
    assert set(options) - of_terminal == set(parameters) - of_python
    required = [o for o in options.values() if o.required]
    typed = [word for o in required for word in ([o.opts[0], "x"] if isinstance(o, click.Option) else ["x"])]
    root = click.Context(main, **main.context_settings)
    given = find(path).make_context(path, typed, parent=root).params
    for name in set(options) - of_terminal - {parameter.name for parameter in required}:
        assert given[name] == parameters[name].default, name


def bounded_options() -> list[tuple[Callable[..., Any], str, int]]:
    """Each function with the name and the least value of every option that has one."""
    return [
        (function, parameter.name, int(parameter.type.min))
        for path, function, _, _ in MIRRORS
        for parameter in find(path).params
        if parameter.name and isinstance(parameter.type, click.IntRange) and parameter.type.min is not None
    ]


@pytest.mark.parametrize(("function", "name", "least"), bounded_options())
def test_the_library_refuses_what_the_options_refuse(
    function: Callable[..., Any], name: str, least: int
) -> None:
    """It does so before it reads or writes a file: none of these exist."""
    paths = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is inspect.Parameter.empty
    ]
    with pytest.raises(McError, match=f"{name} must be at least {least}, not {least - 1}") as caught:
        function(**dict.fromkeys(paths, "missing"), **{name: least - 1})
    assert caught.value.parameters == (name,)


def all_options() -> list[tuple[str, click.Option]]:
    found = []
    for name in COMMANDS:
        command = find(name)
        below = command.list_commands(click.Context(command)) if isinstance(command, click.Group) else []
        for path in [f"{name} {child}" for child in below] or [name]:
            found += [(path, option) for option in find(path).params if isinstance(option, click.Option)]
    return found


@pytest.mark.parametrize("name", ["seed", "quiet", "threads", "as_json", "resume", "compensate", "routing"])
def test_one_name_means_the_same_everywhere(name: str) -> None:
    texts = {option.help for path, option in all_options() if option.name == name and path != "chat"}
    assert len(texts) == 1


def test_who_computes_has_threads_and_who_prints_a_result_json() -> None:
    having: dict[str, set[str]] = {}
    for path, option in all_options():
        having.setdefault(option.opts[-1], set()).add(path)
    computing = {"convert", "calibrate", "refine", "quantize", "eval"}
    assert having["--threads"] == computing | {"chat"}
    assert having["--quiet"] == computing | {"chat", "routing set", "runtime build"}
    assert having["--json"] == computing | {"plan", "inspect", "routing show", "routing set", "runtime info"}


def test_defaults_are_spelled_once_in_the_library() -> None:
    request = CalibrationRequest()
    assert (request.tokens, request.ctx, request.rows) == (text.DEFAULT_TOKENS, text.DEFAULT_CTX, MAX_ROWS)
    found = inspect.signature(refine).parameters
    assert (found["tokens"].default, found["ctx"].default) == (
        RefinementOptions.tokens,
        RefinementOptions.ctx,
    )


@pytest.mark.parametrize("cls", [ConversionRequest, PlanRequest, CalibrationRequest])
def test_convert_takes_what_a_request_holds(cls: type) -> None:
    """With the same defaults."""
    convert_parameters = inspect.signature(convert).parameters
    for name, parameter in inspect.signature(cls).parameters.items():
        assert convert_parameters[name].default == parameter.default, name


def test_the_most_needed_options_come_first() -> None:
    options = [option.opts[-1] for path, option in all_options() if path == "convert"]
    assert options[:5] == ["--output", "--size", "--bpw", "--refine", "--dry-run"]
    assert options[-3:] == ["--bits-per-layer", "--objective", "--seed"]


def test_seeds_of_the_steps_differ_by_step_only(tmp_path: Any) -> None:
    """The default seed cuts the rows of refinement elsewhere than those of calibration, as --seed 7 does."""
    for seed in (0, 7):
        request = ConversionRequest(bpw=2, refine="1s", seed=seed)
        search = request.refinement()
        assert search is not None
        assert (request.options().seed, search.seed) == (seed, seed + 1)
    assert Conversion(tmp_path, tmp_path / "m.gguf", request).plan_path == tmp_path / "m.plan.json"
