"""Log-likelihoods and answers over shared beginnings, and lm-evaluation-harness on tasks in local files."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mc_gguf.cli import main
from mc_gguf.evaluate.sequences import Sequences
from mc_gguf.evaluate.tasks.continuations import Generation, Tree, generate, log_likelihoods

pytestmark = pytest.mark.native

DOCUMENTS: tuple[dict[str, Any], ...] = (
    {"question": "The king of", "choices": [" England", " potato", " Scotland and France"], "answer": 0},
    {"question": "He was born in", "choices": [" of", " 1920", " the city"], "answer": 1},
    {"question": "In the United", "choices": [" States", " Kingdom", " is"], "answer": 0},
)


@pytest.fixture(scope="module")
def llm(tiny_f32: Path) -> Iterator[Sequences]:
    """In float32: BF16 kernels round differently for one token than for many."""
    """Room for 4 sequences and 256 tokens in all, 32 at a time: most cases below need several rounds."""
    llm = Sequences(tiny_f32, n_ctx=256, n_seq=4, n_batch=32, unified=True, n_threads=1)
    yield llm
    llm.close()


def encode(llm: Sequences, text: str, bos: bool = True) -> list[int]:
    return list(llm.tokenize(text.encode(), add_bos=bos, special=False))


def plainly(llm: Sequences, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One sequence at a time, token by token."""
    llm.clear()
    tokens = [*context, *continuation]
    total, greedy = 0.0, True
    for i, token in enumerate(tokens[:-1]):
        at = np.array([i], dtype=np.int32)
        row = llm.decode(np.array([token], dtype=np.int32), at, np.zeros(1, np.int32), np.ones(1, np.bool_))[
            0
        ].astype(np.float64)
        if i >= len(context) - 1:
            total += float(row[tokens[i + 1]] - row.max() - np.log(np.exp(row - row.max()).sum()))
            greedy = greedy and tokens[i + 1] == row.argmax()
    return total, greedy


def test_log_likelihoods_equal_one_by_one(llm: Sequences) -> None:
    shots = encode(llm, "Some text that all of the questions begin with, as examples are. " * 2)
    pairs = [
        (shots + encode(llm, document["question"], bos=False), encode(llm, choice, bos=False))
        for document in DOCUMENTS
        for choice in document["choices"]
    ]
    pairs += [pairs[0], (pairs[0][0], pairs[0][1] + pairs[1][1]), ([1], pairs[2][1])]
    pairs.append((encode(llm, "x " * 120)[:200], [5, 6, 7]))  # as good as no room for others
    found = log_likelihoods(llm, pairs)
    expected = [plainly(llm, context, continuation) for context, continuation in pairs]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=0.01)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_is_shared_is_computed_once(llm: Sequences) -> None:
    tree = Tree()
    assert tree.add([1, 2, 3, 4]) == [0, 1, 2, 3]
    assert tree.add([1, 2, 5]) == [0, 1, 4]
    assert tree.add([1, 2]) == [0, 1]  # nothing new: no sequence of its own
    assert tree.tokens == [1, 2, 3, 4, 5]
    assert tree.positions == [0, 1, 2, 3, 2]
    assert tree.members == [[0, 1], [0, 1], [0], [0], [1]]
    assert tree.n_seq == 2
    assert tree.add([1, 2], own_sequence=True) == [0, 1]
    assert tree.members[1] == [0, 1, 2]
    assert tree.has_room(list(range(252)), llm) is False
    assert tree.has_room([1, *range(250)], llm) is True


def test_answers_equal_one_by_one_and_stop(llm: Sequences) -> None:
    prompts = [encode(llm, document["question"]) for document in DOCUMENTS]
    prompts += [prompts[0], prompts[0][:-1], encode(llm, "Once upon a time")]
    options = Generation(max_tokens=12)
    found = generate(llm, prompts, options)
    assert found == [generate(llm, [prompt], options)[0] for prompt in prompts]
    assert found[0] == found[3]
    assert all(len(text) > 5 for text in found)
    stop = found[0][4:6]
    assert generate(llm, prompts[:1], Generation(12, stop=("never", stop)))[0] == found[0].split(stop)[0]
    again = Generation(12, temperature=1.0, seed=3)
    assert generate(llm, prompts, again) == generate(llm, prompts, again) != found


def test_an_answer_ends_at_the_models_end_token(llm: Sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generation, "choose", lambda self, logits, random: int(llm.token_eos()))
    assert generate(llm, [encode(llm, "a"), encode(llm, "b")], Generation()) == ["", ""]


def write_tasks(folder: Path) -> None:
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    kinds = {
        "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
        "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]\n",
        "answer": "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
        "doc_to_target: '{{choices[answer]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
    }
    for name, body in kinds.items():
        (folder / f"{name}.yaml").write_text(f"task: local_{name}\n{shared}{body}")


def test_tasks_of_a_local_folder(
    tiny_f32: Path, llm: Sequences, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets: Any = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    write_tasks(tmp_path)
    names = "local_choice,local_rolling,local_answer"
    monkeypatch.delenv("MC_GGUF_QUIET", raising=False)
    arguments = ["eval", tiny_f32, "--tasks", names, "--tasks-path", tmp_path, "--threads", 1, "--json"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--quiet", "-o", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert "answers" not in result.stderr
    found = {r["task"]: r for r in json.loads(result.stdout)}
    assert {(name, r["metric"], r["documents"]) for name, r in found.items()} == {
        ("local_choice", "acc", 3),
        ("local_rolling", "bits_per_byte", 3),
        ("local_answer", "exact_match", 3),
    }

    right, nats, size = 0, 0.0, 0
    for document in DOCUMENTS:
        context = encode(llm, document["question"])
        choices = [
            encode(llm, document["question"] + choice)[len(context) :] for choice in document["choices"]
        ]
        values = [plainly(llm, context, choice)[0] for choice in choices]
        right += int(np.argmax(values)) == document["answer"]
        nats -= plainly(llm, [llm.token_bos()], encode(llm, document["question"], bos=False))[0]
        size += len(document["question"].encode())
    assert found["local_choice"]["value"] == pytest.approx(right / 3)
    assert found["local_rolling"]["value"] == pytest.approx(nats / size / np.log(2), rel=1e-3)
    assert "local_choice" in (tmp_path / "r.html").read_text()

    unknown = CliRunner().invoke(main, ["eval", str(tiny_f32), "--tasks", "no_such_task"])
    assert (unknown.exit_code, unknown.stdout) == (1, "")
    assert "has no task no_such_task" in unknown.stderr
