"""Shapes of draft trees."""

from __future__ import annotations

import dataclasses

from . import _core
from .errors import RequestError, short


@dataclasses.dataclass(frozen=True)
class Tree:
    """Shape of the draft tree: `depth` levels, a beam of `topk`, `tokens` nodes with the root.

    With a `min_probability` these are limits: only tokens whose path from the root the drafter
    takes to be at least that likely are verified and drafted from, and a further level is drafted
    where the best path is four times as likely, so that each round is as deep and as wide as it is
    likely to pay. Probabilities are those over the drafter's vocabulary: the same value makes
    larger trees with a smaller sub-vocabulary. On a GPU it must be 0: all trees have one shape.

    Written as a text, "6x10x60" or "4x4x6@0.08".
    """

    depth: int
    topk: int
    tokens: int
    min_probability: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Tree:
        """Of the text form. RequestError for another."""
        sizes, at, probability = text.partition("@")
        try:
            depth, topk, tokens = map(int, sizes.split("x"))
            return cls(depth, topk, tokens, float(probability) if at else 0.0)
        except ValueError:
            raise RequestError(
                f"tree: expected DEPTHxTOPKxTOKENS or DEPTHxTOPKxTOKENS@MIN_PROBABILITY, for"
                f" example 6x10x60, found {short(text)}"
            ) from None

    def __str__(self) -> str:
        least = f"@{self.min_probability}" if self.min_probability else ""
        return f"{self.depth}x{self.topk}x{self.tokens}{least}"


def default_tree(device: str = "auto") -> Tree:
    """The draft tree that suits a device: small on a CPU, FR-Spec's own on a GPU."""
    return Tree(*_core.default_tree(device))
