"""Input files as a stream of bytes, decompressed where their name ends in .gz or .zst."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

from ..errors import RankingError

SUFFIXES = (".gz", ".zst")

# Compressed bytes that are decompressed at once. Zeros shrink 30,000-fold, so this bounds memory.
_INPUT_BYTES = 4 << 10
# Of zstd --long=31, the most that the format's own tool writes; memory is taken as a file needs it.
_MAX_WINDOW_BYTES = 1 << 31
_SKIP_BYTES = 1 << 20


def compression(path: Path) -> str:
    """The suffix that says how the file is compressed, "" when it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in SUFFIXES else ""


class InputFile:
    """An open file, `offset` bytes behind its beginning (of what it says, decompressed).

    damage: why a compressed file could not be read to its end, known once the end of what can be
    read was reached; "" when nothing is wrong.
    """

    def __init__(self, path: Path, offset: int = 0):
        self._file = path.open("rb")
        if compression(path):
            self._raw = _Decompressed(self._file, _decompressor(path))
            stream = io.BufferedReader(self._raw, _SKIP_BYTES)
            while offset and (skipped := len(stream.read(min(offset, _SKIP_BYTES)))):
                offset -= skipped
        else:
            self._raw, stream = None, self._file
            stream.seek(offset)
        self.read, self.readline, self.peek = stream.read, stream.readline, stream.peek
        self._reported = self._file.tell()

    def __enter__(self) -> InputFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def damage(self) -> str:
        return self._raw.damage if self._raw is not None else ""

    def bytes_read(self) -> int:
        """Bytes of the file on disk that were read since the last call."""
        position = self._file.tell()
        read, self._reported = position - self._reported, position
        return read


def check_decompressor(path: Path) -> None:
    """RankingError when the file needs a package that is missing."""
    if compression(path):
        _decompressor(path)


def _decompressor(path: Path):
    """Makes decompressors of one stream (a gzip member, a Zstandard frame)."""
    if compression(path) == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError:
        raise RankingError(
            f"{path}: needs zstandard, which is not installed: pip install 'frspec[zstd]'"
        ) from None
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj


class _Decompressed(io.RawIOBase):
    """The streams of a compressed file, one after the other. Damage ends it and raises nothing:
    gzip and zstandard each do otherwise, and lose what came before it."""

    def __init__(self, file: io.BufferedReader, decompressor):
        self._file = file
        self._new = decompressor
        self._stream = None  # within a stream
        self._input = b""
        self._output = memoryview(b"")
        self.damage = ""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output and self._decompress():
            pass
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self) -> bool:
        """The next output, perhaps an empty one; False at the end."""
        if self.damage:
            return False
        data = self._input or self._file.read(_INPUT_BYTES)
        self._input = b""
        if not data:
            self.damage = "the archive is cut short" if self._stream is not None else ""
            return False
        if self._stream is None:
            data = data.lstrip(b"\0")  # tapes and some tools pad behind a stream
            if not data:
                return True
            self._stream = self._new()
        try:
            self._output = memoryview(self._stream.decompress(data))
        # zlib.error, ZstdError: both derive from Exception alone.
        except Exception as error:
            self.damage = f"the archive is damaged: {' '.join(str(error).split())}"
            return False
        if self._stream.eof:
            self._input, self._stream = self._stream.unused_data, None
        return True
