"""Reading a GGUF file: its metadata, and its tensors dequantised block by block.

The layout is that of the GGUF specification (version 2 and 3, little-endian). The `gguf` package
dequantises; its reader is not used, because it makes one array per metadata element (15 seconds
for a vocabulary of 152k tokens) and trusts the counts in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from frspec.convert.tensors import BLOCK_ELEMENTS, LazyTensor
from frspec.errors import ConversionError

MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file. `shape` has the slowest dimension first, as NumPy and HF do."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    rows: np.ndarray  # uint8 [product of shape[:-1], bytes of a row], memory-mapped

    def dequantized(self, name: str) -> LazyTensor:
        """This tensor under another name, in float32."""
        return LazyTensor(name, "F32", self.shape, self._blocks)

    def _blocks(self) -> Iterator[np.ndarray]:
        step = max(1, BLOCK_ELEMENTS // max(1, self.shape[-1]))
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            # All formats are sequences of blocks, so many short rows may be given as one long
            # row, which is several times faster. A copy, because a map may not be aligned.
            flat = np.array(rows).reshape(1, -1)
            try:
                yield dequantize(flat, self.quantization).reshape(len(rows), self.shape[-1])
            except NotImplementedError as error:
                raise ConversionError(
                    f"tensor {self.name}: expected a quantisation that the gguf package "
                    f"dequantises, found {self.quantization.name}"
                ) from error


class GgufFile:
    """`metadata` by key (numbers, strings, lists of strings, NumPy arrays) and `tensors` by name.

    Raises ConversionError naming the file and what is wrong when it is not whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._data = np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ConversionError(f"{path}: cannot read: {error}") from error
        self._buffer = memoryview(self._data)
        self._offset = 0
        if bytes(self._take(4, "magic")) != MAGIC:
            raise ConversionError(f"{path}: expected a GGUF file, found another magic number")
        version = self._number("<I", "version")
        if version & 0xFFFF == 0:
            raise ConversionError(f"{path}: expected a little-endian GGUF, found a big-endian one")
        if version not in (2, 3):
            raise ConversionError(f"{path}: expected GGUF version 2 or 3, found {version}")
        tensor_count = self._number("<Q", "tensor count")
        key_count = self._number("<Q", "metadata count")
        for _ in range(key_count):
            key = self._name("metadata key")
            if key in self.metadata:
                raise ConversionError(f"{path}: metadata key {key} occurs twice")
            self.metadata[key] = self._value(self._value_type(key), key)
        infos = [self._tensor_info() for _ in range(self._bounded(tensor_count, 24, "tensors"))]
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ConversionError(
                f"{path}: general.alignment: expected a power of two, found {alignment!r}"
            )
        start = -(-self._offset // alignment) * alignment
        for name, shape, quantization, offset in infos:
            if name in self.tensors:
                raise ConversionError(f"{path}: tensor {name} occurs twice")
            self.tensors[name] = self._map_tensor(name, shape, quantization, start + offset)

    def _take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes; `what` is what they are, for the message."""
        end = self._offset + count
        if end > len(self._buffer):
            raise ConversionError(
                f"{self.path}: truncated: {what} needs bytes {self._offset} to {end}, "
                f"the file has {len(self._buffer)}"
            )
        piece = self._buffer[self._offset : end]
        self._offset = end
        return piece

    def _number(self, code: str, what: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code), what))[0]

    def _bounded(self, count: int, min_bytes: int, what: str) -> int:
        """`count` when that many items of `min_bytes` or more can still follow."""
        left = len(self._buffer) - self._offset
        if count * min_bytes > left:
            raise ConversionError(
                f"{self.path}: truncated: {what} counts {count} items, {left} bytes are left"
            )
        return count

    def _string(self, what: str) -> str:
        raw = self._take(self._number("<Q", what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(
                f"{self.path}: {what}: expected UTF-8, found {bytes(raw[:40])!r}"
            ) from error

    def _name(self, what: str) -> str:
        """A string that messages may show: without line breaks and terminal controls."""
        text = self._string(what)
        if not text.isprintable():
            raise ConversionError(f"{self.path}: {what}: expected printable text, found {text!r}")
        return text

    def _value_type(self, key: str) -> GGUFValueType:
        code = self._number("<I", key)
        try:
            return GGUFValueType(code)
        except ValueError as error:
            raise ConversionError(f"{self.path}: {key}: unknown value type {code}") from error

    def _value(self, kind: GGUFValueType, key: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string(key)
        if kind != GGUFValueType.ARRAY:
            dtype = np.dtype(_SCALARS[kind])
            value = np.frombuffer(self._take(dtype.itemsize, key), dtype)[0]
            # The shortest decimal of a float32, not its digits as a double: 1e-05 stays 1e-05.
            return float(str(value)) if kind == GGUFValueType.FLOAT32 else value.item()
        item = self._value_type(key)
        count = self._number("<Q", key)
        if item == GGUFValueType.STRING:
            return [self._string(key) for _ in range(self._bounded(count, 8, key))]
        if item == GGUFValueType.ARRAY:
            raise ConversionError(f"{self.path}: {key}: arrays of arrays are not supported")
        dtype = np.dtype(_SCALARS[item])
        self._bounded(count, dtype.itemsize, key)
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._name("tensor name")
        dims = self._number("<I", name)
        if not 1 <= dims <= _MAX_DIMS:
            raise ConversionError(
                f"{self.path}: tensor {name}: expected 1 to {_MAX_DIMS} dimensions, found {dims}"
            )
        shape = tuple(self._number("<Q", name) for _ in range(dims))[::-1]
        if 0 in shape:
            raise ConversionError(
                f"{self.path}: tensor {name}: expected no empty dimension, found {list(shape)}"
            )
        code = self._number("<I", name)
        try:
            quantization = GGMLQuantizationType(code)
        except ValueError as error:
            raise ConversionError(
                f"{self.path}: tensor {name}: unknown tensor type {code}"
            ) from error
        return name, shape, quantization, self._number("<Q", name)

    def _map_tensor(
        self, name: str, shape: tuple[int, ...], quantization: GGMLQuantizationType, offset: int
    ) -> GgufTensor:
        block_size, type_size = GGML_QUANT_SIZES[quantization]
        if shape[-1] % block_size:
            raise ConversionError(
                f"{self.path}: tensor {name}: expected rows of a multiple of {block_size} "
                f"elements for {quantization.name}, found {shape[-1]}"
            )
        row_bytes = shape[-1] // block_size * type_size
        row_count = math.prod(shape[:-1])
        end = offset + row_count * row_bytes
        if end > len(self._data):
            raise ConversionError(
                f"{self.path}: truncated: tensor {name} needs bytes {offset} to {end}, "
                f"the file has {len(self._data)}"
            )
        rows = np.asarray(self._data[offset:end]).reshape(row_count, row_bytes)
        return GgufTensor(name, shape, quantization, rows)
