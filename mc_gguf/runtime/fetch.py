"""The pinned llama.cpp source: downloaded through pip, checked, unpacked, patched.

The source distribution of llama-cpp-python contains llama.cpp's git directory, .git/modules/vendor/llama.cpp.
Nothing else is unpacked, and git gets a configuration of our own. So git's hashes verify the commit and its
tree, `git am` applies the patches without fuzz, and the result must be the tree that patches/UPSTREAM locks.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from mc_gguf.common.errors import RuntimeBuildError
from mc_gguf.common.files import sha256_of
from mc_gguf.runtime import upstream
from mc_gguf.runtime.shell import Log, git_env

GIT_DIRECTORY = ".git/modules/vendor/llama.cpp"
# Of the git directory; not the packager's config, hooks and index.
UNPACKED = ("HEAD", "packed-refs", "shallow", "objects", "refs")
GIT_CONFIG = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tautocrlf = false\n"
STAMP = "source.complete"
OWN_SOURCES = "mc"  # where our patches/src goes in the patched tree


def download(log: Log) -> Path:
    """The source distribution, in <cache>/downloads; fetched through pip unless it is there already.

    Raises RuntimeBuildError when pip fails, or when the file's SHA-256 is not the pinned one.
    """
    pin = upstream.pin()
    folder = upstream.cache_dir() / "downloads"
    path = folder / pin.sdist_name
    if path.is_file() and sha256_of(path) == pin.sdist_sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        _pip_download(Path(temporary), log)
        fetched = Path(temporary) / pin.sdist_name
        if not fetched.is_file():
            raise RuntimeBuildError(f"pip ran, but did not download {pin.sdist_name}; full log: {log.path}")
        if (found := sha256_of(fetched)) != pin.sdist_sha256:
            raise RuntimeBuildError(
                f"{pin.sdist_name} from your package index has SHA-256 {found}, expected {pin.sdist_sha256}: "
                "it is not the pinned release; check the index that pip uses (pip config list)"
            )
        fetched.replace(path)
    return path


def _pip_download(folder: Path, log: Log) -> None:
    """Download into `folder` with pip, which follows the user's own index, proxy and certificate settings."""
    pin = upstream.pin()
    if importlib.util.find_spec("pip") is None:
        raise RuntimeBuildError(
            f"{sys.executable} has no pip to fetch llama.cpp with; run: {sys.executable} -m ensurepip"
        )
    options = [
        "--no-deps",
        "--no-binary",
        pin.package,
        "--disable-pip-version-check",
        "--progress-bar",
        "off",
    ]
    command: list[str | Path] = [sys.executable, "-m", "pip", "download", *options]
    command += ["--dest", folder, f"{pin.package}=={pin.version}"]
    # pip asks the package for its metadata, which must not start a native build.
    env = os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    log.run(f"downloading {pin.package} {pin.version} with pip", command, folder, env)


def prepare(work: Path, patched: bool, log: Log) -> Path:
    """llama.cpp checked out in work/source, with our patches if `patched`; returns that folder. One that is
    complete already is used as it is.
    """
    source, stamp = work / "source", work / STAMP
    if stamp.is_file():
        return source
    shutil.rmtree(source, ignore_errors=True)
    unpack(download(log), source)
    check_out(source, log)
    if patched:
        apply_patches(source, log)
    stamp.touch()
    return source


def unpack(sdist: Path, source: Path) -> None:
    """Copy llama.cpp's git directory from the source distribution to source/.git: regular files only, none of
    them outside it. Raises RuntimeBuildError when the archive is damaged or has no such directory.
    """
    root = PurePosixPath(sdist.name.removesuffix(".tar.gz")) / GIT_DIRECTORY
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or not path.is_relative_to(root) or ".." in path.parts:
                    continue
                inside = path.relative_to(root)
                file = archive.extractfile(member)
                if inside.parts[0] in UNPACKED and file is not None:
                    target = source / ".git" / inside
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with file, target.open("wb") as out:
                        shutil.copyfileobj(file, out)
    except (tarfile.TarError, EOFError) as error:
        raise RuntimeBuildError(f"{sdist} is damaged ({error}): delete it and run the build again") from error
    if not (source / ".git" / "HEAD").is_file():
        raise RuntimeBuildError(f"{sdist} does not carry llama.cpp's git directory {GIT_DIRECTORY}")
    (source / ".git" / "refs").mkdir(exist_ok=True)
    (source / ".git" / "config").write_text(GIT_CONFIG)


def check_out(source: Path, log: Log) -> None:
    """Check out the pinned commit and compare its tree with the pin."""
    pin = upstream.pin()
    _git(source, log, "checking out llama.cpp", "checkout", "--quiet", "--force", "--detach", pin.commit)
    _expect_tree(source, log, pin.tree, "llama.cpp's source")


def apply_patches(source: Path, log: Log) -> None:
    """Apply the series with a strict `git am` (no fuzz, no three-way merge) and copy our own sources in. The
    tree after the patches must be the locked one.
    """
    patches = upstream.series()
    if patches:
        strict = ("am", "--quiet", "--no-3way", "--no-gpg-sign", "--keep-cr", "--whitespace=nowarn")
        _git(source, log, "applying the patches to llama.cpp", *strict, *patches)
        _expect_tree(source, log, upstream.pin().patched_tree, "the patched source")
    for path in upstream.own_sources():
        target = source / OWN_SOURCES / path.relative_to(upstream.patches_dir() / "src")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _expect_tree(source: Path, log: Log, expected: str, what: str) -> None:
    found = _git(source, log, "reading the tree", "rev-parse", "HEAD^{tree}").strip()
    if found != expected:
        raise RuntimeBuildError(
            f"{what} is git tree {found}, but patches/UPSTREAM has {expected or 'none'}; reinstall mc-gguf"
        )


def _git(source: Path, log: Log, what: str, *arguments: str | Path) -> str:
    settings = ("core.hooksPath=/dev/null", "gc.auto=0", "safe.directory=*", "advice.detachedHead=false")
    options = [word for setting in settings for word in ("-c", setting)]
    return log.run(what, ["git", *options, *arguments], source, git_env(source))
