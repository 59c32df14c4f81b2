"""How two rankings differ: the tokens that they share by size, and the text that they cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import RankingError
from ..tokenizer import Tokenizer
from .chunk import Chunk
from .count import add_counts, count_texts
from .file import Ranking
from .records import Broken

Kind = Literal["corpus", "held out", "task"]


@dataclass(frozen=True)
class Overlap:
    """Tokens that both sub-vocabularies of `size` hold."""

    size: int
    shared: int

    @property
    def share(self) -> float:
        return self.shared / self.size


@dataclass(frozen=True)
class Text:
    """A text to cover. kind: what a ranking was made of, a held-out text, or a task's part of it.
    counts: int64, occurrences by token id, as far as they go."""

    kind: Kind
    name: str
    counts: np.ndarray

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class Coverage:
    """Shares of a text's tokens that the sub-vocabularies of `size` of both rankings hold."""

    text: Text
    size: int
    first: float
    second: float


def check_pair(first: Ranking, second: Ranking) -> None:
    """RankingError unless both rank the same vocabulary."""
    second.validate(first.tokenizer_fingerprint)
    if second.vocab_size != first.vocab_size:
        raise RankingError(
            f"{second.path}: vocab_size: expected {first.vocab_size} as in {first.path}, found"
            f" {second.vocab_size}"
        )


def overlaps(first: Ranking, second: Ranking, sizes: Iterable[int]) -> list[Overlap]:
    """Both rankings' sub-vocabularies by size, each at most the shorter ranking's length."""
    return [
        Overlap(n, len(np.intersect1d(first.subset(n), second.subset(n), assume_unique=True)))
        for n in sizes
    ]


def coverages(
    first: Ranking, second: Ranking, texts: Iterable[Text], sizes: Sequence[int]
) -> list[Coverage]:
    """By text, then size. Texts without a token are left out."""
    return [
        Coverage(text, size, _covered(first, size, text), _covered(second, size, text))
        for text in texts
        if text.tokens
        for size in sizes
    ]


def own_texts(first: Ranking, second: Ranking) -> list[Text]:
    """What the rankings were made of; a published list of ids has no counts."""
    return [
        Text("corpus", ranking.corpus, ranking.counts_by_id())
        for ranking in (first, second)
        if ranking.tokens_counted
    ]


def held_out_texts(
    tokenizer: Tokenizer, name: str, chunks: Iterable[Chunk], text_field: str | None
) -> tuple[list[Text], Broken]:
    """All texts of the chunks, then those of each task that their records name."""
    counts: dict[str | None, np.ndarray] = {}
    broken = Broken()
    for chunk in chunks:
        records, faults = chunk.records(text_field)
        broken += faults
        texts: dict[str | None, list[str]] = {}
        for record in records:
            texts.setdefault(record.task, []).extend(record.texts)
        for task, own in texts.items():
            found = count_texts(tokenizer, own)
            counts[task] = add_counts(counts.get(task, found[:0]), found)
    total = np.zeros(0, np.int64)
    for found in counts.values():
        total = add_counts(total, found)
    tasks = [Text("task", task, found) for task, found in counts.items() if task is not None]
    return [Text("held out", name, total), *tasks], broken


def _covered(ranking: Ranking, size: int, text: Text) -> float:
    chosen = ranking.subset(min(size, len(ranking)))
    return float(text.counts[chosen[chosen < len(text.counts)]].sum() / text.tokens)
