"""Split GGUFs: the names that gguf-split gives to the shards of one model, NAME-00001-of-00003.gguf."""

from __future__ import annotations

import re
from pathlib import Path

SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def shard_paths(path: Path) -> list[Path]:
    """The paths of all shards of the model that `path` belongs to, in order, whether they exist or not.

    A file that is not named like a shard is its own only shard.
    """
    name = SHARD_NAME.fullmatch(path.name)
    if not name:
        return [path]
    count = int(name["count"])
    return [path.with_name(f"{name['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]


def shard_stem(path: Path) -> str | None:
    """The name that all shards of one model share, or None for a file that is not named like a shard."""
    name = SHARD_NAME.fullmatch(path.name)
    return name["stem"] if name else None
