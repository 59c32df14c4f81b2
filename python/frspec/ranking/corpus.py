"""Texts of a corpus on disk: JSON lines, ShareGPT conversations, plain text, Parquet.

A corpus is read as a stream of `Piece`s in bounded memory. What cannot be read as a text (a broken
line, a record without the field) is counted and skipped, or an error when `strict`.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import RankingError

# Longest line of a JSON lines file; a longer one counts as broken.
MAX_LINE_BYTES = 64 << 20
# Plain text is cut into pieces of about this size, at line ends where there are any: many pieces
# keep all cores of the tokenizer busy, and few cuts keep its tokens as in the whole text.
TEXT_PIECE_BYTES = 64 << 10

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


class Piece(NamedTuple):
    """Texts that came from one record, and how many bytes of the files were read for them."""

    texts: list[str]
    bytes_read: int


@dataclass
class Broken:
    """What was skipped, and where the first of it was."""

    strict: bool = False
    records: int = 0
    first: str = ""

    def add(self, path: Path, record: int, reason: str) -> None:
        message = f"{path}:{record}: {reason}"
        if self.strict:
            raise RankingError(message)
        self.records += 1
        self.first = self.first or message


def check_inputs(paths: Sequence[Path]) -> int:
    """Total size in bytes; RankingError for a file that cannot be read, before work begins."""
    for path in paths:
        if not path.is_file():
            raise RankingError(f"{path}: no such input file")
        if not os.access(path, os.R_OK):
            raise RankingError(f"{path}: input file cannot be read")
        if path.suffix == ".parquet":
            _pyarrow_parquet(path)
    return sum(path.stat().st_size for path in paths)


def read_corpus(paths: Sequence[Path], field: str | None, broken: Broken) -> Iterator[Piece]:
    """All texts of the files. `field` names where a record's text is ("a.b" for nested ones);
    without it conversations, messages and text are recognised."""
    for path in paths:
        if path.suffix == ".parquet":
            yield from _read_parquet(path, field, broken)
        elif path.suffix in _JSON_SUFFIXES:
            yield from _read_json_lines(path, field, broken)
        else:
            yield from _read_text(path)


def _read_json_lines(path: Path, field: str | None, broken: Broken) -> Iterator[Piece]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            size = len(line)
            if size == MAX_LINE_BYTES and not line.endswith(b"\n"):
                while rest := file.readline(MAX_LINE_BYTES):
                    size += len(rest)
                    if rest.endswith(b"\n"):
                        break
                broken.add(path, number, f"line longer than {MAX_LINE_BYTES} bytes")
                yield Piece([], size)
                continue
            texts = []
            if not line.isspace():
                try:
                    texts = texts_of(json.loads(line), field)
                except (ValueError, RecursionError) as error:
                    broken.add(path, number, _reason(error))
            yield Piece(texts, size)


def _read_text(path: Path) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    kept = ""
    with path.open("rb") as file:
        while data := file.read(TEXT_PIECE_BYTES):
            text = kept + decoder.decode(data)
            cut = text.rfind("\n") + 1 or text.rfind(" ")
            if cut <= 0:  # without any break it is cut anywhere, or it would keep growing
                cut = len(text)
            kept = text[cut:]
            yield Piece([text[:cut]], len(data))
    kept += decoder.decode(b"", final=True)
    if kept:
        yield Piece([kept], 0)


def _read_parquet(path: Path, field: str | None, broken: Broken) -> Iterator[Piece]:
    parquet, errors = _pyarrow_parquet(path)
    try:
        file = parquet.ParquetFile(path)
        columns = file.schema_arrow.names
        known = [field.split(".")[0]] if field else ["conversations", "messages", "text"]
        wanted = [name for name in known if name in columns]
        if not wanted:
            raise RankingError(
                f"{path}: expected a column {' or '.join(known)}, found {', '.join(columns)}"
            )
        rows, size, number, reported = file.metadata.num_rows, path.stat().st_size, 0, 0
        for batch in file.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                texts = []
                try:
                    texts = texts_of(record, field)
                except ValueError as error:
                    broken.add(path, number, _reason(error))
                # Compressed bytes of a row are not known: its share of the file stands for them.
                done = size * number // max(rows, 1)
                yield Piece(texts, done - reported)
                reported = done
    except (errors.ArrowException, OSError) as error:
        raise RankingError(f"{path}: cannot be read as Parquet: {_reason(error)}") from None


def _pyarrow_parquet(path: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RankingError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'frspec[parquet]'"
        ) from None
    return pyarrow.parquet, pyarrow


def texts_of(record: Any, field: str | None) -> list[str]:
    """The texts of a record; ValueError says why it has none."""
    if field is not None:
        value = record
        for name in field.split("."):
            if not isinstance(value, dict) or name not in value:
                raise ValueError(f"expected field {field!r}, found {_describe(record)}")
            value = value[name]
        return _flatten(value, field)
    if isinstance(record, dict):
        for name in ("conversations", "messages", "text"):
            if record.get(name) is not None:
                return _flatten(record[name], name)
    raise ValueError(
        f"expected an object with conversations, messages or text, found {_describe(record)}"
    )


def _flatten(value: Any, name: str) -> list[str]:
    """A text, a list of texts, or a list of messages ({"value"}, {"content"} or {"text"})."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        texts = []
        for item in value:
            if isinstance(item, dict):
                parts = [item[k] for k in ("value", "content", "text") if item.get(k) is not None]
                # A message without words (a tool call) is no fault of the line.
                texts += _flatten(parts[0], name) if parts else []
            else:
                texts += _flatten(item, name)
        return texts
    raise ValueError(f"{name}: expected text or messages, found {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        names = ", ".join(list(map(str, value))[:8])
        return f"an object with {names}" if names else "an empty object"
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__
