"""Every relative link in the documents leads to a file, and to a heading in it where it names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.documents import anchors, documents, links

READ = [
    *documents(),
    *(ROOT / name for name in ("CHANGELOG.md", "LOG.md", "patches/README.md", "tests/data/README.md")),
    *sorted((ROOT / "models").rglob("README.md")),
]


def broken(path: Path) -> list[str]:
    """The links of a document that lead nowhere; those to other sites are not followed."""
    found = []
    for link in links(path):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", READ, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    text = "# One `two`\n[a](#one-two) [b](no.md) [c](x.md#three) ![d](x.md) [e](https://x.y/z)\n"
    (tmp_path / "x.md").write_text(text)
    assert broken(tmp_path / "x.md") == ["no.md", "x.md#three"]
