"""A corpus: files and data sets as one sequence of chunks, read in bounded memory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import RankingError
from .chunk import Chunk, Position
from .compressed import SUFFIXES, InputFile, check_decompressor, compression
from .file_chunks import array_chunks, is_array, line_chunks, text_chunks
from .table_chunks import (
    HUB_PREFIX,
    HubDataset,
    dataset_chunks,
    import_datasets,
    import_parquet,
    parquet_chunks,
)

Source = Path | HubDataset

_LINE_SUFFIXES = (".jsonl", ".json", ".ndjson")
_FINGERPRINT_BYTES = 64 << 10


def parse_source(text: str) -> Source:
    """A file, or a data set of the hub where it begins with hf://."""
    return HubDataset.parse(text) if text.startswith(HUB_PREFIX) else Path(text)


def name_of(sources: Sequence[Source]) -> str:
    """The name of a corpus: those of its inputs, each once."""
    names = (str(s) if isinstance(s, HubDataset) else s.name for s in sources)
    return ", ".join(dict.fromkeys(names))


def check_sources(sources: Sequence[Source]) -> int | None:
    """Total size in bytes, None where it is not known; RankingError for what cannot be read,
    before work begins."""
    for source in sources:
        if isinstance(source, HubDataset):
            import_datasets(source)
            continue
        if not source.is_file():
            found = "expected a file, found a folder" if source.is_dir() else "no such input file"
            raise RankingError(f"{source}: {found}")
        if not os.access(source, os.R_OK):
            raise RankingError(f"{source}: input file cannot be read")
        if _format(source) == ".parquet":
            if source.suffix.lower() != ".parquet":
                raise RankingError(f"{source}: expected .parquet, which has its own compression")
            import_parquet(source)
        check_decompressor(source)
        _check_text(source)
    if any(isinstance(source, HubDataset) for source in sources):
        return None
    return sum(source.stat().st_size for source in sources)


def describe_source(source: Source) -> str:
    """What tells an input from another of its name: size, and a fingerprint of both its ends."""
    if isinstance(source, HubDataset):
        return str(source)
    with source.open("rb") as file:
        digest = hashlib.sha256(file.read(_FINGERPRINT_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _FINGERPRINT_BYTES, 0))
        digest.update(file.read(_FINGERPRINT_BYTES))
    return f"{source} ({size} bytes, {digest.hexdigest()[:16]})"


def read_chunks(
    sources: Sequence[Source], field: str | None, start: Position | None = None
) -> Iterator[Chunk]:
    """All chunks of the sources from `start` on. `field`: see `texts_of`."""
    start = start or Position()
    for number in range(start.source, len(sources)):
        at = start.at if number == start.source else None
        for chunk in _chunks(sources[number], field, at):
            yield dataclasses.replace(chunk, source=number)


def _chunks(source: Source, field: str | None, at: dict[str, Any] | None) -> Iterator[Chunk]:
    if isinstance(source, HubDataset):
        return dataset_chunks(source, field, at)
    form = _format(source)
    if form == ".parquet":
        return parquet_chunks(source, field, at)
    if form == ".json" and is_array(source):
        return array_chunks(source, at)
    return line_chunks(source, at) if form in _LINE_SUFFIXES else text_chunks(source, at)


def _format(path: Path) -> str:
    """The suffix below that of a compression."""
    return (Path(path.stem) if compression(path) else path).suffix.lower()


def _check_text(source: Path) -> None:
    """RankingError for a file that would be read as plain text and is none: an archive, UTF-16."""
    if _format(source) in (".parquet", *_LINE_SUFFIXES):
        return
    with InputFile(source) as file:
        if b"\0" in file.read(_FINGERPRINT_BYTES):
            known = ", ".join((".parquet", *_LINE_SUFFIXES, *SUFFIXES))
            raise RankingError(
                f"{source}: expected plain text in UTF-8, found binary data (other forms are known"
                f" by their names: {known})"
            )
