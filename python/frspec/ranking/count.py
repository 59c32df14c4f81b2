"""Counts the tokens of a corpus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import numpy as np

from ..tokenizer import Tokenizer
from .corpus import Piece

# A batch goes to the tokenizer's threads at once: enough texts to keep them busy, few enough
# characters that its encodings (about 100 bytes a token) stay small.
BATCH_TEXTS = 4096
BATCH_CHARACTERS = 4 << 20


@dataclass
class Count:
    """Occurrences by token id, int64 [vocab_size], and where the time went."""

    counts: np.ndarray
    tokens: int = 0
    bytes_read: int = 0
    total_s: float = 0.0
    tokenizer_s: float = 0.0  # within total_s, in the tokenizers library


def count_tokens(
    tokenizer: Tokenizer,
    pieces: Iterable[Piece],
    max_tokens: int | None = None,
    progress: Callable[[Count], None] | None = None,
) -> Count:
    """Counts the tokens of all texts, without the special tokens a tokenizer adds to a prompt.

    Stops after exactly `max_tokens` tokens. `progress` is called after every batch.
    """
    count = Count(np.zeros(tokenizer.vocab_size, dtype=np.int64))
    start = time.perf_counter()
    batch: list[str] = []
    characters = 0

    def flush() -> None:
        begin = time.perf_counter()
        encodings = _encode(tokenizer, batch)
        token_ids = np.fromiter(chain.from_iterable(e.ids for e in encodings), dtype=np.int64)
        now = time.perf_counter()
        if max_tokens is not None:
            token_ids = token_ids[: max_tokens - count.tokens]
        count.counts += np.bincount(token_ids, minlength=len(count.counts))
        count.tokens += len(token_ids)
        count.tokenizer_s += now - begin
        count.total_s = now - start
        batch.clear()
        if progress is not None:
            progress(count)

    for piece in pieces:
        batch += piece.texts
        characters += sum(map(len, piece.texts))
        count.bytes_read += piece.bytes_read
        if len(batch) >= BATCH_TEXTS or characters >= BATCH_CHARACTERS:
            flush()
            characters = 0
            if max_tokens is not None and count.tokens >= max_tokens:
                return count
    flush()
    return count


def _encode(tokenizer: Tokenizer, texts: list[str]):
    encode = tokenizer.backend.encode_batch_fast
    try:
        return encode(texts, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        # JSON may hold half of a surrogate pair, which is no character (and then no text at all
        # to the library, whose error depends on its version).
        whole = [t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts]
        return encode(whole, add_special_tokens=False)
