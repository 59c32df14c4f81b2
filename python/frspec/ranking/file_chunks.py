"""Chunks of JSON lines, of a JSON array, and of plain text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import chunk
from .chunk import Chunk, ElementChunk, LineChunk, TextChunk
from .compressed import InputFile
from .records import Broken

# Plain text is cut into pieces of at most this size, at line ends where there are any: many pieces
# keep all cores of the tokenizer busy, and few cuts keep its tokens as in the whole text.
TEXT_PIECE_BYTES = 64 << 10

_JSON_BLANKS = b" \t\n\r"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# What cuts an array, outside of strings: between its elements, and within one.
_MARK = re.compile(rb'["\[\]{},]')
_INNER_MARK = re.compile(rb'["\[\]{}]')


def line_chunks(path: Path, at: dict[str, Any] | None) -> Iterator[Chunk]:
    """Chunks of a JSON lines file. at: {"offset": bytes, "line": lines} before the first one."""
    at = at or {"offset": 0, "line": 0}
    offset, lines = at["offset"], at["line"]
    with InputFile(path, offset) as file:
        while block := file.read(chunk.CHUNK_BYTES):
            broken = Broken()
            if not block.endswith(b"\n"):
                block += file.readline(chunk.MAX_RECORD_BYTES)
            size, first = len(block), lines + 1
            lines += block.count(b"\n")
            if not block.endswith(b"\n"):
                rest = _skip_line(file)
                last = block.rfind(b"\n") + 1
                if file.damage:
                    block = block[:last]  # half a line is no record
                elif rest or size - last >= chunk.MAX_RECORD_BYTES:
                    block, size, lines = block[:last], size + rest, lines + 1
                    broken.add_record(LineChunk.place(str(path), lines), chunk.too_long())
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


def is_array(path: Path) -> bool:
    """Whether a file begins as one JSON array, as ShareGPT is published."""
    with InputFile(path) as file:
        return _read_bracket(file) > 0


def array_chunks(path: Path, at: dict[str, Any] | None) -> Iterator[Chunk]:
    """Chunks of a JSON array, a record in each element; a comma behind the last one is passed over.
    at: {"offset": bytes, "element": elements} before the first one; behind the last one it is the
    closing bracket, so that reading which goes on there finds what is wrong behind it, too."""
    offset, elements = (at["offset"], at["element"]) if at else (0, 0)
    cutter, element, more = _ArrayCutter(), bytearray(), False
    with InputFile(path, offset) as file:
        if not at:
            offset = _read_bracket(file)
        position = offset  # of a block
        while block := file.read(chunk.CHUNK_BYTES):
            content, first, start = [], elements + 1, 0
            for end in cutter.ends(block):
                _append(element, block[start:end])
                if element or not cutter.ended:
                    content.append(bytes(element))
                    elements += 1
                element.clear()
                offset = position + end + (not cutter.ended)
                start = end + 1
            if cutter.ended:
                more = more or bool(block[start:].strip(_JSON_BLANKS))
            else:
                _append(element, block[start:])
            position += len(block)
            yield ElementChunk(
                where=str(path),
                content=content,
                first=first,
                at={"offset": offset, "element": elements},
                bytes_read=file.bytes_read(),
            )
        found = ""
        if more:
            found = (
                "expected the end of the file behind its array, found more, which is not counted"
            )
        elif not cutter.ended and not file.damage:  # half an element is no record
            found = "expected ] at the end, found none: from here on nothing is counted"
        broken = Broken()
        if found:
            broken.add_record(ElementChunk.place(str(path), elements + 1), found)
        yield from _damage(path, file, ElementChunk, [], broken)


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


def _read_bracket(file: InputFile) -> int:
    """Reads the bracket that begins an array, and what stands before it; returns how many bytes, 0
    where the file begins otherwise."""
    size = 0
    if file.peek(len(_BYTE_ORDER_MARK)).startswith(_BYTE_ORDER_MARK):
        size = len(file.read(len(_BYTE_ORDER_MARK)))
    while seen := file.peek(1):
        rest = seen.lstrip(_JSON_BLANKS)
        size += len(file.read(len(seen) - len(rest)))
        if rest:
            break
    return size + 1 if file.read(1) == b"[" else 0


class _ArrayCutter:
    """Finds the ends of a JSON array's elements in bytes that come block by block: counts brackets
    and knows strings. Whether an element is JSON, its parser says."""

    def __init__(self):
        self.ended = False  # the array's closing bracket was found
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the next block's first character is none of a string's end

    def ends(self, block: bytes) -> Iterator[int]:
        """Where in the next block an element ends: the commas, and the array's closing bracket."""
        at = 0
        if self._escaped:
            at, self._escaped = 1, False
        while not self.ended:
            if self._in_string:
                at = self._string_end(block, at)
                if self._in_string:
                    return
            match = (_INNER_MARK if self._depth else _MARK).search(block, at)
            if not match:
                return
            mark, at = match[0], match.end()
            if mark == b'"':
                self._in_string = True
            elif mark in (b"[", b"{"):
                self._depth += 1
            elif self._depth:
                self._depth -= 1
            elif mark != b"}":  # of a broken element
                self.ended = mark == b"]"
                yield at - 1

    def _string_end(self, block: bytes, at: int) -> int:
        """Behind the end of the string that `at` is in, or the block's end if it comes first."""
        while True:
            quote = block.find(b'"', at)
            end = quote if quote >= 0 else len(block)
            backslashes = end
            while backslashes > at and block[backslashes - 1] == ord("\\"):
                backslashes -= 1
            escaped = (end - backslashes) % 2 == 1
            if quote < 0:
                self._escaped = escaped
                return end
            at = quote + 1
            if not escaped:
                self._in_string = False
                return at


def _append(element: bytearray, data: bytes) -> None:
    """Holds no more of an element than tells that it is too long, and no blanks before it."""
    if not element:
        data = data.lstrip(_JSON_BLANKS)
    element += data[: chunk.MAX_RECORD_BYTES - len(element)]


def _skip_line(file: InputFile) -> int:
    """Reads to the end of a line; returns how many bytes."""
    size = 0
    while rest := file.readline(chunk.MAX_RECORD_BYTES):
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


def _damage(
    path: Path, file: InputFile, kind: type[Chunk], content: Any, broken: Broken | None = None
) -> Iterator[Chunk]:
    """The chunk that says what is wrong at the end of a file, if anything is."""
    broken = broken or Broken()
    if file.damage:
        broken.add_archive(str(path), file.damage)
    if broken:
        yield kind(
            where=str(path), content=content, at=None, bytes_read=file.bytes_read(), broken=broken
        )
