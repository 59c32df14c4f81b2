"""Paths as users write them, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """`path` with ~ as the user's home; as it is where nobody of that name has one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_utf8(path: str | os.PathLike[str]) -> bool:
    """Whether the runtime, and files that keep names, can take this one."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file beside its place, then renames it there. OSError leaves what was there.

    A link keeps its place, its target is replaced. What is no file (a device, a pipe) is refused.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        reason = "is a folder" if path.is_dir() else "expected a file, found a device or a pipe"
        raise OSError(code, reason, os.fspath(path))
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp's files are private
        os.replace(temporary, path)
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, where they are not ignored, end the block with SystemExit.

    By default they end Python at once, and what was half written would stay.
    """

    def end(number: int, _: object) -> None:
        for each in before:  # a second one must not end the cleaning up
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    before = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def umask() -> int:
    """The process's file mode mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
