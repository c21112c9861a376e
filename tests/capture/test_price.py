"""Divergences of changes, against transformers' models to whose modules the same is added."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_gguf.capture import price
from mc_gguf.capture.context import Devices
from mc_gguf.capture.copy import write_copy
from mc_gguf.capture.price import Change, divergences, relative_changes
from mc_gguf.common.errors import McError
from mc_gguf.common.progress import progress
from tests.support.block_reference import block_references, divergence
from tests.support.small_models import MemoryCheckpoint, random_mixtral

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("one_torch_thread")]

ROWS = np.random.default_rng(3).integers(0, 96, (3, 24)).astype(np.int32)
N = ROWS.size


@cache
def model() -> Any:
    return random_mixtral()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("price") / "model.gguf"
    write_copy(MemoryCheckpoint(model(), "F32"), path)
    return path


def noise(width: int, size: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(N, width, generator=torch.Generator().manual_seed(seed)) * size


def measured(path: Path, *changes: Change, threads: int = 1) -> np.ndarray[Any, Any]:
    with progress("price", quiet=True) as bar:
        return divergences(path, ROWS, changes, Devices(threads), bar)


def of(target: str, values: torch.Tensor) -> Change:
    return Change(target, lambda: values)


# What is changed, its counterpart in transformers, its width and the size of the change.
CASES: list[tuple[str, str, int, float]] = [
    ("blk.0", "layers.0.mlp", 64, 0.5),
    ("blk.1", "layers.1.mlp", 64, 2.0),
    ("blk.0.attn_v.weight", "layers.0.self_attn.v_proj", 48, 0.2),
    ("blk.1.attn_output.weight", "layers.1.self_attn.o_proj", 64, 1.0),
]


@pytest.mark.parametrize(("target", "name", "width", "size"), CASES)
def test_one_change_costs_what_it_costs_in_transformers(
    path: Path, target: str, name: str, width: int, size: float
) -> None:
    change = noise(width, size)
    expected = divergence(model(), ROWS, model().model.get_submodule(name), change)
    assert expected > 1e-3
    assert measured(path, of(target, change)) == pytest.approx([expected], rel=1e-2)


@pytest.mark.parametrize("tokens", [24, 60, 2048])
def test_many_changes_cost_what_each_costs_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """One, two or all of them in a batch."""
    changes = [of(target, noise(width, size, seed)) for seed, (target, _, width, size) in enumerate(CASES)]
    changes.append(of("blk.0", torch.zeros(N, 64)))
    alone = [measured(path, change)[0] for change in changes]
    monkeypatch.setattr(price, "_TOKENS", tokens)
    found = measured(path, *changes)
    assert found == pytest.approx(alone, rel=1e-4, abs=1e-8)
    assert found[-1] < 1e-8


def test_a_change_of_zeros_costs_nothing(path: Path) -> None:
    found = measured(path, *(of(target, torch.zeros(N, width)) for target, _, width, _ in CASES))
    assert (found >= 0).all()
    assert found == pytest.approx(np.zeros(4), abs=1e-9)
    assert measured(path).shape == (0,)


def test_threads_change_nothing(path: Path) -> None:
    change = of("blk.0", noise(64, 0.5))
    assert measured(path, change) == measured(path, change, threads=2)


def test_values_are_asked_for_once_and_only_a_batch_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def ask(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(N, 64)

    monkeypatch.setattr(price, "_TOKENS", 48)
    targets = ["blk.0", "blk.1", "blk.0"]
    measured(path, *(Change(t, lambda t=t: ask(t)) for t in targets))  # type: ignore[misc]
    assert asked == targets


@torch.no_grad()
def state_change(target: str, module: str, change: torch.Tensor, after: bool) -> float:
    """Mean relative squared change of the hidden states of the target's layer: after it, or before its
    experts.
    """
    layer = int(target.split(".")[1])
    states = list[torch.Tensor]()
    for added in (torch.zeros_like(change), change):
        handle = (
            model()
            .model.get_submodule(module)
            .register_forward_hook(lambda _, __, output, added=added: output + added.view_as(output))
        )
        reference = block_references(model(), ROWS)[layer]
        states.append(reference.after if after else reference.before)
        handle.remove()
    return float(((states[1] - states[0]).square().sum(1) / states[0].square().sum(1)).mean())


def changed(path: Path, *changes: Change) -> np.ndarray[Any, Any]:
    with progress("price", quiet=True) as bar:
        return relative_changes(path, ROWS, changes, Devices(1), bar)


@pytest.mark.parametrize(("target", "name", "width", "size"), CASES[2:])
def test_hidden_states_change_as_in_transformers(
    path: Path, target: str, name: str, width: int, size: float
) -> None:
    change = noise(width, size)
    expected = state_change(target, name, change, after=False)
    assert expected > 1e-3
    assert changed(path, of(target, change)) == pytest.approx([expected], rel=1e-2)


@pytest.mark.parametrize("tokens", [24, 50, 72, 2048, 9999])
def test_hidden_states_change_alike_in_any_batch(
    path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """One, two or all changes beside the unchanged text."""
    changes = [of(target, noise(w, size, seed)) for seed, (target, _, w, size) in enumerate(CASES[2:])]
    changes += changes[::-1]
    changes.append(of("blk.0.attn_v.weight", torch.zeros(N, 48)))
    alone = [changed(path, change)[0] for change in changes]
    monkeypatch.setattr(price, "_TOKENS", tokens)
    found = changed(path, *changes)
    assert found == pytest.approx(alone, rel=1e-4, abs=1e-9)
    assert found[-1] == pytest.approx(0, abs=1e-9)
    assert changed(path).shape == (0,)


def test_what_is_raised_in_the_callback_comes_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mc_gguf.capture.graph.Node.add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(path, of("blk.0", noise(64, 0.5)))
    with pytest.raises(KeyboardInterrupt):
        changed(path, of("blk.0.attn_v.weight", noise(48, 0.5)))


def test_a_change_of_the_wrong_size_is_an_error(path: Path) -> None:
    with pytest.raises((ValueError, McError, RuntimeError)):
        measured(path, of("blk.0", torch.zeros(N, 63)))
