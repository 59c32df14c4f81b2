"""Tensors as a conversion sees them: a dtype, a shape, and blocks that are read when asked for.

A dtype is named by its safetensors code ("BF16", "F16", "F32", ...). NumPy has no bfloat16, so
the storage of a BF16 tensor is an array of uint16 that holds its bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from frspec.errors import ConversionError

# Storage of each dtype, little-endian as in safetensors, PyTorch and GGUF files.
STORAGE = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I8": np.dtype("i1"),
    "I16": np.dtype("<i2"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")

# The dtypes a model folder may have: option word, safetensors code, name in config.json.
WEIGHT_DTYPES = {
    "bf16": ("BF16", "bfloat16"),
    "fp16": ("F16", "float16"),
    "fp32": ("F32", "float32"),
}
_DTYPE_ALIASES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}

# Blocks of about this many elements stay in cache: a 1 MB piece dequantises and rounds several
# times faster than a 500 MB embedding at once, which faults in fresh pages.
BLOCK_ELEMENTS = 1 << 18


def has_float64(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the runtime, which has no fp64, cannot read one of these."""
    return any(tensor.dtype == "F64" for tensor in tensors.values())


def weight_dtype_word(dtype: str) -> str:
    """The option word ("bf16", "fp16", "fp32") of `dtype`, which may be NumPy's or torch's name."""
    word = _DTYPE_ALIASES.get(dtype, dtype)
    if word not in WEIGHT_DTYPES:
        raise ConversionError(f"dtype: expected one of {', '.join(WEIGHT_DTYPES)}, found {dtype!r}")
    return word


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 `values` rounded to the nearest bfloat16, ties to even, as uint16 bits.

    A NaN stays a (quiet) NaN: rounding its bits up could carry into the sign or give infinity.
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        rounded = np.where(nan, (bits >> 16) | np.uint32(0x40), rounded)
    return rounded.astype(np.uint16)


def widen_bf16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of uint16 bfloat16 `bits` (exact)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_float32(storage: np.ndarray, dtype: str) -> np.ndarray:
    """`storage` of `dtype` as float32 values."""
    return widen_bf16(storage) if dtype == "BF16" else storage.astype(np.float32, copy=False)


@dataclass(frozen=True)
class LazyTensor:
    """A named tensor whose values are read when `blocks` is called.

    `blocks()` yields arrays in the storage of `dtype`; laid end to end in C order they are the
    whole tensor. It may be called again and reads again.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @classmethod
    def from_array(cls, name: str, dtype: str, array: np.ndarray) -> LazyTensor:
        """A tensor over `array` (in the storage of `dtype`), which may be memory-mapped."""
        return cls(name, dtype, array.shape, lambda: iter_rows(array))

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * STORAGE[self.dtype].itemsize

    def storage(self) -> np.ndarray:
        """The whole tensor in the storage of its dtype."""
        parts = [np.ravel(block) for block in self.blocks()]
        flat = np.concatenate(parts) if parts else np.empty(0, STORAGE[self.dtype])
        return flat.reshape(self.shape)

    def numpy(self) -> np.ndarray:
        """The whole tensor as a NumPy array; bfloat16 becomes float32."""
        storage = self.storage()
        return widen_bf16(storage) if self.dtype == "BF16" else storage

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """For np.asarray(tensor)."""
        return self.numpy().astype(dtype, copy=False) if dtype is not None else self.numpy()

    def renamed(self, name: str) -> LazyTensor:
        return LazyTensor(name, self.dtype, self.shape, self.blocks)

    def cast(self, dtype: str) -> LazyTensor:
        """This tensor rounded to the float `dtype` ("BF16", "F16" or "F32") as it is read."""
        if dtype == self.dtype:
            return self
        if self.dtype not in FLOAT_DTYPES:
            raise ConversionError(
                f"tensor {self.name}: expected a float dtype, found {self.dtype}, "
                f"which cannot become {dtype}"
            )
        return LazyTensor(self.name, dtype, self.shape, lambda: self._cast_blocks(dtype))

    def _cast_blocks(self, dtype: str) -> Iterator[np.ndarray]:
        for block in self.blocks():
            with np.errstate(over="ignore"):
                values = to_float32(block, self.dtype)
                if dtype == "BF16":
                    yield round_to_bf16(values)
                    continue
                narrow = values.astype(STORAGE[dtype], copy=False)
            if dtype == "F16" and not np.array_equal(np.isfinite(values), np.isfinite(narrow)):
                largest = float(np.abs(values[np.isfinite(values)]).max())
                raise ConversionError(
                    f"tensor {self.name}: expected values within fp16's 65504, found {largest:g}; "
                    "use bf16 or fp32"
                )
            yield narrow


def iter_rows(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` cut along its first axis into blocks of about `BLOCK_ELEMENTS` elements."""
    if array.ndim < 2 or array.size <= BLOCK_ELEMENTS:
        yield array
        return
    step = max(1, BLOCK_ELEMENTS // max(1, array[0].size))
    for start in range(0, len(array), step):
        yield array[start : start + step]
