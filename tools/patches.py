"""Maintain the patch set in patches/: check it, work on it, write it back, move it to another upstream.

    python -m tools.patches verify           takes seconds, offline once the source is cached; in `make check`
    python -m tools.patches checkout DIR     llama.cpp, patches as commits on branch mc, our sources in DIR/mc
    python -m tools.patches refresh DIR      rewrite patches/ and patched_tree from that branch and DIR/mc
    python -m tools.patches bump DIR COMMIT  rebase the branch onto COMMIT (fetch it first), print range-diff

A patch only holds call sites. Our own C and C++ files are in patches/src and lie in mc/ of the patched tree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import click

from mc_gguf.common.errors import McError
from mc_gguf.runtime import fetch as source
from mc_gguf.runtime import upstream
from mc_gguf.runtime.shell import Log, git_env
from tools.common import ROOT, run_tool

PATCHES = ROOT / "patches"
TRAILERS = ("Why", "Test", "Upstream", "Drop-when")
# The author and the date of every patch: they say nothing, and a rebase would change them.
AUTHOR = "From: mc_gguf <mc_gguf@localhost>\nDate: Sun, 22 Nov 2026 00:00:00 +0000\n"
# These options make format -> am -> format byte-identical.
FORMAT = ("format-patch", "--quiet", "--zero-commit", "--no-signature", "--no-numbered", "--full-index")


def git(folder: Path, *arguments: str) -> str:
    """Run git in `folder` without the user's configuration. Raises McError with git's message."""
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "safe.directory=*", *arguments]
    done = subprocess.run(
        command, cwd=folder, env=git_env(folder), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise McError(f"git {arguments[0]} failed in {folder}: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def check_names() -> None:
    """Check that the patch files, patches/series and the rows of patches/README.md name the same patches."""
    files = sorted(p.name for p in PATCHES.glob("*.patch"))
    series = [p.name for p in upstream.series()]
    rows = re.findall(
        r"^\| `(\d{4}-\S+\.patch)` \|", (PATCHES / "README.md").read_text(encoding="utf-8"), re.M
    )
    for what, names in (("series", series), ("README.md", rows)):
        if names != files:
            raise McError(f"patches/{what} names {names}, the directory holds {files}: make them the same")


def check_heads() -> None:
    """Check that every patch has AUTHOR and all TRAILERS, and that the tests that they name exist."""
    for path in upstream.series():
        head = path.read_text(encoding="utf-8").partition("\n---\n")[0]
        if AUTHOR not in head:
            raise McError(f"{path.name} has another author or date than {AUTHOR!r}; refresh writes them")
        for trailer in TRAILERS:
            if not re.search(rf"^{trailer}: \S", head, re.M):
                raise McError(f"{path.name} lacks the trailer '{trailer}:'; amend the commit and refresh")
        for name in re.findall(r"\b(?:tests|tools)/\S*\.py\b", head):
            if not (PATCHES.parent / name).is_file():
                raise McError(f"{path.name} names {name}, which does not exist; amend the commit and refresh")


def patched_tree(folder: Path) -> Path:
    """Check out the pinned commit in `folder` and apply the series; the trees are checked on the way."""
    log = Log(folder / "log")
    tree = folder / "llama.cpp"
    source.unpack(source.download(log), tree)
    source.check_out(tree, log)
    source.apply_patches(tree, log)
    return tree


def format_series(tree: Path, base: str, out: Path) -> list[Path]:
    git(tree, *FORMAT, "--output-directory", str(out), f"{base}..HEAD")
    paths = sorted(out.glob("*.patch"))
    for path in paths:
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"^From: .*\n(?: .*\n)*Date: .*\n", AUTHOR, text, count=1, flags=re.M))
    return paths


@click.group(help=__doc__)
def main() -> None: ...


@main.command()
def verify() -> None:
    """Check names, trailers and trees; that the patches apply strictly and format to the same bytes again."""
    check_names()
    check_heads()
    with tempfile.TemporaryDirectory() as temporary:
        tree = patched_tree(Path(temporary))
        again = format_series(tree, upstream.pin().commit, Path(temporary) / "again")
        for path, new in zip(upstream.series(), again, strict=True):
            if path.read_bytes() != new.read_bytes():
                raise McError(
                    f"{path.name} changes when it is applied and formatted again; checkout, then refresh"
                )
    click.echo(f"{len(again)} patches verified, digest {upstream.patchset_digest()[:12]}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def checkout(folder: Path) -> None:
    """Put llama.cpp into FOLDER, with the patches as commits on branch mc and our sources in FOLDER/mc."""
    if folder.exists():
        raise McError(f"{folder} exists: choose a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        tree = patched_tree(Path(temporary))
        git(tree, "switch", "--create", "mc")
        (tree / ".git" / "info").mkdir(exist_ok=True)
        (tree / ".git" / "info" / "exclude").write_text(f"/{source.OWN_SOURCES}/\n")
        shutil.move(tree, folder)
    click.echo(f"work in {folder}, commit there, then: python -m tools.patches refresh {folder}")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--patches", type=click.Path(path_type=Path), default=PATCHES, help="[default: patches/]")
def refresh(folder: Path, patches: Path) -> None:
    """Rewrite the patches, series, src and patched_tree from FOLDER's commits above the pinned one."""
    if git(folder, "status", "--porcelain"):
        raise McError(f"{folder} has changes that are not committed")
    with tempfile.TemporaryDirectory() as temporary:
        new = format_series(folder, upstream.pin().commit, Path(temporary))
        for old in patches.glob("*.patch"):
            old.unlink()
        for path in new:
            shutil.copy(path, patches)
        (patches / "series").write_text("".join(f"{path.name}\n" for path in new))
    shutil.rmtree(patches / "src", ignore_errors=True)
    shutil.copytree(folder / source.OWN_SOURCES, patches / "src")
    pin = patches / "UPSTREAM"
    tree = git(folder, "rev-parse", "HEAD^{tree}")
    pin.write_text(re.sub(r"^patched_tree =.*$", f"patched_tree = {tree}", pin.read_text(), flags=re.M))
    click.echo(f"{len(new)} patches written; next: python -m tools.patches verify")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("commit")
def bump(folder: Path, commit: str) -> None:
    """Rebase the patches in FOLDER onto COMMIT and print how each changed; then edit UPSTREAM and refresh."""
    old_base, old_head = upstream.pin().commit, git(folder, "rev-parse", "HEAD")
    git(folder, "rebase", "--onto", commit, old_base)
    click.echo(git(folder, "range-diff", f"{old_base}..{old_head}", f"{commit}..HEAD"))
    click.echo(
        "next: put the new version, hashes, commit and tree into patches/UPSTREAM, then refresh and verify"
    )


if __name__ == "__main__":
    run_tool(main, "patches")
