"""What llama.cpp's converter gets to see of a Hugging Face directory: all of it, but for what would stop it
though it does not matter to the weights.

That is the model card and the sampling parameters (model_card.py), and chat templates that are no text.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mc_gguf.source.model_card import usable_card, usable_generation_config

log = logging.getLogger(__name__)

_CARD, _GENERATION, _TOKENIZER = "README.md", "generation_config.json", "tokenizer_config.json"
_TEMPLATE, _TEMPLATE_JSON, _MORE_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
# The view has these in its own form, or does without them.
_OURS = frozenset((_CARD, _GENERATION, _TEMPLATE, _TEMPLATE_JSON, _MORE_TEMPLATES))


@contextmanager
def converter_view(folder: Path) -> Iterator[Path]:
    """A folder of the same name, of links to the files of `folder` and of what stands for some of them.

    One warning says what is left out. The weights are not in it.
    """
    with tempfile.TemporaryDirectory(prefix="mc-gguf-") as temporary:
        view = Path(temporary) / (folder.resolve().name or "model")
        view.mkdir()
        card, keys = usable_card(folder / _CARD)
        (view / _CARD).write_text(card, encoding="utf-8")
        left_out = [f"{_CARD}: {', '.join(keys)}"] if keys else []
        left_out += _write_templates(folder, view)
        (view / _GENERATION).write_text(usable_generation_config(folder / _GENERATION), encoding="utf-8")
        for path in folder.iterdir():
            name = path.name
            if path.suffix != ".safetensors" and name not in _OURS and not (view / name).exists():
                (view / name).symlink_to(path.resolve())
        if left_out:
            log.warning(
                "%s: what llama.cpp cannot use is left out of the metadata: %s", folder, "; ".join(left_out)
            )
        yield view


def _write_templates(folder: Path, view: Path) -> list[str]:
    """Give the view what is a chat template; the names of what is none are returned."""
    left_out = []
    config = _read_json(folder / _TOKENIZER)
    if config is not None and not _is_template(config.get("chat_template")):
        del config["chat_template"]
        (view / _TOKENIZER).write_text(json.dumps(config), encoding="utf-8")
        left_out.append(f"chat_template of {_TOKENIZER}")
    for path in (folder / _TEMPLATE, *sorted((folder / _MORE_TEMPLATES).glob("*.jinja"))):
        if path.is_file() and _is_text(path):
            target = view / path.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            target.symlink_to(path.resolve())
        elif path.is_file():
            left_out.append(str(path.relative_to(folder)))
    path = folder / _TEMPLATE_JSON
    found = _read_json(path)
    if found is not None and _is_template(found.get("chat_template", 0)):
        (view / _TEMPLATE_JSON).symlink_to(path.resolve())
    elif path.is_file() and path.stat().st_size:
        left_out.append(_TEMPLATE_JSON)
    return left_out


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_text(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    return True


def _is_template(value: Any) -> bool:
    """Whether it is a template, or a list of templates with names (transformers has both forms)."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_named_template, value))
    return value is None or isinstance(value, str)


def _is_named_template(item: Any) -> bool:
    return isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("name", "template"))
