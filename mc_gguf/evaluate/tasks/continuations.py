"""Many short token sequences at once: what they begin with in common is computed once.

A multiple-choice question is one context with several continuations, and its examples are those of the next
question, too. Sequences are put into a tree of tokens; each node is one token in llama.cpp's batch and KV
cache, belonging to all sequences that pass through it. The Sequences must be unified.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mc_gguf.evaluate.sequences import Sequences

import llama_cpp  # isort: skip  after mc_gguf, which picks its libraries

Tokens = Sequence[int]
Advance = Callable[[int], None]


@dataclass
class Tree:
    """Nodes in an order in which parents come before children. wanted: nodes whose logits are needed."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    members: list[list[int]] = field(default_factory=list)
    wanted: set[int] = field(default_factory=set)
    n_seq: int = 0
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def path(self, tokens: Tokens) -> list[int]:
        """The nodes of the longest beginning of `tokens` that is there."""
        found, node = [], -1
        for token in tokens:
            if (child := self._children.get((node, token))) is None:
                break
            found.append(node := child)
        return found

    def add(self, tokens: Tokens, own_sequence: bool = False) -> list[int]:
        """The nodes of `tokens`, new ones made. It gets a number of its own, n_seq before the call, if it has
        new nodes or `own_sequence`.
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
        """Whether `tokens` fit, and `reserved` more nodes."""
        new = len(tokens) - len(self.path(tokens)) + reserved
        return self.n_seq < llm.n_seq and len(self.tokens) + new <= llm.n_ctx_seq

    def compute(self, llm: Sequences, use: Callable[[int, NDArray[np.float32]], None]) -> None:
        """Runs the model over all nodes; `use` gets the number and logits [V] of each wanted one."""
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
            for node, row in zip((i for i in part if i in self.wanted), logits, strict=True):
                use(node, row)


def log_likelihoods(
    llm: Sequences, pairs: Sequence[tuple[Tokens, Tokens]], advance: Advance = lambda n: None
) -> list[tuple[float, bool]]:
    """For each (context, continuation), neither empty, together at most n_ctx_seq + 1 tokens: the natural
    logarithm of the continuation's probability, and whether it is what greedy decoding gives.
    """
    total, greedy = [0.0] * len(pairs), [True] * len(pairs)
    tree, targets = Tree(), dict[int, list[tuple[int, int]]]()

    def use(node: int, logits: NDArray[np.float32]) -> None:
        top, best = float(logits.max()), int(logits.argmax())
        log_sum = top + float(np.log(np.exp(logits - top).sum()))
        for index, token in targets[node]:
            total[index] += float(logits[token]) - log_sum
            greedy[index] = greedy[index] and token == best

    for index in sorted(range(len(pairs)), key=lambda i: [*pairs[i][0], *pairs[i][1]]):
        context, continuation = pairs[index]
        tokens = [*context, *continuation][:-1]
        if not tree.has_room(tokens, llm):
            tree.compute(llm, use)
            tree = Tree()
            targets.clear()
        nodes = tree.add(tokens)[len(context) - 1 :]
        for node, token in zip(nodes, continuation, strict=True):
            targets.setdefault(node, []).append((index, token))
        tree.wanted.update(nodes)
        advance(1)
    tree.compute(llm, use)
    return list(zip(total, greedy, strict=True))


@dataclass(frozen=True)
class Generation:
    """When an answer ends (besides the model's own end token), and how its tokens are chosen: temperature 0
    is greedy.
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
        """The text before the first stop; None when there is none in it."""
        places = [place for stop in self.stop if stop and (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None


def generate(
    llm: Sequences, prompts: Sequence[Tokens], options: Generation, advance: Advance = lambda n: None
) -> list[str]:
    """What follows each prompt, as many as fit at once. A prompt has at least one token, and together with
    max_tokens at most n_ctx_seq.
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


def _answer(
    llm: Sequences,
    tree: Tree,
    prompts: Sequence[tuple[int, Tokens]],
    options: Generation,
    random: np.random.Generator,
) -> dict[int, str]:
    """Answers to the prompts in the tree, prompt s being sequence s: its nodes, then token by token."""
    last = [tree.path(tokens)[-1] for _, tokens in prompts]
    tree.wanted = set(last)
    first: dict[int, int] = {}
    rows: dict[int, NDArray[np.float32]] = {}
    tree.compute(llm, lambda node, logits: rows.update({node: logits.copy()}))
    first = {s: options.choose(rows[node], random) for s, node in enumerate(last)}
    said: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    following = first
    while following:
        for s, token in list(following.items()):
            ended = llama_cpp.llama_vocab_is_eog(llm._model.vocab, token)
            if not ended:
                said[s].append(token)
                texts[s] = llm.detokenize(said[s]).decode("utf-8", "ignore")
            before_stop = options.cut(texts[s])
            texts[s] = texts[s] if before_stop is None else before_stop
            if ended or before_stop is not None or len(said[s]) >= options.max_tokens:
                del following[s]
        if not following:
            break
        running = list(following)
        logits = llm.decode(
            np.array([following[s] for s in running], dtype=np.int32),
            np.array([len(prompts[s][1]) + len(said[s]) - 1 for s in running], dtype=np.int32),
            np.array(running, dtype=np.int32),
            np.ones(len(running), dtype=np.bool_),
        )
        following = {s: options.choose(row, random) for s, row in zip(running, logits, strict=True)}
    return {index: texts[s] for s, (index, _) in enumerate(prompts)}
