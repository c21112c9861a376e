"""Many short token sequences at once: what they share at the beginning is computed once.

A multiple-choice question is one context with several continuations, and the next question often has the
same examples in front. Sequences are put into a tree of tokens. Each node is one token in llama.cpp's batch
and KV cache, and belongs to all sequences that pass through it. The Sequences must be unified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mc_gguf.evaluate.sequences import Sequences

import llama_cpp  # isort: skip  after mc_gguf, which picks its libraries

Tokens = Sequence[int]
Targets = dict[int, list[tuple[int, int]]]  # by node: the pair's number, and the token that follows
Advance = Callable[[int], None]


@dataclass
class Tree:
    """Nodes, parents before children. `wanted` are those whose logits are needed."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    n_seq: int = 0
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def path(self, tokens: Tokens) -> list[int]:
        """The nodes of the longest beginning of `tokens` that is in the tree."""
        found, node = [], -1
        for token in tokens:
            if (child := self._children.get((node, token))) is None:
                break
            found.append(node := child)
        return found

    def add(self, tokens: Tokens, own_sequence: bool = False) -> list[int]:
        """The nodes of `tokens`; those that are missing are made.

        If some were missing, or with `own_sequence`, `tokens` become a sequence of their own: number n_seq
        before the call.
        """
        nodes = self.path(tokens)
        if len(nodes) == len(tokens) and not own_sequence:
            return nodes
        for token in tokens[len(nodes) :]:
            parent, new = nodes[-1] if nodes else -1, len(self.tokens)
            self._children[parent, token] = new
            self.tokens.append(token)
            self.positions.append(len(nodes))
            self.members.append([])
            nodes.append(new)
        for node in nodes:
            self.members[node].append(self.n_seq)
        self.n_seq += 1
        return nodes

    def has_room(self, tokens: Tokens, llm: Sequences, reserved: int = 0) -> bool:
        """Whether there is room for `tokens` and `reserved` more nodes."""
        new = len(tokens) - len(self.path(tokens)) + reserved
        return self.n_seq < llm.n_seq and len(self.tokens) + new <= llm.n_ctx_seq

    def compute(self, llm: Sequences) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Run the model over all nodes; yields the number and logits [V] of each wanted one.

        The logits are llama.cpp's own memory: valid until the next pair.
        """
        llm.clear()
        for start in range(0, len(self.tokens), llm.n_batch):
            part = range(start, min(start + llm.n_batch, len(self.tokens)))
            wanted = [node in self.wanted for node in part]
            logits = llm.decode(
                np.array([self.tokens[i] for i in part], dtype=np.int32),
                np.array([self.positions[i] for i in part], dtype=np.int32),
                [self.members[i] for i in part],
                np.array(wanted),
            )
            yield from zip((i for i in part if i in self.wanted), logits, strict=True)


def log_likelihoods(
    llm: Sequences, pairs: Sequence[tuple[Tokens, Tokens]], advance: Advance = lambda n: None
) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-probability in nats, and whether it is greedy.

    Greedy: greedy decoding would give it. Neither part may be empty, and both together have at most
    n_ctx_seq + 1 tokens.
    """
    found = [(0.0, True)] * len(pairs)
    tree, targets = Tree(), Targets()
    for index in sorted(range(len(pairs)), key=lambda i: [*pairs[i][0], *pairs[i][1]]):
        context, continuation = pairs[index]
        tokens = [*context, *continuation][:-1]
        if not tree.has_room(tokens, llm):
            _add_up(llm, tree, targets, found)
            tree, targets = Tree(), Targets()
        nodes = tree.add(tokens)[len(context) - 1 :]
        for node, token in zip(nodes, continuation, strict=True):
            targets.setdefault(node, []).append((index, token))
        tree.wanted.update(nodes)
        advance(1)
    _add_up(llm, tree, targets, found)
    return found


