"""What is pinned and what is built: the facts that `mc-gguf runtime info` prints."""

from __future__ import annotations

from typing import Any

from mc_gguf import __version__
from mc_gguf.runtime import upstream
from mc_gguf.runtime.locate import BACKENDS, find


def runtime_facts() -> dict[str, Any]:
    """Versions, commit, patches, built backends and path. Works without a runtime."""
    pin, found = upstream.pin(), find()
    return {
        "mc_gguf": __version__,
        "llama_cpp_python": pin.version,
        "llama_cpp_commit": pin.commit,
        "patches": [path.name for path in upstream.series()],
        "patch_digest": upstream.patchset_digest(),
        "cache": str(upstream.cache_dir()),
        "built": found is not None,
        "backend": found.backend if found else None,
        "path": str(found.path) if found else None,
        "backends": {name: find(name) is not None for name in BACKENDS},
        "unpatched": find(patched=False) is not None,
    }


def render_facts(facts: dict[str, Any]) -> str:
    """runtime_facts() as text, with the next command where nothing is built."""
    built = [name for name, is_built in facts["backends"].items() if is_built]
    lines = [
        f"mc_gguf           {facts['mc_gguf']}",
        f"llama-cpp-python  {facts['llama_cpp_python']}",
        f"llama.cpp commit  {facts['llama_cpp_commit']}",
        f"patches           {len(facts['patches'])}, digest {facts['patch_digest']}",
        f"backends built    {', '.join(built) or 'none'}",
        f"path              {facts['path'] or 'not built; ' + upstream.BUILD_HINT}",
    ]
    return "\n".join(lines)
