"""The progress line: what it says, when it is drawn, and that it can be silenced."""

from __future__ import annotations

import io

import pytest

from mc_gguf.common.progress import Progress, ProgressState, clock, listening, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_comes_about_every_tenth() -> None:
    stream = io.StringIO()
    bar = Progress("calibrate", 100, "tokens", stream, quiet=False)
    for _ in range(100):
        bar.advance()
    bar.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].startswith("calibrate:   1 %  1/100 tokens  elapsed 0:00  left 0:00")
    assert lines[-1].startswith("calibrate: 100 %  100/100 tokens")


def test_the_last_state_is_shown_once() -> None:
    stream = io.StringIO()
    bar = Progress("x", 1, "", stream, quiet=False)
    bar.advance()
    bar.close()
    assert stream.getvalue().count("100 %") == 1


def test_on_a_terminal_one_line_is_redrawn_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("mc_gguf.common.progress.time.monotonic", lambda: now[0])
    stream = Terminal()
    bar = Progress("build", 4, "steps", stream, quiet=False)
    bar.advance(note="a.c")
    now[0] = 0.05
    bar.advance(note="b.c")  # too early to be drawn
    now[0] = 30.0
    bar.advance(note="c.c")
    bar.say("log: here")
    bar.close()
    text = stream.getvalue()
    assert "b.c" not in text
    assert "\rbuild:  75 %  3/4 steps  elapsed 0:30  left 0:10  c.c\x1b[K" in text
    assert "\r\x1b[Klog: here\n" in text
    assert text.endswith("\n")


def test_a_total_may_become_known_later() -> None:
    stream = io.StringIO()
    bar = Progress("build", 0, "", stream, quiet=False)
    bar.update(0)
    bar.update(39, 78)
    assert stream.getvalue().splitlines()[1].startswith("build:  50 %  39/78")


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_quiet_writes_nothing(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MC_GGUF_QUIET", "1" if how == "environment" else "0")
    with progress("x", 2, quiet=how == "argument") as bar:
        bar.advance()
        bar.say("hello")
    assert capsys.readouterr() == ("", "")


def test_progress_writes_to_stderr_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MC_GGUF_QUIET", raising=False)
    with progress("x", 2) as bar:
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "50 %" in err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3661, "1:01:01")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_a_listener_is_told_and_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    told: list[ProgressState] = []
    with listening(told.append), progress("convert", 2, "experts") as bar:
        bar.say("a line")
        bar.advance(note="first")
        bar.update(2, note="second")
    assert told == [
        ProgressState("convert", 1, 2, "experts", "first"),
        ProgressState("convert", 2, 2, "experts", "second"),
    ]
    with listening(None), progress("convert", 1) as bar:
        bar.advance()
    assert len(told) == 2
    assert "convert: 100 %" in capsys.readouterr().err
