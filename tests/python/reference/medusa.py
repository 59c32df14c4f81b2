"""Medusa drafting in double precision (arXiv 2401.10774, sections 2.1.1 and 2.1.2).

With tokens t_0 .. t_P (t_P is the root: the newest token, not yet seen by the target) every head
reads the target's feature P-1 (the hidden state after its final norm, whose logits chose the root):

  head h    lm_head_h(block_L(... block_1(feature))),  block(x) = x + silu(W x + b)

and predicts token P+1+h. A node of the tree is a path of ranks (r_0, ..., r_d): its token is the
r_d-th best of head d, its parent the path without its end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from reference.eagle import LEVEL_OVER_NODE, DraftTree, Margin
from reference.llama import Llama, log_softmax, silu
from reference.storage import read_folder


def block(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return x + silu(x @ weight.T + bias)


class Medusa:
    def __init__(self, config: dict, weights: dict[str, np.ndarray], target: Llama) -> None:
        self.weights, self.target = weights, target
        self.layers = config["medusa_num_layers"]

    @classmethod
    def load(cls, folder: Path, target: Llama) -> Medusa:
        return cls(*read_folder(folder), target)

    def hidden(self, head: int, features: np.ndarray) -> np.ndarray:
        """What the LM head of `head` reads, of features [n, d]."""
        for layer in range(self.layers):
            name = f"{head}.{layer}.linear"
            features = block(features, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])
        return features

    def draft(
        self,
        tokens: list[int],
        features: np.ndarray,
        *,
        paths: list[list[int]],
        min_probability: float = 0.0,
        sub_vocab: np.ndarray | None = None,
    ) -> DraftTree:
        """The tree under the root tokens[P], given features[0..P-1] of the tokens before it.

        Its nodes are ordered by depth, and those of one depth by their paths. min_probability: as
        of an EAGLE tree.
        """
        least = np.log(min_probability) if min_probability else -np.inf
        vocab = np.arange(len(self.target.head)) if sub_vocab is None else np.sort(sub_vocab)
        margin = Margin()
        width = 1 + max(max(path) for path in paths)
        best, logprobs, first_choices = [], [], 0.0
        for head in range(max(map(len, paths))):
            if head and not margin.reaches(first_choices, least + np.log(LEVEL_OVER_NODE)):
                break
            lm_head = self.weights[f"{head}.{self.layers}.weight"][vocab]
            logprobs.append(log_softmax(lm_head @ self.hidden(head, features[-1:])[0]))
            best.append(margin.top(logprobs[-1], width))
            first_choices += logprobs[-1].max()
        nodes, drafted, scores = [()], [tokens[-1]], [0.0]
        for path in sorted(map(tuple, paths), key=lambda path: (len(path), path)):
            if len(path) > len(best) or path[:-1] not in nodes:
                continue
            column = best[len(path) - 1][path[-1]]
            score = scores[nodes.index(path[:-1])] + logprobs[len(path) - 1][column]
            if margin.reaches(score, least):
                nodes.append(path)
                drafted.append(vocab[column])
                scores.append(score)
        return DraftTree(
            tokens=np.array(drafted),
            parents=np.array([-1, *(nodes.index(path[:-1]) for path in nodes[1:])]),
            scores=np.array(scores),
            margin=float(margin.value),
        )
