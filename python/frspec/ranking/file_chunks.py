"""Chunks of JSON lines and of plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import chunk
from .chunk import Chunk, LineChunk, TextChunk
from .compressed import InputFile
from .records import Broken

# Plain text is cut into pieces of at most this size, at line ends where there are any: many pieces
# keep all cores of the tokenizer busy, and few cuts keep its tokens as in the whole text.
TEXT_PIECE_BYTES = 64 << 10


def line_chunks(path: Path, at: dict[str, Any] | None) -> Iterator[Chunk]:
    """Chunks of a JSON lines file. at: {"offset": bytes, "line": lines} before the first one."""
    at = at or {"offset": 0, "line": 0}
    offset, lines = at["offset"], at["line"]
    with InputFile(path, offset) as file:
        while block := file.read(chunk.CHUNK_BYTES):
            broken = Broken()
            if not block.endswith(b"\n"):
                block += file.readline(chunk.MAX_LINE_BYTES)
            size, first = len(block), lines + 1
            lines += block.count(b"\n")
            if not block.endswith(b"\n"):
                rest = _skip_line(file)
                last = block.rfind(b"\n") + 1
                if file.damage:
                    block = block[:last]  # half a line is no record
                elif rest or size - last >= chunk.MAX_LINE_BYTES:
                    block, size, lines = block[:last], size + rest, lines + 1
                    broken.add_record(
                        f"{path}", lines, f"line longer than {chunk.MAX_LINE_BYTES} bytes"
                    )
            offset += size
            yield LineChunk(
                where=str(path),
                content=block,
                first=first,
                at={"offset": offset, "line": lines},
                bytes_read=file.bytes_read(),
                broken=broken,
            )
        yield from _damage(path, file, LineChunk, b"")


def text_chunks(path: Path, at: dict[str, Any] | None) -> Iterator[Chunk]:
    """Chunks of a plain text. at: {"offset": bytes}."""
    offset = (at or {"offset": 0})["offset"]
    data, ended = b"", False
    with InputFile(path, offset) as file:
        while not ended or data:
            block = file.read(max(chunk.CHUNK_BYTES, TEXT_PIECE_BYTES))
            data, ended = data + block, not block
            pieces, start = [], 0
            # Bytes alone decide about a piece: the last one waits for more of them.
            while len(data) - start > (0 if ended else TEXT_PIECE_BYTES):
                end = _cut(data, start)
                pieces.append(data[start:end])
                start = end
            data, offset = data[start:], offset + start
            if pieces:
                yield TextChunk(
                    where=str(path),
                    content=pieces,
                    at={"offset": offset},
                    bytes_read=file.bytes_read(),
                )
        yield from _damage(path, file, TextChunk, [])


def _skip_line(file: InputFile) -> int:
    """Reads to the end of a line; returns how many bytes."""
    size = 0
    while rest := file.readline(chunk.MAX_LINE_BYTES):
        size += len(rest)
        if rest.endswith(b"\n"):
            break
    return size


def _cut(data: bytes, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    limit = start + TEXT_PIECE_BYTES
    if limit >= len(data):
        return len(data)
    end = data.rfind(b"\n", start, limit) + 1 or data.rfind(b" ", start, limit)
    if end > start:
        return end
    # Without any break it is cut anywhere, but not within a character.
    for end in range(limit, limit - 4, -1):
        if data[end] & 0xC0 != 0x80:
            return end
    return limit


def _damage(path: Path, file: InputFile, kind: type[Chunk], content: Any) -> Iterator[Chunk]:
    if file.damage:
        broken = Broken()
        broken.add_archive(str(path), file.damage)
        yield kind(where=str(path), content=content, at=None, broken=broken)
