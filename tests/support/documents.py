"""The repository's documents, taken apart: Python blocks, mc-gguf command lines, links, headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support import ROOT

NOT_RUN = re.compile(r"<!-- not run:(.*?)-->")
_FENCE = re.compile(r"^```(\w*)\s*$")
_COMMAND = re.compile(r"^\s*(?:\$ )?(mc-gguf( .*)?)$")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block: the place of its first line, its language, its text, and the line above the fence."""

    path: Path
    line: int
    language: str
    text: str
    above: str

    @property
    def reason_not_run(self) -> str | None:
        """The reason in `<!-- not run: reason -->` above the block, maybe ""; None without the comment."""
        found = NOT_RUN.fullmatch(self.above.strip())
        return found[1].strip() if found else None


@dataclass(frozen=True)
class Command:
    """A command line `mc-gguf ...` without the comment behind it, and where it is."""

    path: Path
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: mc-gguf {shlex.join(self.words)}"


def documents() -> list[Path]:
    """README.md and everything under docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: Path, language: str) -> Iterator[Block]:
    """The fenced blocks of a document in this language, in order."""
    above, start, kind = "", 0, ""
    body: list[str] | None = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if body is not None and line.startswith("```"):
            if kind == language:
                yield Block(path, start, kind, "\n".join(body) + "\n", above)
            body, above = None, ""
        elif body is not None:
            body.append(line)
        elif fence := _FENCE.match(line):
            body, start, kind = [], number + 1, fence[1]
        elif line.strip():
            above = line


def commands(path: Path) -> Iterator[Command]:
    """The lines that begin with mc-gguf, also after an indent or "$ "; a backslash joins the next line.

    Two spaces or a # begin a comment. Brackets around what may be left out are removed.
    """
    waiting = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        whole = f"{waiting} {line.strip()}" if waiting else line
        waiting = ""
        if found := _COMMAND.match(whole):
            if whole.endswith("\\"):
                waiting = whole.removesuffix("\\").rstrip()
                continue
            told = re.split(r"\s{2,}|\s#", found[1])[0]
            yield Command(path, number, tuple(shlex.split(re.sub(r"[\[\]]", "", told))[1:]))


def links(path: Path) -> list[str]:
    """The targets of a document's links and pictures, outside of fenced blocks."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return _LINK.findall(text)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")) for title in titles)
    return {title.strip().replace(" ", "-") for title in plain}
