"""The conversation on a stand-in for Llama, the interactive loop, and the command on the bundled model."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from mc_gguf.common.errors import LlamaError, McError
from mc_gguf.run import chat as chats
from mc_gguf.run.chat import HELP, say, talk
from mc_gguf.run.conversation import Conversation, Sampling
from mc_gguf.run.llama import Llama

pytestmark = pytest.mark.native
DEFAULTS = Sampling()


class Parrot:
    """Answers with what it was given; remembers the calls. `trouble` is raised after the first piece."""

    def __init__(self, template: bool) -> None:
        self.chat_template: str | None = None
        self.metadata = {"tokenizer.chat_template": "{{ messages }}"} if template else {}
        self.calls: list[Any] = []
        self.trouble: BaseException | None = None

    def create_completion(self, text: str, **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((text, options))
        yield {"choices": [{"text": "<"}]}
        if self.trouble:
            raise self.trouble
        yield {"choices": [{"text": f"{len(text)}>"}]}

    def create_chat_completion(self, messages: list[Any], **options: Any) -> Iterator[dict[str, Any]]:
        self.calls.append((list(messages), options))
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        yield {"choices": [{"delta": {"content": f"<{len(messages)}>"}}]}


def conversation(template: bool, sampling: Sampling = DEFAULTS) -> tuple[Conversation, Parrot]:
    parrot = Parrot(template)
    return Conversation(cast(Llama, parrot), sampling), parrot


def test_a_base_model_continues_the_running_text() -> None:
    talk_, parrot = conversation(template=False, sampling=Sampling(5, 0.5, 7))
    assert "".join(talk_.answer("abc")) == "<3>"
    assert "".join(talk_.answer("de")) == "<8>"
    assert [call[0] for call in parrot.calls] == ["abc", "abc<3>de"]
    assert parrot.calls[0][1] == {"stream": True, "max_tokens": 5, "temperature": 0.5, "seed": 7}


def test_a_chat_model_gets_messages() -> None:
    talk_, parrot = conversation(template=True)
    assert "".join(talk_.answer("hi")) == "<1>"
    assert "".join(talk_.answer("and")) == "<3>"
    assert [message["role"] for message in parrot.calls[1][0]] == ["user", "assistant", "user"]
    assert [message["content"] for message in parrot.calls[1][0]] == ["hi", "<1>", "and"]
    talk_.reset()
    assert "".join(talk_.answer("hi")) == "<1>"


def test_a_stopped_answer_stays_in_the_history() -> None:
    talk_, _ = conversation(template=False)
    answer = cast(Any, talk_.answer("abc"))
    assert next(answer) == "<"
    answer.close()
    assert talk_.text == "abc<"


def test_a_full_context_is_explained() -> None:
    talk_, parrot = conversation(template=False)
    parrot.trouble = ValueError("Requested tokens (300) exceed context window of 256")
    with pytest.raises(McError, match=r"\(300\) exceed context window of 256: shorten the prompt, /reset"):
        list(talk_.answer("abc"))


def test_what_the_model_is_told_comes_first() -> None:
    talk_, parrot = conversation(template=True)
    talk_.system = "Be brief."
    for prompt in ("hi", "and"):
        list(talk_.answer(prompt))
        talk_.reset()
    assert [[m["role"] for m in messages] for messages, _ in parrot.calls] == [["system", "user"]] * 2
    talk_.raw = True
    assert "".join(talk_.answer("abc")) == "<3>"
    with pytest.raises(McError, match="raw text has no place"):
        talk_.check()


def test_say_writes_pieces_and_a_newline() -> None:
    talk_, _ = conversation(template=False)
    out = io.StringIO()
    say(talk_, "abc", out)
    assert out.getvalue() == "<3>\n"


def _type(lines: list[str | type[BaseException]], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user does at the prompt, one after the other; then Ctrl-D."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)


def test_the_interactive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    talk_, parrot = conversation(template=False)
    _type(["abc", "", "/help", "/reset", "de", "/exit", "never"], monkeypatch)
    out = io.StringIO()
    talk(talk_, out)
    assert out.getvalue() == f"{HELP}\n<3>\n{HELP}\n<2>\n"
    assert [call[0] for call in parrot.calls] == ["abc", "de"]


@pytest.mark.parametrize(
    ("typed", "sent"),
    [
        (["one\\", "two\\", "", "x"], ["one\ntwo\n", "x"]),
        (['"""one', "", "/exit", 'two"""', "x"], ["one\n\n/exit\ntwo", "x"]),
        (['"""', 'a = """b""" + c', '"""'], ['a = """b""" + c']),
        (['"""one"""', "x"], ["one", "x"]),
        (['"""one', "two"], ["one\ntwo"]),
        (["one\\"], ["one\\"]),
        (["/usr/bin/env python", " /exit", "/2"], ["/usr/bin/env python", " /exit", "/2"]),
        (["one", KeyboardInterrupt, "never"], ["one"]),
    ],
)
def test_messages(
    typed: list[str | type[BaseException]], sent: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk_, parrot = conversation(template=True)
    _type(typed, monkeypatch)
    talk(talk_, io.StringIO())
    assert [messages[-1]["content"] for messages, _ in parrot.calls] == sent


@pytest.mark.parametrize("command", ["/foo", "/Exit", "/stat "])
def test_unknown_commands_are_told(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk_, parrot = conversation(template=True)
    _type([command], monkeypatch)
    out = io.StringIO()
    talk(talk_, out)
    assert f"There is no {command.strip()}. /reset forgets" in out.getvalue()
    assert not parrot.calls


@pytest.mark.parametrize(
    ("trouble", "shown"),
    [
        (KeyboardInterrupt(), "<\n(stopped)\n"),
        (
            ValueError("300 tokens exceed context window of 256"),
            "<\nError: 300 tokens exceed context window of 256: shorten the prompt, /reset, or give a larger "
            "context\n",
        ),
        (LlamaError("the chat template fails"), "<\nError: the chat template fails\n"),
    ],
)
def test_trouble_ends_the_answer_but_not_the_conversation(
    trouble: BaseException, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk_, parrot = conversation(template=False)
    parrot.trouble = trouble
    _type(["abc"], monkeypatch)
    out = io.StringIO()
    talk(talk_, out)
    assert out.getvalue() == f"{HELP}\n{shown}\n"


def run(*arguments: str | Path, typed: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["chat", *map(str, arguments)], input=typed)
    return result.exit_code, result.stdout, result.stderr


def test_the_command_answers_a_prompt_greedily_and_repeatably(tiny_gguf: Path) -> None:
    first = run(tiny_gguf, "-p", "Once upon a time", "-n", "12", "--temp", "0")
    assert first == run(tiny_gguf, "-p", "Once upon a time", "-n", "12", "--temp", "0", "--threads", "1")
    code, out, err = first
    assert (code, err) == (0, "")
    assert len(out.split()) > 5


def test_seeds_choose_the_answer(tiny_gguf: Path) -> None:
    def answer(seed: int) -> str:
        return run(tiny_gguf, "-p", "The", "-n", "16", "--temp", "1.5", "--seed", str(seed))[1]

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_the_command_talks_until_the_end_of_input(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run(tiny_gguf, "-n", "4", "--temp", "0", typed="The king\n/reset\nThe king\n/exit\n")
    assert code == 0
    answers = [line for line in out.splitlines() if line and line != HELP]
    assert len(answers) >= 2


def test_what_routing_saved_is_said_at_the_end(tiny_gguf: Path) -> None:
    prompt = ("-p", "Once upon a time", "-n", "8", "--temp", "0", "--threads", "1")
    code, out, err = run(tiny_gguf, *prompt, "--routing", "threshold:threshold=1.5")
    assert code == 0
    assert err == (
        "Routing threshold: 50.0% of expert activations dropped, 0.0% protected, "
        f"{err.split(', ')[-1].split('%')[0]}% of expert bytes not read\n"
    )
    assert 40 < float(err.split(", ")[-1].split("%")[0]) <= 60
    assert out != run(tiny_gguf, *prompt)[1]
    assert run(tiny_gguf, *prompt, "--routing", "off")[2] == ""
    assert run(tiny_gguf, *prompt, "--routing", "odp:threshold=0.5", "--quiet")[2] == ""


def test_stats_on_the_way(tiny_gguf: Path) -> None:
    typed = "The king\n/stats\n/exit\n"
    options = ("-n", "4", "--temp", "0", "--threads", "1")
    _, out, err = run(tiny_gguf, *options, "--routing", "odp:threshold=0.5", typed=typed)
    assert f"> {err}" in out
    assert err.startswith("Routing odp: ")
    _, out, err = run(tiny_gguf, *options, typed=typed)
    assert "> Routing off\n" in out
    assert err == ""


def test_the_saving_is_said_after_an_error_too(tiny_gguf: Path) -> None:
    code, _, err = run(tiny_gguf, "-p", "king " * 400, "--ctx", "256", "--routing", "top_p:top_p=0.5")
    assert code == 1
    assert err.splitlines()[0] == "Routing top_p: nothing was routed"
    assert err.splitlines()[1].startswith("Error: --ctx: Requested tokens (")


def test_wrong_routing_is_one_line(tiny_gguf: Path) -> None:
    code, _, err = run(tiny_gguf, "-p", "x", "--routing", "odp")
    assert code == 1
    assert err.startswith("Error: --routing: the file carries no thresholds for routing 'odp'")
    assert err.count("\n") == 1


def test_a_prompt_longer_than_the_context_is_one_line(tiny_gguf: Path) -> None:
    code, _, err = run(tiny_gguf, "-p", "king " * 400, "--ctx", "256")
    assert code == 1
    assert err.startswith("Error: --ctx: Requested tokens (")
    assert err.count("\n") == 1


def test_chat_closes_the_model(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Llama, "close", lambda self: closed.append(True))
    monkeypatch.setattr(chats, "say", lambda *_: None)
    chats.chat(tiny_gguf, "x", Sampling(), n_ctx=256)
    assert closed
