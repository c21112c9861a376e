"""README.md and generation_config.json of a Hugging Face directory: what a file's metadata can take of them.

Upstream's gguf.Metadata takes what people write there as it comes, and stops at a date or a colon. Nothing in
these files decides what the weights mean, so nothing in them may stop a conversion.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FRONT_MATTER_BYTES = 1 << 20  # at most, at the start of the card

_OWN = ("name", "author", "version", "organization", "description", "finetune", "basename", "size_label")
_LINKS = ("url", "doi", "uuid", "repo_url")
# Keys of gguf.Metadata.apply_metadata_heuristic: with a text, with several, and with models or datasets.
_TEXT = frozenset(
    (
        *(*_OWN, *_LINKS),
        *(f"model_{name}" for name in (*_OWN, *_LINKS)),
        *("model_creator", "model_type", "license", "license_name", "license_link"),
    )
)
_TEXTS = frozenset(("tags", "pipeline_tag", "language", "languages"))
_REFERENCES = frozenset(
    ("base_model", "base_models", "base_model_sources", "datasets", "dataset", "dataset_sources")
)
# Keys of gguf.Metadata.load: their types.
_SAMPLING: dict[str, tuple[type, ...]] = {
    "sequence": (str,),
    **dict.fromkeys(("top_k", "penalty_last_n", "mirostat"), (int,)),
    **dict.fromkeys(("top_p", "min_p", "xtc_probability", "xtc_threshold", "temperature"), (int, float)),
    **dict.fromkeys(("penalty_repeat", "repetition_penalty", "mirostat_tau", "mirostat_eta"), (int, float)),
}
_INT32 = 1 << 31
_NULLS = ("", "~", "null", "Null", "NULL")


def usable_card(card: Path) -> tuple[str, list[str]]:
    """(a card with the usable part of the front matter of `card`, names of what is left out)."""
    try:
        with card.open("rb") as file:
            head = file.read(FRONT_MATTER_BYTES)
    except OSError:
        return "", []
    entries, left_out = _entries(_front_matter(head.decode("utf-8", "replace")))
    usable = {}
    for key, value in entries.items():
        kept, is_whole = _usable(key, value)
        if kept:
            usable[key] = kept
        if not is_whole:
            left_out.append(key)
    return f"---\n{json.dumps(usable, ensure_ascii=False)}\n---\n", left_out


def usable_generation_config(path: Path) -> str:
    """The sampling parameters in the file, as JSON; none when it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return "{}"
    if not isinstance(found, dict):
        return "{}"
    return json.dumps({key: found[key] for key in _SAMPLING if _is_sampling(key, found.get(key))})


def _front_matter(text: str) -> str:
    """What lies between the first line, ---, and the next such line; "" without one."""
    first, *lines = text.splitlines() or [""]
    if first != "---":
        return ""
    end = lines.index("---") if "---" in lines else len(lines)
    return "\n".join(lines[:end]) + "\n"


def _entries(front_matter: str) -> tuple[dict[str, Any], list[str]]:
    """(the entries, all scalars as text, so that `no` is a language; the names of those that are no YAML).

    One entry that is no YAML spoils only itself.
    """
    whole = _parsed(front_matter)
    if whole is not None:
        return (whole, []) if _is_dict(whole) else ({}, ["its front matter"])
    entries: dict[str, Any] = {}
    spoilt = []
    for block in _blocks(front_matter):
        found = _parsed(block)
        if _is_dict(found):
            entries |= found
        else:
            spoilt.append(block.split(":", 1)[0].strip()[:40])
    return entries, spoilt


def _blocks(front_matter: str) -> Iterator[str]:
    """The entries of the front matter as they stand there: a line at the margin begins one."""
    block = ""
    for line in front_matter.splitlines():
        if line[:1] not in ("", " ", "\t", "-", "#", "]", "}") and block:
            yield block
            block = ""
        block += line + "\n"
    if block:
        yield block


def _parsed(text: str) -> Any:
    """The YAML document with all scalars as text; None when it is none."""
    import yaml

    try:
        return yaml.load(text.replace("\t", "  "), Loader=yaml.BaseLoader) or {}
    except (yaml.YAMLError, RecursionError, ValueError, TypeError):
        return None


def _usable(key: str, value: Any) -> tuple[Any, bool]:
    """(what of an entry gguf.Metadata can take, whether that is all of it). Entries it does not look at count
    as whole.
    """
    if key in _TEXT:
        return (value, True) if _is_text(value) else (None, value in _NULLS)
    if key in _TEXTS or key in _REFERENCES:
        items = value if isinstance(value, list) else [value]
        items = [item for item in items if item not in _NULLS]
        kept = [item for item in (_item(key, item) for item in items) if item]
        return kept, len(kept) == len(items)
    return None, True


def _item(key: str, item: Any) -> Any:
    if key in _REFERENCES and _is_dict(item):
        return {name: text for name, text in item.items() if _is_text(name) and _is_text(text)}
    return item if _is_text(item) else None


def _is_text(value: Any) -> bool:
    """Whether it is a text, not a null, of which all bytes were UTF-8."""
    return isinstance(value, str) and value not in _NULLS and "\N{REPLACEMENT CHARACTER}" not in value


def _is_sampling(key: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, _SAMPLING[key]):
        return False
    return not isinstance(value, int | float) or -_INT32 < value < _INT32  # NaN is not


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)