def _add_up(llm: Sequences, tree: Tree, targets: Targets, found: list[tuple[float, bool]]) -> None:
    """Run the tree, and add the log-probabilities of its targets to `found`."""
    for node, logits in tree.compute(llm):
        top, best = float(logits.max()), int(logits.argmax())
        log_sum = top + float(np.log(np.exp(logits - top).sum()))
        for index, token in targets[node]:
            total, is_greedy = found[index]
            found[index] = (total + float(logits[token]) - log_sum, is_greedy and token == best)


@dataclass(frozen=True)
class Generation:
    """When an answer ends, besides at the model's own end token, and how its tokens are chosen.

    Temperature 0 is greedy.
    """

    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0

    def choose(self, logits: NDArray[np.float32], random: np.random.Generator) -> int:
        if self.temperature <= 0:
            return int(logits.argmax())
        p = np.exp((logits - logits.max()) / np.float32(self.temperature)).astype(np.float64)
        return int(random.choice(len(p), p=p / p.sum()))

    def cut(self, text: str) -> str | None:
        """The text before the first stop; None when it has none."""
        places = [place for stop in self.stop if stop and (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None


def generate(
    llm: Sequences, prompts: Sequence[Tokens], options: Generation, advance: Advance = lambda n: None
) -> list[str]:
    """What follows each prompt; as many prompts as fit are answered together.

    A prompt has at least one token, and at most n_ctx_seq together with max_tokens.
    """
    answers: dict[int, str] = {}
    random = np.random.default_rng(options.seed)
    group: list[int] = []
    tree = Tree()
    for index in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        reserved = options.max_tokens * (len(group) + 1)
        if group and not tree.has_room(prompts[index], llm, reserved):
            answers |= _answer(llm, tree, [(i, prompts[i]) for i in group], options, random)
            advance(len(group))
            tree, group = Tree(), []
        tree.add(prompts[index], own_sequence=True)
        group.append(index)
    if group:
        answers |= _answer(llm, tree, [(i, prompts[i]) for i in group], options, random)
        advance(len(group))
    return [answers[i] for i in range(len(prompts))]


@dataclass
class _Answer:
    """An answer while it is generated, to the prompt with this number and this many tokens."""

    index: int
    n_prompt: int
    tokens: list[int] = field(default_factory=list)
    text: str = ""

    def extend(self, token: int, llm: Sequences, options: Generation) -> bool:
        """Append the token that the model chose. Returns whether the answer goes on."""
        if llama_cpp.llama_vocab_is_eog(llm._model.vocab, token):
            return False
        self.tokens.append(token)
        self.text = llm.detokenize(self.tokens).decode("utf-8", "ignore")
        before_stop = options.cut(self.text)
        if before_stop is not None:
            self.text = before_stop
            return False
        return len(self.tokens) < options.max_tokens


def _answer(
    llm: Sequences,
    tree: Tree,
    prompts: Sequence[tuple[int, Tokens]],
    options: Generation,
    random: np.random.Generator,
) -> dict[int, str]:
    """Answers to the prompts in the tree, prompt s being sequence s: first its nodes, then token by token."""
    last = [tree.path(tokens)[-1] for _, tokens in prompts]
    tree.wanted = set(last)
    rows = {node: logits.copy() for node, logits in tree.compute(llm)}
    answers = [_Answer(index, len(tokens)) for index, tokens in prompts]
    following = {s: options.choose(rows[node], random) for s, node in enumerate(last)}
    while running := [s for s, token in following.items() if answers[s].extend(token, llm, options)]:
        logits = llm.decode(
            np.array([following[s] for s in running], dtype=np.int32),
            np.array([answers[s].n_prompt + len(answers[s].tokens) - 1 for s in running], dtype=np.int32),
            np.array(running, dtype=np.int32),
            np.ones(len(running), dtype=np.bool_),
        )
        following = {s: options.choose(row, random) for s, row in zip(running, logits, strict=True)}
    return {answer.index: answer.text for answer in answers}
