"""`mc-gguf eval`: table, JSON, report, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import Result

from mc_gguf.evaluate import report
from mc_gguf.evaluate.result import Result as Found
from tests.support import WIKITEXT
from tests.support.command_line import fails_with, invoke

pytestmark = [pytest.mark.native, pytest.mark.usefixtures("own_cache")]


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    whole = WIKITEXT.read_text(encoding="utf-8")
    paths = [tmp_path / "wiki.txt", tmp_path / "rest.txt"]
    for path, content in zip(paths, (whole[:8_000], whole[50_000:58_000]), strict=True):
        path.write_text(content, encoding="utf-8")
    return paths


def run(*arguments: object) -> Result:
    return invoke("eval", *arguments)


def fails(message: str, *arguments: object) -> None:
    fails_with(message, "eval", *arguments)


def test_models_texts_reference_json_and_report(tiny_gguf: Path, texts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny_gguf.read_bytes())
    page = tmp_path / "report.html"
    options = ["--ctx", 256, "--tokens", 200, "--threads", 1, "--routing", "keep_min:ratio=1"]
    options += [part for text in texts for part in ("--text", text)]
    result = run(tiny_gguf, copy, *options, "--reference", tiny_gguf, "--json", "-o", page)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(r["model"], r["text"]) for r in found] == [
        (str(model), text.name) for model in (tiny_gguf, copy) for text in texts
    ]
    for r in found:
        assert r["file_bytes"] == tiny_gguf.stat().st_size
        assert (r["ctx"], r["tokens"], r["dropped_share"]) == (256, 254, 0.5)
        assert r["perplexity"] > r["perplexity_se"] > 0
        assert r["p99_kld"] > r["mean_kld"] > r["median_kld"] > 0
        assert 0 < r["top1_agreement"] < 1
        assert len(r["model_sha256"]) == 64
    assert {k: v for k, v in found[0].items() if k not in ("model", "seconds")} == {
        k: v for k, v in found[2].items() if k not in ("model", "seconds")
    }
    assert "storing log-probabilities of tiny-bf16.gguf" in result.stderr
    assert "copy.gguf on rest.txt: 100 %" in result.stderr
    html = page.read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert html.count("<circle") == 4
    assert found[0]["model_sha256"] in html
    assert "keep_min:ratio=1" in html
    well_formed(html)


def well_formed(html: str) -> None:
    """Every element is closed, and nothing comes from elsewhere."""
    assert "http" not in html
    assert "<script" not in html
    open_tags: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag != "meta":
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(html)
    assert open_tags == []


def test_table_without_a_reference(tiny_gguf: Path, texts: list[Path]) -> None:
    result = run(tiny_gguf, "--text", texts[0], "--tokens", 100, "--threads", 1)
    assert result.exit_code == 0, result.output
    head, line = result.stdout.splitlines()
    assert head.split() == ["model", "size", "text", "tokens", "perplexity"]
    assert re.fullmatch(r".*tiny-bf16\.gguf  24\.\d+ MiB  wiki\.txt +255 +\d+\.\d{4} ± \d+\.\d{4}", line)


def test_refused_before_anything_is_computed(tiny_gguf: Path, texts: list[Path], tmp_path: Path) -> None:
    fails("Error: --text, --tasks: there is nothing to evaluate on", tiny_gguf)
    fails(
        "Error: --reference: a reference is compared on a text",
        tiny_gguf,
        "--reference",
        tiny_gguf,
        "--tasks",
        "x",
    )
    fails("no such file", tmp_path / "none.gguf", "--text", texts[0])
    fails("cannot read the text .*none", tiny_gguf, "--text", tmp_path / "none")
    fails("not a GGUF", texts[0], "--text", texts[0])
    fails("Error: --routing: .*policy", tiny_gguf, "--text", texts[0], "--routing", "nope")
    fails("--output: .* is a directory, so it cannot", tiny_gguf, "--text", texts[0], "-o", tmp_path)
    missing = ("--reference", tmp_path / "none")
    fails("--reference: .*none does not exist; give a 16-bit", tiny_gguf, "--text", texts[0], *missing)
    assert not (tmp_path / "cache" / "references").exists()


def test_tasks_without_lm_eval(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fails(
        r"this needs lm_eval, which is not installed; run: pip install 'mc-gguf\[tasks\]'",
        tiny_gguf,
        "--tasks",
        "hellaswag",
    )


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (5.3, 13.0, [4.0, 6.0, 8.0, 10.0, 12.0, 14.0]),
        (24.4, 24.4, None),
        (0.0, 0.001, None),
        (900, 4000, None),
    ],
)
def test_ticks_enclose(low: float, high: float, expected: list[float] | None) -> None:
    found = report.ticks(low, high)
    assert found[0] <= low <= high <= found[-1]
    assert 2 <= len(found) <= 8
    assert expected is None or found == expected


def test_names_are_escaped_and_odd_values_drawn() -> None:
    """A model named like markup; a divergence smaller than its error; one of exactly 0 is not drawn."""
    common = {"file_bytes": 10 << 20, "text": "a&b", "ctx": 512, "tokens": 9, "perplexity": 5.0}
    rows = [
        Found("<i>.gguf", perplexity_se=0.1, mean_kld=1e-5, mean_kld_se=1e-4, **common),  # type: ignore[arg-type]
        Found("zero.gguf", perplexity_se=0.1, mean_kld=0.0, mean_kld_se=0.0, **common),  # type: ignore[arg-type]
    ]
    page = report.render(report.Report(tuple(rows), (), "mc-gguf eval '<x>'", {}, None))
    well_formed(page)
    assert "<i>" not in page
    assert page.count("<circle") == 1
    assert "nan" not in page
