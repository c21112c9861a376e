"""Llama on the real runtime: it works, its errors are clear, and no other library gets in."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mc_gguf import Llama, runtime
from mc_gguf.common.errors import FormatError, LlamaError, SourceError
from mc_gguf.common.machine import usable_cores
from mc_gguf.quantize.writer import write_model
from mc_gguf.runtime import Runtime, locate
from mc_gguf.source import open_checkpoint
from tests.support.gguf_models import make_plan, uniform

pytestmark = pytest.mark.native
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def llm(tiny_gguf: Path) -> Llama:
    return Llama(tiny_gguf, n_ctx=512, logits_all=True)


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh process: what llama_cpp is imported from can be chosen only once."""
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_completion_tokens_logits_and_state_work(llm: Llama) -> None:
    done: Any = llm(PROMPT, max_tokens=8, temperature=0)
    assert done["usage"]["completion_tokens"] == 8
    state = llm.save_state()
    tokens = llm.tokenize(PROMPT.encode())
    assert llm.detokenize(tokens).strip().decode() == PROMPT
    llm.reset()
    llm.eval(tokens)
    assert np.isfinite(llm.scores[: len(tokens)]).all()
    llm.load_state(state)
    assert llm.n_tokens == state.n_tokens


def test_embeddings_work(tiny_gguf: Path) -> None:
    embedder = Llama(tiny_gguf, n_ctx=256, embedding=True)
    assert len(embedder.embed("king")[0]) == embedder.n_embd()


def test_greedy_text_does_not_depend_on_threads(tiny_gguf: Path) -> None:
    def text(threads: int) -> str:
        done: Any = Llama(tiny_gguf, n_ctx=256, n_threads=threads)(PROMPT, max_tokens=16, temperature=0)
        return str(done["choices"][0]["text"])

    assert text(1) == text(2)


def test_it_is_quiet_and_uses_the_cores(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quiet = Llama(str(tiny_gguf), n_ctx=256)
    quiet(PROMPT, max_tokens=2)
    assert capfd.readouterr() == ("", "")
    assert quiet.n_threads == quiet.n_threads_batch == usable_cores()
    assert Llama(tiny_gguf, n_ctx=256, n_threads=1).n_threads_batch == 1


def test_verbose_shows_llama_cpps_log(tiny_gguf: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Llama(tiny_gguf, n_ctx=256, verbose=True)
    assert "llama_model_loader" in capfd.readouterr().err


def test_a_small_context_is_rounded_up_as_llama_cpp_does(tiny_gguf: Path) -> None:
    small = Llama(tiny_gguf, n_ctx=8)
    assert small.n_ctx() == 256
    assert small(PROMPT * 4, max_tokens=2)


def test_it_can_be_pickled(llm: Llama) -> None:
    copy = pickle.loads(pickle.dumps(llm))
    assert isinstance(copy, Llama)
    assert copy.n_ctx() == llm.n_ctx()


def test_wrong_paths_are_source_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SourceError, match=r"none\.gguf: no such file; give the path of a GGUF"):
        Llama(tmp_path / "none.gguf")
    with pytest.raises(SourceError, match="is a directory"):
        Llama(tmp_path)
    gc.collect()
    assert capsys.readouterr().err == ""  # no "Exception ignored in __del__"


def test_an_unreadable_file_is_a_source_error(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"cannot read .*tiny-bf16\.gguf: Permission denied"):
        Llama(tiny_gguf)


def test_what_is_no_gguf_is_a_format_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\3\4....")
    with pytest.raises(FormatError, match="is a ZIP archive"):
        Llama(path)
    path.write_bytes(b"GGML....")
    with pytest.raises(FormatError, match=r"is not a GGUF: it begins with b'GGML'"):
        Llama(path)


def test_a_truncated_gguf_is_a_format_error_with_llama_cpps_reason(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:200_000])
    with pytest.raises(FormatError, match=r"cut\.gguf: .*not within the file bounds"):
        Llama(path)


AFTER_TORCH = """
import sys, torch
from mc_gguf import Llama
torch.set_num_threads(1)  # in the thread that runs the model
llm = Llama(sys.argv[1], n_ctx=256, n_threads=1)
tokens = llm.tokenize(b"The king looked at the sea and said that the ship was lost in the great storm")
texts = []
for _ in range(2):
    llm.reset()
    texts.append(llm(tokens, max_tokens=8, temperature=0)["choices"][0]["text"])
    matrix = torch.ones(1024, 1024, dtype=torch.bfloat16)
    matrix @ matrix  # on CPUs with AMX: with tiles of another shape, which are released at the end
llm.close()
assert texts[0] == texts[1], texts
"""


def test_a_model_runs_again_after_torch_used_the_same_registers(tiny_gguf: Path, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_gguf)
    plan = make_plan(source.info, uniform(source.info, "Q8_0"), tmp_path / "plan.json")
    write_model(source, None, plan, tmp_path / "q.gguf", threads=1)  # attention is Q6_K and Q8_0
    command = [sys.executable, "-c", AFTER_TORCH, str(tmp_path / "q.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_overrides_that_are_no_values_are_refused(tiny_gguf: Path) -> None:
    with pytest.raises(LlamaError, match="kv_overrides"):
        Llama(tiny_gguf, kv_overrides={"x": object()})


def test_only_the_runtimes_libraries_are_loaded(runtime: Runtime) -> None:
    code = (
        "from mc_gguf import Llama; from mc_gguf.runtime.locate import mapped_libraries\n"
        "import llama_cpp._ggml as g; print(g.libggml._name)\n"
        "print(*{path.parent for path in mapped_libraries()}, sep='\\n')"
    )
    done = python(code)
    assert done.stdout.splitlines() == [str(runtime.library("ggml")), str(runtime.lib_dir.resolve())], (
        done.stderr
    )


def test_llama_cpp_imported_before_on_other_libraries_is_refused(unpatched_runtime: Runtime) -> None:
    done = python(
        "import llama_cpp\nfrom mc_gguf import Llama", LLAMA_CPP_LIB_PATH=str(unpatched_runtime.lib_dir)
    )
    assert "RuntimeBuildError" in done.stderr
    assert "import Llama from mc_gguf before anything imports llama_cpp" in done.stderr


def test_llama_cpp_imported_after_is_the_same(runtime: Runtime) -> None:
    done = python("from mc_gguf import Llama\nimport llama_cpp\nprint(issubclass(Llama, llama_cpp.Llama))")
    assert done.stdout == "True\n", done.stderr


def test_a_stock_library_in_place_of_the_runtime_is_refused(unpatched_runtime: Runtime) -> None:
    done = python("from mc_gguf import Llama", MC_GGUF_RUNTIME=str(unpatched_runtime.path))
    assert "is not patched, but this mc-gguf needs patch set" in done.stderr


def test_without_a_runtime_the_error_says_what_to_run(tmp_path: Path) -> None:
    done = python("from mc_gguf import Llama", MC_GGUF_CACHE=str(tmp_path))
    assert "RuntimeBuildError" in done.stderr
    assert "run: mc-gguf runtime build" in done.stderr


def test_use_in_llama_cpp_is_repeatable() -> None:
    assert runtime.use_in_llama_cpp() is sys.modules["llama_cpp"]
    locate.check_loaded(locate.mapped_libraries(), runtime.require().lib_dir)
