"""Counts the tokens of chunks, and adds them up in the order of the corpus."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from ..errors import RankingError
from ..tokenizer import Tokenizer
from .chunk import Chunk, Position
from .records import Broken

# Characters that are encoded at once: encodings take about 100 bytes a token, and the rows of a
# table may be much larger than a chunk is meant to be.
BATCH_CHARACTERS = 4 << 20


@dataclass(frozen=True)
class ChunkCount:
    """What a chunk holds. token_ids: those that occur, ascending; counts: int64, how often."""

    token_ids: np.ndarray
    counts: np.ndarray
    tokens: int
    broken: Broken
    tokenizer_s: float  # in the tokenizers library


@dataclass(frozen=True)
class Tally:
    """The corpus up to a position. counts: int64 [vocab_size], occurrences by token id."""

    counts: np.ndarray
    tokens: int = 0
    position: Position = Position()
    broken: Broken = field(default_factory=Broken)
    bytes_read: int = 0
    tokenizer_s: float = 0.0  # of this run, over all processes

    @classmethod
    def empty(cls, vocab_size: int) -> Tally:
        return cls(np.zeros(vocab_size, np.int64))

    def plus(self, chunk: Chunk, found: ChunkCount) -> Tally:
        """A new one, so that an interruption never meets half an addition."""
        counts = self.counts.copy()
        counts[found.token_ids] += found.counts
        return Tally(
            counts,
            self.tokens + found.tokens,
            chunk.after,
            self.broken + found.broken,
            self.bytes_read + chunk.bytes_read,
            self.tokenizer_s + found.tokenizer_s,
        )


def count_chunk(
    tokenizer: Tokenizer, chunk: Chunk, text_field: str | None, limit: int | None = None
) -> ChunkCount:
    """Counts the first `limit` tokens of a chunk, by default all of them."""
    records, broken = chunk.records(text_field)
    counts = np.zeros(0, np.int64)
    tokens, tokenizer_s = 0, 0.0
    for texts in _batches(text for record in records for text in record.texts):
        begin = time.perf_counter()
        token_ids = _encode(tokenizer, texts)
        tokenizer_s += time.perf_counter() - begin
        if limit is not None:
            token_ids = token_ids[: limit - tokens]
        tokens += len(token_ids)
        counts = add_counts(counts, np.bincount(token_ids))
        if tokens == limit:
            break
    # A tokenizer may know tokens that the model has no row for: nothing can draft them.
    counts = counts[: tokenizer.vocab_size]
    token_ids = np.flatnonzero(counts)
    return ChunkCount(token_ids, counts[token_ids], tokens, broken, tokenizer_s)


def count_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Occurrences by token id, int64 up to the highest id, without the tokens that a tokenizer
    adds to a prompt."""
    counts = np.zeros(0, np.int64)
    for batch in _batches(texts):
        counts = add_counts(counts, np.bincount(_encode(tokenizer, batch)))
    return counts[: tokenizer.vocab_size]


def add_counts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The sum of two arrays by token id, as long as the longer one."""
    total = np.zeros(max(len(first), len(second)), np.int64)
    total[: len(first)] += first
    total[: len(second)] += second
    return total


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of BATCH_CHARACTERS or a little more: nearly always one."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The token ids of all texts, int64 [n]."""
    encode = tokenizer.backend.encode_batch_fast
    try:
        encodings = encode(texts, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        # JSON may hold half of a surrogate pair, which is no character (and then no text at all
        # to the library, whose error depends on its version).
        whole = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        encodings = encode(whole, add_special_tokens=False)
    return np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int64)


def add_up(
    counted: Iterable[tuple[Chunk, ChunkCount]],
    start: Tally,
    *,
    strict: bool = False,
    max_tokens: int | None = None,
    recount: Callable[[Chunk, int], ChunkCount] | None = None,
) -> Iterator[Tally]:
    """The tally after each chunk, from `start` on.

    Ends with exactly `max_tokens` tokens: the chunk that holds the last of them is counted again
    up to a limit, by `recount`, which is needed then. strict: RankingError for the first thing that
    is broken.
    """
    tally = start
    if max_tokens is not None and tally.tokens >= max_tokens:
        return
    for chunk, found in counted:
        if strict and found.broken:
            raise RankingError(found.broken.first)
        left = None if max_tokens is None else max_tokens - tally.tokens
        if left is not None and found.tokens >= left:
            limited = recount(chunk, left)
            yield tally.plus(chunk, dataclasses.replace(limited, broken=found.broken))
            return
        tally = tally.plus(chunk, found)
        yield tally
