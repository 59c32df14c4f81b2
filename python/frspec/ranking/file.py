"""The ranking file: a safetensors file with token ids by frequency, their counts, and metadata.

    token_ids  int32 [n]   descending count; equal counts by ascending id
    counts     int64 [n]   occurrences of token_ids[i] in the corpus
    metadata   format "frspec-ranking", version "1", tokenizer_fingerprint, corpus,
               tokens_counted, special_ids (JSON list), vocab_size, source; of a merged file also
               parts (JSON list of the fingerprints of what it was merged from)

`source` is "counted", or "imported" for a published list of ids: its order is kept, its counts are
zero. A counted file holds every id of the vocabulary, so one file serves every sub-vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import RankingError
from ..files import is_utf8, user_path, write_whole

FORMAT = "frspec-ranking"
VERSION = "1"
SOURCES = ("counted", "imported")
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Ranking:
    """Token ids by frequency. `special_ids` are the tokens that end a text."""

    token_ids: np.ndarray  # int32 [n]
    counts: np.ndarray  # int64 [n]
    tokenizer_fingerprint: str
    corpus: str
    tokens_counted: int
    special_ids: list[int]
    vocab_size: int
    source: str = "counted"
    parts: list[str] = field(default_factory=list)  # fingerprints, of a merged file
    path: str = field(default="ranking")  # where it came from, for messages

    def __len__(self) -> int:
        return len(self.token_ids)

    @classmethod
    def from_counts(
        cls,
        counts: np.ndarray,
        *,
        tokenizer_fingerprint: str,
        corpus: str,
        special_ids: Iterable[int],
        parts: Iterable[str] = (),
    ) -> Ranking:
        """Ranks a vocabulary from `counts` [vocab_size], the occurrences of each token id."""
        counts = np.asarray(counts, dtype=np.int64)
        order = np.argsort(-counts, kind="stable")
        return cls(
            token_ids=order.astype(np.int32),
            counts=counts[order],
            tokenizer_fingerprint=tokenizer_fingerprint,
            corpus=corpus,
            tokens_counted=int(counts.sum()),
            special_ids=sorted(special_ids),
            vocab_size=len(counts),
            parts=list(parts),
        )

    @classmethod
    def load(cls, path: str | Path) -> Ranking:
        """Reads and validates a ranking file; RankingError names what is wrong with it."""
        path = os.fspath(path)
        path = os.fspath(user_path(path))
        if not is_utf8(path):
            raise RankingError(f"expected a path in UTF-8, found {path!r:.80}")
        if os.path.isdir(path):
            raise RankingError(f"{path}: expected a ranking file, found a folder")
        if not os.path.isfile(path):
            raise RankingError(f"{path}: no such ranking file")
        try:
            with safetensors.safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    found = metadata.get("format")
                    raise RankingError(f"{path}: format: expected {FORMAT!r}, found {found!r}")
                if metadata.get("version") != VERSION:
                    found = metadata.get("version")
                    raise RankingError(f"{path}: version: expected {VERSION!r}, found {found!r}")
                names = sorted(file.keys())
                if names != ["counts", "token_ids"]:
                    raise RankingError(
                        f"{path}: tensors: expected ['counts', 'token_ids'], found {names}"
                    )
                tensors = {name: file.get_tensor(name) for name in names}
        except (safetensors.SafetensorError, OSError, TypeError) as error:
            raise RankingError(f"{path}: not a safetensors file: {error}") from None
        ranking = cls(
            **tensors,
            tokenizer_fingerprint=_text(path, metadata, "tokenizer_fingerprint"),
            corpus=_text(path, metadata, "corpus"),
            tokens_counted=_count(path, metadata, "tokens_counted"),
            special_ids=_id_list(path, metadata, "special_ids"),
            vocab_size=_count(path, metadata, "vocab_size"),
            source=_text(path, metadata, "source"),
            parts=_parts(path, metadata),
            path=path,
        )
        ranking.validate()
        return ranking

    def save(self, path: str | Path) -> None:
        """Writes the file, whole or not at all."""
        self.validate()
        path = Path(path)
        data = safetensors.numpy.save(
            {"token_ids": self.token_ids, "counts": self.counts},
            metadata={
                "format": FORMAT,
                "version": VERSION,
                "tokenizer_fingerprint": self.tokenizer_fingerprint,
                "corpus": self.corpus,
                "tokens_counted": str(self.tokens_counted),
                "special_ids": json.dumps(self.special_ids),
                "vocab_size": str(self.vocab_size),
                "source": self.source,
            }
            | ({"parts": json.dumps(self.parts)} if self.parts else {}),
        )
        try:
            write_whole(path, data)
        except OSError as error:
            raise RankingError(f"{path}: cannot be written: {error.strerror}") from None

    def validate(self, fingerprint: str | None = None, vocab_size: int | None = None) -> None:
        """Checks the file itself and, where given, that it belongs to a model.

        fingerprint: the model's Tokenizer.fingerprint; vocab_size: rows of its embedding.
        """
        for name, dtype in (("token_ids", np.int32), ("counts", np.int64)):
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 1:
                self._fail(
                    f"{name}: expected {np.dtype(dtype).name} [n],"
                    f" found {array.dtype} {list(array.shape)}"
                )
        ids, counts, n = self.token_ids, self.counts, len(self.token_ids)
        if n == 0 or len(counts) != n:
            self._fail(f"token_ids and counts: expected equal lengths, found {n}, {len(counts)}")
        if not 0 < self.vocab_size <= _INT32_MAX:
            self._fail(f"vocab_size: expected a size above 0, found {self.vocab_size}")
        if fingerprint is not None and fingerprint != self.tokenizer_fingerprint:
            self._fail(
                f"made for another tokenizer: expected fingerprint {fingerprint},"
                f" found {self.tokenizer_fingerprint}"
            )
        limit = self.vocab_size if vocab_size is None else min(vocab_size, self.vocab_size)
        for name, values in (("token_ids", ids), ("special_ids", np.array(self.special_ids))):
            outside = values[(values < 0) | (values >= limit)]
            if outside.size:
                self._fail(f"{name}: expected ids in [0, {limit}), found {outside[0]}")
        seen = np.bincount(ids, minlength=self.vocab_size)
        if seen.max() > 1:
            self._fail(f"token_ids: id {seen.argmax()} occurs {seen.max()} times, expected once")
        if self.source not in SOURCES:
            self._fail(f"source: expected one of {', '.join(SOURCES)}, found {self.source!r}")
        if counts.min() < 0:
            self._fail(f"counts: expected none below 0, found {counts.min()}")
        if counts.sum() != self.tokens_counted:
            self._fail(f"counts: sum {counts.sum()}, tokens_counted says {self.tokens_counted}")
        rising = counts[1:] > counts[:-1]
        if self.source == "counted":
            rising |= (counts[1:] == counts[:-1]) & (ids[1:] < ids[:-1])
        if rising.any():
            row = int(rising.argmax()) + 1
            self._fail(f"token_ids: not ordered by descending count, then id, at row {row}")

    def subset(self, n: int) -> np.ndarray:
        """The ids of a sub-vocabulary, int32 [n], in rank order.

        `special_ids` are in it, the rest are the most frequent. Special ids that the file does not
        rank (an imported list may lack them) come last. The runtime adds the model's end tokens,
        which are special ids of the rankings that this package makes.
        """
        held = len(self.token_ids)
        if not 0 < n <= held:
            self._fail(f"sub-vocabulary: expected a size in [1, {held}], found {n}")
        wanted = np.unique(np.array(self.special_ids, dtype=np.int64))
        if wanted.size > n:
            self._fail(f"sub-vocabulary: {n} ids cannot hold the {wanted.size} that must be in it")
        forced = np.isin(self.token_ids, wanted)
        missing = wanted[~np.isin(wanted, self.token_ids)]
        # The most frequent of the others fill what the forced ids leave.
        free = n - wanted.size
        chosen = forced | (~forced & (np.cumsum(~forced) <= free))
        return np.concatenate([self.token_ids[chosen], missing.astype(np.int32)])

    def fingerprint(self) -> str:
        """SHA-256 of the counts by token id."""
        return hashlib.sha256(self.counts_by_id().tobytes()).hexdigest()

    def counts_by_id(self) -> np.ndarray:
        """Occurrences by token id, int64 [vocab_size]."""
        counts = np.zeros(self.vocab_size, np.int64)
        counts[self.token_ids] = self.counts
        return counts

    def coverage(self, n: int) -> float:
        """Share of the counted tokens that subset(n) holds, in [0, 1]; 1 beyond the file's ids."""
        if self.tokens_counted == 0:
            self._fail("coverage: the file has no counts")
        if n >= len(self.token_ids):
            return 1.0
        chosen = np.isin(self.token_ids, self.subset(n))
        return float(self.counts[chosen].sum() / self.tokens_counted)

    def _fail(self, message: str):
        raise RankingError(f"{self.path}: {message}")


def _text(path: str, metadata: dict[str, str], name: str) -> str:
    if name not in metadata:
        raise RankingError(f"{path}: metadata: expected {name}, found {sorted(metadata)}")
    return metadata[name]


def _count(path: str, metadata: dict[str, str], name: str) -> int:
    text = _text(path, metadata, name)
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise RankingError(f"{path}: {name}: expected a count, found {text[:40]!r}")
    return int(text)


def _parts(path: str, metadata: dict[str, str]) -> list[str]:
    return _json_list(path, "parts", metadata.get("parts", "[]"), str, "texts")


def _id_list(path: str, metadata: dict[str, str], name: str) -> list[int]:
    return _json_list(path, name, _text(path, metadata, name), int, "ids")


def _json_list(path: str, name: str, text: str, kind: type, what: str) -> list:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise RankingError(f"{path}: {name}: expected a JSON list of {what}, found {text[:40]!r}")
    return values
