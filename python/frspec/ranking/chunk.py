"""Pieces of a corpus as they are read: what one worker counts at a time.

Where a chunk ends depends on the corpus alone, and so do its texts. Counts are therefore the same
whoever counts a chunk, and a run can go on behind any of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .records import Broken, Record, read_record, reason

# Bytes of a chunk, about: a second of a tokenizer's work at most, and its encodings (about 100
# bytes a token) stay small.
CHUNK_BYTES = 1 << 20
# Longest record of a JSON file; a longer one counts as broken.
MAX_RECORD_BYTES = 64 << 20


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the number of an input, and the place in it that its reader wrote
    down (JSON), None for its beginning."""

    source: int = 0
    at: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive records of one input.

    where: the input, for messages. first: the number of its first record, from 1. at: where the
    input goes on behind it, None where nothing is left. bytes_read: of the input, as it is stored.
    broken: what its reader could not make records of.
    """

    where: str
    content: Any
    first: int = 1
    at: dict[str, Any] | None
    bytes_read: int = 0
    broken: Broken = field(default_factory=Broken)
    source: int = 0  # number of the input

    @property
    def after(self) -> Position:
        return Position(self.source + 1) if self.at is None else Position(self.source, self.at)

    @staticmethod
    def place(where: str, number: int) -> str:
        """Where a record is, for messages."""
        return f"{where}:{number}"

    def records(self, field: str | None) -> tuple[list[Record], Broken]:
        """The records with a text, and what is broken."""
        records, broken = [], Broken()
        for number, value in enumerate(self._values(), self.first):
            try:
                record = self._record(value, field)
            except (ValueError, RecursionError) as error:
                broken.add_record(self.place(self.where, number), reason(error))
                continue
            if record.texts:
                records.append(record)
        return records, broken + self.broken

    def _values(self) -> list[Any]:
        raise NotImplementedError

    def _record(self, value: Any, field: str | None) -> Record:
        return read_record(value, field)


class LineChunk(Chunk):
    """content: bytes, whole lines with a JSON value each."""

    def _values(self) -> list[bytes]:
        # Not splitlines(), which also cuts at a lone carriage return.
        lines = self.content.split(b"\n")
        return lines if lines[-1] else lines[:-1]

    def _record(self, value: bytes, field: str | None) -> Record:
        return Record([]) if not value or value.isspace() else _read_json(value, field)


class ElementChunk(Chunk):
    """content: a list of bytes, an element of a JSON array each."""

    @staticmethod
    def place(where: str, number: int) -> str:
        return f"{where}: element {number}"

    def _values(self) -> list[bytes]:
        return self.content

    def _record(self, value: bytes, field: str | None) -> Record:
        return _read_json(value, field)


class TextChunk(Chunk):
    """content: a list of bytes, pieces of a plain text."""

    def _values(self) -> list[bytes]:
        return self.content

    def _record(self, value: bytes, field: str | None) -> Record:
        return Record([value.decode("utf-8", "replace")])


class TableChunk(Chunk):
    """content: a pyarrow Table or RecordBatch, a record in each row."""

    def _values(self) -> list[dict[str, Any]]:
        return self.content.to_pylist()


def too_long() -> str:
    return f"longer than {MAX_RECORD_BYTES} bytes"


def _read_json(value: bytes, field: str | None) -> Record:
    if len(value) >= MAX_RECORD_BYTES:
        raise ValueError(too_long())
    return read_record(json.loads(value), field)
