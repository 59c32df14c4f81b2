"""Reading what torch.save wrote, without torch and without running anything the file says.

A pickle is a program for a stack machine that may call any Python function. Here its opcodes are
interpreted one by one: plain values, lists, tuples and dicts are built, a global is only a name,
and the only "calls" are those that make a dict or describe a tensor. Everything else is refused
by name, so no code of the file's choosing can run.

Both formats are read: the zip archive (torch >= 1.6) and the older stream of pickles.
"""

from __future__ import annotations

import io
import math
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from frspec.convert.tensors import STORAGE, LazyTensor, iter_rows
from frspec.errors import ConversionError

_STORAGE_CLASSES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "CharStorage": "I8",
    "ShortStorage": "I16",
    "IntStorage": "I32",
    "LongStorage": "I64",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Global(NamedTuple):
    """The name of a class or function. It is never looked up."""

    module: str
    name: str


_ORDERED_DICT = _Global("collections", "OrderedDict")
_REBUILD_TENSOR = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_PARAMETER = _Global("torch._utils", "_rebuild_parameter")
_ALLOWED = {_ORDERED_DICT, _REBUILD_TENSOR, _REBUILD_PARAMETER} | {
    _Global("torch", name) for name in _STORAGE_CLASSES
}


@dataclass(eq=False)
class _Storage:
    """The one-dimensional memory that tensors are views of; `values` may be mapped later."""

    key: str
    dtype: str
    size: int
    values: np.ndarray | None = None


_StorageReader = Callable[[str, str, int], _Storage]


def load_torch_file(path: str | Path) -> Any:
    """The object that torch.save wrote into `path`.

    Tensors are `LazyTensor`s over the mapped file (`.numpy()` reads one); dicts, lists, tuples,
    strings, numbers, booleans and None are themselves. Raises ConversionError for a file that is
    damaged or holds anything else.
    """
    path = Path(path)
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot read: {error}") from error
    try:
        if bytes(data[:4]) == b"PK\x03\x04":
            return _load_zip(path, data)
        return _load_legacy(path, data)
    except _PickleError as error:
        raise ConversionError(f"{path}: {error}") from error


