"""Writing a model folder: beside its place first, tensor by tensor, then renamed into it."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from frspec.convert.tensors import LazyTensor
from frspec.errors import ConversionError
from frspec.files import umask

# Called as progress(bytes written, bytes in all, name of the tensor being written).
Progress = Callable[[int, int, str], None]

MAX_SHARD_BYTES = 5_000_000_000
# The data of a file starts at a multiple of this: the loader maps it and reads whole cache lines.
_DATA_ALIGNMENT = 64


def check_destination(out: Path, sources: Sequence[Path], force: bool) -> None:
    """Refuses an `out` that would overwrite something other than an old model folder.

    One that a killed run had moved away, and not replaced yet, comes back before.
    """
    _restore_replaced(out, sources)
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConversionError(f"{out}: expected a new folder to write, found a file or link")
    resolved = out.resolve()
    for source in sources:
        if resolved == source.resolve() or resolved in source.resolve().parents:
            raise ConversionError(f"{out}: expected a folder apart from the source {source}")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ConversionError(
            f"{out}: expected a new or empty folder, found files in it (--force replaces it)"
        )
    if not (out / "config.json").is_file():
        raise ConversionError(
            f"{out}: expected a model folder to replace, found one without config.json"
        )


@contextmanager
def staged_folder(out: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends without an error.

    Any exception, KeyboardInterrupt included, removes it and leaves `out` as it was; the temporary
    folder of a killed run is removed by the next one to the same place. `nbytes` is what will be
    written: too little free space is refused at once.
    """
    parent = out.absolute().parent
    while not parent.exists():  # missing parents are made at the end, with the result
        parent = parent.parent
    if not parent.is_dir():
        raise ConversionError(f"{out}: expected a path inside a folder, found the file {parent}")
    for abandoned in _abandoned(parent, out.name, "partial"):
        shutil.rmtree(abandoned, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise ConversionError(f"{out}: {nbytes} bytes needed, found {free} bytes free in {parent}")
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=parent))
    except OSError as error:
        raise ConversionError(f"{out}: cannot write into {parent}: {error.strerror}") from error
    replaced = None
    locks = []
    try:
        locks.append(_lock(stage))
        stage.chmod(0o777 & ~umask())  # mkdtemp's folder is private; a model folder is not
        yield stage
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists() and any(out.iterdir()):
            replaced = Path(
                tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent)
            )
            locks.append(_lock(replaced))
            os.rename(out, replaced / out.name)
        os.rename(stage, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConversionError(f"{error.filename or out}: cannot write: {reason}") from error
    finally:
        if replaced is not None and not out.exists() and (replaced / out.name).exists():
            os.rename(replaced / out.name, out)
        for leftover in (stage, replaced):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)
        for lock in locks:
            if lock is not None:
                os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or its process is dead; None when
    another process has the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _abandoned(parent: Path, name: str, suffix: str) -> Iterator[Path]:
    """Temporary folders, named as mkdtemp does, whose process was killed: nobody locks them."""
    for folder in parent.glob(f".{glob.escape(name)}.????????.{suffix}"):
        try:
            lock = _lock(folder)
        except OSError:  # another user's
            continue
        if lock is None:
            continue
        try:
            yield folder
        finally:
            os.close(lock)


def _restore_replaced(out: Path, sources: Sequence[Path]) -> None:
    """Moves back what a run moved away from `out` and was killed before it put the new in place.

    Deletes nothing that holds anything; what cannot be moved stays where it is.
    """
    if os.path.lexists(out) or not out.parent.is_dir():
        return
    for place in _abandoned(out.parent, out.name, "replaced"):
        if any(place.resolve() in source.resolve().parents for source in sources):
            continue
        with suppress(OSError):  # another user's
            if os.listdir(place) == [out.name]:
                os.rename(place / out.name, out)
                os.rmdir(place)
                return


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    folder: Path,
    tensors: Sequence[LazyTensor],
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes `tensors` as model.safetensors, or as shards with an index when they are larger.

    Values are read, converted and written block by block: memory stays near one block however
    large the model is (the safetensors package needs every tensor in memory at once).
    """
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    total = sum(tensor.nbytes for tensor in tensors)
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": total},
                "weight_map": {
                    tensor.name: name
                    for name, shard in zip(names, shards, strict=True)
                    for tensor in shard
                },
            },
        )
    done = 0
    for name, shard in zip(names, shards, strict=True):
        done = _write_shard(folder / name, shard, progress, done, total)


def _write_shard(
    path: Path, tensors: Sequence[LazyTensor], progress: Progress | None, done: int, total: int
) -> int:
    """Writes one safetensors file; returns `done` plus the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _DATA_ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors:
            start = file.tell()
            for block in tensor.blocks():
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                if progress is not None:
                    progress(done + file.tell() - start, total, tensor.name)
            if file.tell() - start != tensor.nbytes:
                raise ConversionError(
                    f"tensor {tensor.name}: expected {tensor.nbytes} bytes of "
                    f"{tensor.dtype}{list(tensor.shape)}, found {file.tell() - start}"
                )
            done += tensor.nbytes
    return done
