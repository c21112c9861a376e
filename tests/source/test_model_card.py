"""The model card never stops a conversion, and gives what gguf.Metadata can take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mc_gguf.source.model_card import usable_card, usable_generation_config


def _usable(folder: Path, front_matter: str | bytes) -> tuple[dict[str, Any], list[str]]:
    text = front_matter.encode() if isinstance(front_matter, str) else front_matter
    (folder / "README.md").write_bytes(b"---\n" + text + b"\n---\n# A model\n")
    card, left_out = usable_card(folder / "README.md")
    first, line, last = card.splitlines()
    assert (first, last) == ("---", "---")
    found: dict[str, Any] = json.loads(line)
    return found, left_out


@pytest.mark.parametrize(
    ("front_matter", "usable", "left_out"),
    [
        ("license: mit\ntags:\n- moe", {"license": "mit", "tags": ["moe"]}, []),
        ("language: [no, en]", {"language": ["no", "en"]}, []),
        ("language:\n- no\n- yes", {"language": ["no", "yes"]}, []),
        ("language: no\nlicense: on", {"language": ["no"], "license": "on"}, []),
        ("version: 1.0\nmodel_name: 2024-01-01", {"version": "1.0", "model_name": "2024-01-01"}, []),
        ("title: A: B\nlicense: mit", {"license": "mit"}, ["title"]),
        ("license: A: B\ntags: [a]", {"tags": ["a"]}, ["license"]),
        ("tags: [1, a, {x: 2}, [b], null]", {"tags": ["1", "a"]}, ["tags"]),
        ("license: [a]\nlicense_name:\nname: ~", {}, ["license"]),
        ("base_model: [x/y, {name: Z, size: [1]}, 3]", {"base_model": ["x/y", {"name": "Z"}, "3"]}, []),
        ("datasets: 3\nwidget: [{text: 1}]\nmodel-index: 5", {"datasets": ["3"]}, []),
        (b"license: \xff\xfe\nname: A", {"name": "A"}, ["license"]),
        ("- a\n- b", {}, ["its front matter"]),
        ("just words", {}, ["its front matter"]),
        ("a: " + "[" * 3000 + "]" * 3000 + "\nname: A", {"name": "A"}, ["a"]),
        ("name:\tA", {"name": "A"}, []),
        ("name: !!python/object:os.system x", {"name": "x"}, []),
        ("", {}, []),
    ],
)
def test_what_is_usable(
    front_matter: str | bytes, usable: dict[str, Any], left_out: list[str], tmp_path: Path
) -> None:
    assert _usable(tmp_path, front_matter) == (usable, left_out)


def test_aliases_do_not_grow(tmp_path: Path) -> None:
    """A billion names in ten lines."""
    lines = ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"{c}: &{c} [{','.join([f'*{b}'] * 10)}]" for b, c in zip("abcdefgh", "bcdefghi", strict=True)]
    assert _usable(tmp_path, "\n".join([*lines, "tags: *i"])) == ({}, ["tags"])


@pytest.mark.parametrize("card", [b"", b"# No front matter", b"\xff\xfe\x00", b"---\n", b"---"])
def test_cards_without_front_matter(card: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(card)
    assert usable_card(tmp_path / "README.md") == ("---\n{}\n---\n", [])


def test_a_card_that_is_no_file(tmp_path: Path) -> None:
    assert usable_card(tmp_path / "missing") == ("", [])
    assert usable_card(tmp_path) == ("", [])


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        (
            '{"temperature": 0.7, "top_k": 20, "top_p": 1, "do_sample": true}',
            {"temperature": 0.7, "top_k": 20, "top_p": 1},
        ),
        ('{"temperature": "hot", "top_k": 1.5, "top_p": true, "min_p": null}', {}),
        ('{"temperature": NaN, "top_k": 99999999999, "penalty_repeat": -Infinity}', {}),
        ("[1]", {}),
        ("{", {}),
        ("", {}),
    ],
)
def test_sampling_parameters(text: str, usable: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(text)
    assert json.loads(usable_generation_config(tmp_path / "g.json")) == usable
