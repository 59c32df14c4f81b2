"""EAGLE-2 drafting and speculative decoding in double precision (arXiv 2406.16858, section 4).

A drafter is `fc` and a few decoder layers of the target's shape; embedding (unless it brings its
own) and head are the target's. Row i of its input is
fc(concat(embedding of token i+1, feature i)) at position i, where feature i is the target's
hidden state after its final norm. The output of a row goes straight to the target's head.

With tokens t_0 .. t_P (t_P is the root: the newest token, not yet seen by the target) the output
of row P-1 gives level 1. A beam node of level l is a drafter row of its own: its token with the
output of its parent's row in the place of the feature, at position P-1+l, seeing the committed
rows, its ancestors' rows and itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reference.llama import Layer, Llama, log_softmax
from reference.storage import read_folder


@dataclass
class DraftTree:
    """A verified tree. Node 0 is the root; parents[i] < i and parents[0] == -1.

    scores[i] is the sum of log-probabilities from the root to node i. `margin` is the smallest
    difference of two scores that decided anything: who is in the beam, who is kept, and in which
    order. Below the rounding error of an implementation, that implementation may rightly differ.
    """

    tokens: np.ndarray
    parents: np.ndarray
    scores: np.ndarray
    margin: float

    def depths(self) -> np.ndarray:
        depths = np.zeros(len(self.tokens), dtype=np.int64)
        for node in range(1, len(depths)):
            depths[node] = depths[self.parents[node]] + 1
        return depths

    def ancestors(self) -> np.ndarray:
        """mask[i, j]: node j is node i or one of its ancestors."""
        mask = np.eye(len(self.tokens), dtype=bool)
        for node in range(1, len(mask)):
            mask[node] |= mask[self.parents[node]]
        return mask


@dataclass
class Candidate:
    """A node of the pool. `parent` is its parent's pool index, -1 for the root."""

    token: int
    parent: int
    score: float


LEVEL_OVER_NODE = 4


class Margin:
    """The smallest gap between neighbours of the sorted lists that decide the tree."""

    def __init__(self) -> None:
        self.value = np.inf

    def reaches(self, score: float, least: float) -> bool:
        self.value = min(self.value, abs(score - least))
        return score >= least

    def top(self, scores: np.ndarray, count: int) -> np.ndarray:
        """Indices of the `count` largest, best first, the lower index first among equals."""
        order = np.argsort(-scores, kind="stable")
        if count > 0:
            decisive = scores[order[: count + 1]]
            self.value = min(self.value, np.min(-np.diff(decisive), initial=np.inf))
        return order[:count]

    def kept(self, scores: np.ndarray, count: int) -> np.ndarray:
        """Indices of the `count` largest in ascending order; only the boundary decides."""
        order = np.argsort(-scores, kind="stable")
        if 0 < count < len(scores):
            self.value = min(self.value, scores[order[count - 1]] - scores[order[count]])
        return np.sort(order[:count])