def load_state_dict(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors by name in a checkpoint file: a dict of tensors, or one under "state_dict"."""
    value = load_torch_file(path)
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not value:
        raise ConversionError(
            f"{path}: expected a dict of tensors, found {type(value).__name__}"
            + (" without entries" if isinstance(value, dict) else "")
        )
    for name, tensor in value.items():
        named = isinstance(name, str) and name.isprintable()
        if not named or not isinstance(tensor, LazyTensor):
            raise ConversionError(
                f"{path}: expected a dict of tensors, found {type(tensor).__name__} under {name!r}"
            )
    return {name: tensor.renamed(name) for name, tensor in value.items()}


class _PickleError(Exception):
    """What is wrong with a pickle; the file's name is added where it is known."""


def _load_zip(path: Path, data: np.ndarray) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
            pickles = [
                name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")
            ]
            if len(pickles) != 1:
                raise _PickleError("expected a torch.save archive, found no data.pkl in the zip")
            prefix = pickles[0].removesuffix("data.pkl")
            order = entries.get(prefix + "byteorder")
            if order is not None and (order.file_size > 8 or archive.read(order) != b"little"):
                raise _PickleError("expected little-endian tensors, found big-endian ones")
            if entries[pickles[0]].compress_type != zipfile.ZIP_STORED:
                raise _PickleError("expected data.pkl uncompressed, found it compressed")
            program = archive.read(pickles[0])
    except (
        *(zipfile.BadZipFile, EOFError, OSError, RuntimeError),  # among them NotImplementedError
        *(ValueError, KeyError, struct.error),  # names and fields that cannot be decoded
    ) as error:
        raise _PickleError(f"damaged archive: {error}") from error

    storages: dict[str, _Storage] = {}

    def read_storage(key: str, dtype: str, size: int) -> _Storage:
        storage = storages.get(key)
        if storage is None:
            info = entries.get(f"{prefix}data/{key}")
            if info is None:
                raise _PickleError(f"storage {key} is missing from the archive")
            values = _map_storage(data, key, dtype, size, *_entry_range(data, info))
            storage = storages[key] = _Storage(key, dtype, size, values)
        return _same_storage(storage, dtype, size)

    return _Machine(read_storage).run(io.BytesIO(program))


def _entry_range(data: np.ndarray, info: zipfile.ZipInfo) -> tuple[int, int]:
    """First byte and byte count of an uncompressed entry's contents."""
    if info.compress_type != zipfile.ZIP_STORED:
        raise _PickleError(f"{info.filename!r}: expected no compression, found it compressed")
    header = bytes(data[info.header_offset : info.header_offset + 30])
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise _PickleError(f"{info.filename!r}: expected a zip entry header, found none")
    name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
    return info.header_offset + 30 + name_bytes + extra_bytes, info.file_size


def _map_storage(
    data: np.ndarray, key: str, dtype: str, size: int, start: int, nbytes: int
) -> np.ndarray:
    needed = size * STORAGE[dtype].itemsize
    if needed > nbytes or start + needed > len(data):
        raise _PickleError(
            f"storage {key}: expected {needed} bytes for {size} of {dtype}, "
            f"found {max(0, min(nbytes, len(data) - start))}"
        )
    return np.asarray(data[start : start + needed]).view(STORAGE[dtype])


def _same_storage(storage: _Storage, dtype: str, size: int) -> _Storage:
    if (storage.dtype, storage.size) != (dtype, size):
        raise _PickleError(
            f"storage {storage.key}: described as {size} of {dtype} and as "
            f"{storage.size} of {storage.dtype}"
        )
    return storage


def _load_legacy(path: Path, data: np.ndarray) -> Any:
    """magic, protocol, system, object, storage keys: five pickles; then each storage's bytes."""
    storages: dict[str, _Storage] = {}

    def read_storage(key: str, dtype: str, size: int) -> _Storage:
        return _same_storage(storages.setdefault(key, _Storage(key, dtype, size)), dtype, size)

    def no_storage(key: str, dtype: str, size: int) -> _Storage:
        raise _PickleError("a tensor where none is expected")

    # A mapped file, not a plain one: reading a false length must not allocate it.
    with (
        open(path, "rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as file,
    ):
        if file.read(1) != b"\x80":
            raise _PickleError("expected a file that torch.save wrote, found another format")
        file.seek(0)
        plain = _Machine(no_storage)
        if plain.run(file) != _LEGACY_MAGIC:
            raise _PickleError("expected a file that torch.save wrote, found a plain pickle")
        protocol = plain.run(file)
        if protocol != _LEGACY_PROTOCOL:
            raise _PickleError(f"expected torch.save protocol {_LEGACY_PROTOCOL}, found another")
        system = plain.run(file)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise _PickleError("expected little-endian tensors")
        value = _Machine(read_storage).run(file)
        keys = plain.run(file)
        offset = file.tell()
    if not isinstance(keys, list):
        raise _PickleError("expected a list of storages, found none")
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None:
            raise _PickleError("a storage that no tensor uses")
        header = bytes(data[offset : offset + 8])
        if int.from_bytes(header, "little") != storage.size or len(header) < 8:
            raise _PickleError(f"storage {key}: expected its size {storage.size} before its bytes")
        offset += 8
        storage.values = _map_storage(
            data, key, storage.dtype, storage.size, offset, len(data) - offset
        )
        offset += storage.values.nbytes
    for storage in storages.values():
        if storage.values is None:
            raise _PickleError(f"storage {storage.key} is missing from the file")
    return value


class _Machine:
    """Interprets the opcodes torch.save uses; any other is refused."""

    _CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
    _LITERALS = {
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    }
    _TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

    def __init__(self, read_storage: _StorageReader) -> None:
        self._read_storage = read_storage

    def run(self, file: Any) -> Any:
        """The value of the next pickle in the binary `file`, which is left behind its end."""
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(file):
                self._step(opcode.name, argument)
            value = self._pop()
        except (ValueError, IndexError, KeyError, struct.error, OverflowError) as error:
            raise _PickleError(f"damaged pickle: {error}") from error
        if self._stack:
            raise _PickleError("damaged pickle: values are left over")
        return value

    def _step(self, opcode: str, argument: Any) -> None:
        push = self._stack.append
        if opcode in ("PROTO", "FRAME", "STOP"):
            return
        if opcode in self._LITERALS:
            push(argument)
        elif opcode in self._CONSTANTS:
            push(self._CONSTANTS[opcode])
        elif opcode == "EMPTY_LIST":
            push([])
        elif opcode == "EMPTY_DICT":
            push({})
        elif opcode in self._TUPLES:
            push(tuple([self._pop() for _ in range(self._TUPLES[opcode])][::-1]))
        elif opcode == "TUPLE":
            push(tuple(self._pop_mark()))
        elif opcode == "MARK":
            self._marks.append(len(self._stack))
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            push(self._memo[argument])
        elif opcode in ("APPEND", "APPENDS"):
            values = [self._pop()] if opcode == "APPEND" else self._pop_mark()
            self._top(list).extend(values)
        elif opcode in ("SETITEM", "SETITEMS"):
            values = self._pop_mark() if opcode == "SETITEMS" else [self._pop(), self._pop()][::-1]
            self._set_items(self._top(dict), values)
        elif opcode == "GLOBAL":
            push(_allowed_global(*argument.split(" ", 1)))
        elif opcode == "STACK_GLOBAL":
            name, module = self._pop(), self._pop()
            push(_allowed_global(module, name))
        elif opcode == "BINPERSID":
            push(self._persistent(self._pop()))
        elif opcode == "REDUCE":
            arguments, function = self._pop(), self._pop()
            push(_reduce(function, arguments))
        elif opcode == "BUILD":
            # A state dict carries version numbers as an attribute; nothing else has a state.
            self._pop()
            self._top(dict)
        else:
            raise _PickleError(f"refused: pickle opcode {opcode} is not needed for tensors")

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError("a value is missing")
        return self._stack.pop()

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__}, found {_kind(self._stack[-1])}")
        return self._stack[-1]

    @staticmethod
    def _set_items(target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("a dict's key has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Not tuples: a nest of shared tuples takes exponential time to hash.
            if not isinstance(key, (str, int, float)):
                raise ValueError(f"a dict's key is a {_kind(key)}")
            target[key] = value

    def _persistent(self, described: Any) -> _Storage:
        if not isinstance(described, tuple) or not 5 <= len(described) <= 6:
            raise ValueError("a persistent value that is no storage")
        tag, kind, key, _, size, *view = described
        if tag != "storage" or type(kind) is not _Global or kind.name not in _STORAGE_CLASSES:
            raise ValueError("a persistent value that is no storage")
        named = isinstance(key, str) and key.isprintable()
        if not named or not _is_count(size) or any(item is not None for item in view):
            raise ValueError("a storage that is described wrongly")
        return self._read_storage(key, _STORAGE_CLASSES[kind.name], size)


def _kind(value: Any) -> str:
    return f"{value.module}.{value.name}" if type(value) is _Global else type(value).__name__


def _allowed_global(module: Any, name: Any) -> _Global:
    found = _Global(str(module), str(name))
    if found not in _ALLOWED:
        shown = f"{found.module}.{found.name}"
        raise _PickleError(
            f"refused: the pickle names {shown if shown.isprintable() else repr(shown)}; "
            "expected tensors and plain values only"
        )
    return found


def _reduce(function: Any, arguments: Any) -> Any:
    if type(function) is not _Global or not isinstance(arguments, tuple):
        raise ValueError(f"a call of a {_kind(function)}")
    if function == _ORDERED_DICT:
        if arguments:
            raise ValueError("an OrderedDict with arguments")
        return {}
    if function == _REBUILD_TENSOR:
        return _tensor(*_checked(arguments, 6, 7)[:4])
    if function == _REBUILD_PARAMETER:
        tensor = _checked(arguments, 3, 3)[0]
        if not isinstance(tensor, LazyTensor):
            raise ValueError(f"a parameter that is a {_kind(tensor)}")
        return tensor
    raise ValueError(f"a call of {_kind(function)}")


def _checked(arguments: tuple, least: int, most: int) -> tuple:
    if not least <= len(arguments) <= most:
        raise ValueError(f"a tensor described by {len(arguments)} values")
    return arguments


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> LazyTensor:
    """A view of `storage`: element (i, j, ...) is at offset + i strides[0] + j strides[1] ..."""
    counts = (shape, strides, (offset,))
    if not isinstance(storage, _Storage) or not all(
        isinstance(group, tuple) and all(map(_is_count, group)) for group in counts
    ):
        raise ValueError("a tensor that is described wrongly")
    if len(shape) != len(strides) or len(shape) > 32:
        raise ValueError(f"a tensor of {len(shape)} dimensions with {len(strides)} strides")
    size = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    # A view that repeats elements could ask for any amount of memory.
    if size > storage.size or (size and last >= storage.size):
        raise _PickleError(
            f"tensor of shape {list(shape)}, strides {list(strides)}, offset {offset}: "
            f"expected to lie within its storage of {storage.size} elements"
        )

    def blocks() -> Iterator[np.ndarray]:
        values = storage.values
        if size == 0 or values is None:
            yield np.empty(shape, STORAGE[storage.dtype])
            return
        yield from iter_rows(
            np.lib.stride_tricks.as_strided(
                values[offset:],
                shape,
                [step * values.itemsize for step in strides],
                writeable=False,
            )
        )

    return LazyTensor(f"storage {storage.key}", storage.dtype, shape, blocks)
