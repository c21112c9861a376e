"""Files: atomic, with the user's permissions, never over an input or what is no file."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from mc_gguf.common.errors import ArtifactError, McError, SourceError
from mc_gguf.common.files import atomic_write, check_output, sha256_of
from mc_gguf.source import refuse_to_overwrite
from tests.support import ROOT


def test_atomic_write_makes_the_file_and_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["b"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "b"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_atomic_write_obeys_the_umask(umask: int, tmp_path: Path) -> None:
    """In a process of its own: a umask belongs to the whole process."""
    code = (
        "import os, sys; from pathlib import Path; from mc_gguf.common.files import atomic_write\n"
        f"os.umask({umask})\n"
        "with atomic_write(Path(sys.argv[1])) as file: file.write(b'x')"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "b"], check=True, cwd=ROOT)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666 & ~umask


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for path, words in ((folder, "is a directory"), (pipe, "is not a regular file")):
        with pytest.raises(McError, match=words), atomic_write(path):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe"}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    check_output(link)


def test_an_input_is_not_replaced_under_any_name(tmp_path: Path) -> None:
    data, other = tmp_path / "in", tmp_path / "other"
    for path in (data, other):
        path.write_bytes(b"x")
    (tmp_path / "hard").hardlink_to(data)
    (tmp_path / "soft").symlink_to(data)
    (tmp_path / "folder").mkdir()
    for name in ("in", "hard", "soft", "folder/../in"):
        with pytest.raises(McError, match=r"is the same file as the input .*in; write to another file"):
            check_output(tmp_path / name, [other, tmp_path / "missing", data])
    check_output(other, [data])
    check_output(tmp_path / "new", [data])


def test_no_file_of_the_source_is_replaced(tmp_path: Path) -> None:
    """Not in a directory, not as a hard link, and no shard of the same name."""
    folder = tmp_path / "hf"
    folder.mkdir()
    shard, sibling = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    for path in (folder / "weights", shard, sibling, tmp_path / "other"):
        path.write_bytes(b"x")
    (tmp_path / "link").hardlink_to(folder / "weights")
    for output, source in (
        (folder / "weights", folder),
        (tmp_path / "link", folder),
        (shard, shard),
        (sibling, shard),
    ):
        with pytest.raises(SourceError, match="is a file of the source model"):
            refuse_to_overwrite(output, source)
    (folder / "dangling").symlink_to("nowhere")
    refuse_to_overwrite(tmp_path / "other", folder)
    refuse_to_overwrite(folder / "new", folder)
    refuse_to_overwrite(tmp_path / "other", shard)
    with pytest.raises(McError, match="same file as the input"):
        refuse_to_overwrite(tmp_path / "other", folder, shard, tmp_path / "other")


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "source", "-o", "source"],
        ["calibrate", "source", "-o", "text", "--text", "text"],
        ["quantize", "source", "plan", "-o", "plan"],
        ["quantize", "source", "plan", "--calibration", "calib", "-o", "calib"],
        ["refine", "source", "plan", "-o", "plan"],
        ["routing", "set", "source", "--calibration", "calib", "-o", "calib"],
        ["convert", "source", "--bpw", "2", "-o", "source"],
        ["convert", "source", "--bpw", "2", "--calibration", "calib", "-o", "calib"],
    ],
)
def test_verbs_refuse_before_they_read(arguments: list[str], tmp_path: Path) -> None:
    """None of these files is what it would have to be."""
    names = ("source", "text", "plan", "calib")
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    words = [str(tmp_path / word) if word in names else word for word in arguments]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert "write to another file" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == set(names)
    assert (tmp_path / "source").read_bytes() == b"x"


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ArtifactError, match=r"cannot read .*missing"):
        sha256_of(tmp_path / "missing")
    with pytest.raises(ArtifactError, match="cannot read"):
        sha256_of(tmp_path)