class Eagle:
    def __init__(self, config: dict, weights: dict[str, np.ndarray], target: Llama) -> None:
        self.weights, self.target = weights, target
        self.embedding = weights.get("embed_tokens.weight", target.embedding)
        self.layers = [
            Layer(config, weights, f"layers.{index}.")
            for index in range(config["num_hidden_layers"])
        ]

    @classmethod
    def load(cls, folder: Path, target: Llama) -> Eagle:
        return cls(*read_folder(folder), target)

    def inputs(self, tokens: np.ndarray, features: np.ndarray) -> np.ndarray:
        x = np.concatenate([self.embedding[tokens], features], axis=1)
        return x @ self.weights["fc.weight"].T + self.weights.get("fc.bias", 0.0)

    def rows(
        self,
        tokens: np.ndarray,
        features: np.ndarray,
        positions: np.ndarray,
        visible: np.ndarray,
    ) -> np.ndarray:
        """Output hidden states [n, d] of drafter rows with those tokens and features."""
        x = self.inputs(tokens, features)
        for layer in self.layers:
            x = layer(x, positions, visible)
        return x

    def draft(
        self,
        tokens: list[int],
        features: np.ndarray,
        *,
        depth: int,
        topk: int,
        tree_tokens: int,
        min_probability: float = 0.0,
        sub_vocab: np.ndarray | None = None,
    ) -> DraftTree:
        """The tree under the root tokens[P], given features[0..P-1] of the tokens before it.

        min_probability: nodes of less likely paths are left out, and levels below paths that are
        less than LEVEL_OVER_NODE times as likely. sub_vocab: ascending token ids the head is
        restricted to (None: all of them).
        """
        least = np.log(min_probability) if min_probability else -np.inf
        vocab = np.arange(len(self.target.head)) if sub_vocab is None else np.sort(sub_vocab)
        head = self.target.head[vocab]
        width = min(topk, len(vocab))
        margin = Margin()
        committed = len(tokens) - 1

        row_tokens = np.asarray(tokens[1:], dtype=np.int64)
        row_inputs = np.asarray(features, dtype=np.float64)
        positions = np.arange(committed)
        visible = np.tri(committed, dtype=bool)
        pool: list[Candidate] = []
        beam = [(-1, committed - 1, 0.0)]  # (pool index, drafter row, score)

        for level in range(1, depth + 1):
            hidden = self.rows(row_tokens, row_inputs, positions, visible)
            first = len(pool)
            for node, row, score in beam:
                logprobs = log_softmax(head @ hidden[row])
                for column in margin.top(logprobs, width):
                    pool.append(Candidate(int(vocab[column]), node, score + logprobs[column]))
            if level == depth:
                break
            parent_rows = {node: row for node, row, _ in beam}
            scores = np.array([candidate.score for candidate in pool[first:]])
            if not margin.reaches(scores.max(), least + np.log(LEVEL_OVER_NODE)):
                break
            beam = []
            for index in first + margin.top(scores, width):
                candidate = pool[index]
                if not margin.reaches(candidate.score, least):
                    break
                parent = parent_rows[candidate.parent]
                row = len(row_tokens)
                row_tokens = np.append(row_tokens, candidate.token)
                row_inputs = np.vstack([row_inputs, hidden[parent]])
                positions = np.append(positions, committed - 1 + level)
                visible = np.pad(visible, ((0, 1), (0, 1)))
                visible[row] = visible[parent]
                visible[row, row] = True
                beam.append((int(index), row, candidate.score))

        scores = np.array([candidate.score for candidate in pool])
        likely = sum(margin.reaches(score, least) for score in scores)
        kept = margin.kept(scores, min(tree_tokens - 1, likely))
        node_of = {-1: 0} | {int(index): node for node, index in enumerate(kept, start=1)}
        return DraftTree(
            tokens=np.array([tokens[-1], *(pool[index].token for index in kept)]),
            parents=np.array([-1, *(node_of[pool[index].parent] for index in kept)]),
            scores=np.array([0.0, *(pool[index].score for index in kept)]),
            margin=float(margin.value),
        )


@dataclass
class Round:
    """One verification: the sequence it started from, its tree, the logits of its rows."""

    tokens: list[int]
    tree: DraftTree
    logits: np.ndarray
    emitted: list[int]


def walk(tree: DraftTree, chosen: np.ndarray) -> list[int]:
    """Tokens accepted by following the target's choice from the root, and the one after them."""
    node, emitted = 0, []
    while True:
        emitted.append(int(chosen[node]))
        children = np.flatnonzero((tree.parents == node) & (tree.tokens == chosen[node]))
        if not len(children):
            return emitted
        node = children[0]


def speculate(eagle: Eagle, prompt: list[int], count: int, **tree_options) -> list[Round]:
    """Greedy speculative rounds until `count` tokens or more follow the prompt.

    The first token comes from the prompt itself; each round then drafts under the newest token,
    runs the target over the whole tree in one pass and walks it.
    """
    target = eagle.target
    tokens = list(prompt)
    tokens.append(int(target.forward(tokens)[0][-1].argmax()))
    rounds = []
    while len(tokens) - len(prompt) < count:
        committed = len(tokens) - 1
        features = target.forward(tokens[:-1])[1]
        tree = eagle.draft(tokens, features, **tree_options)
        visible = np.tri(committed + len(tree.tokens), dtype=bool)
        visible[committed:, committed:] = tree.ancestors()
        logits, _ = target.forward(
            np.concatenate([tokens[:-1], tree.tokens]),
            np.concatenate([np.arange(committed), committed + tree.depths()]),
            visible,
        )
        logits = logits[committed:]
        emitted = walk(tree, logits.argmax(1))
        rounds.append(Round(list(tokens), tree, logits, emitted))
        tokens += emitted
    return rounds
