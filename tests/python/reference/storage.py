"""Safetensors files read and written by hand, so that a bug in the runtime's reader cannot hide.

NumPy has no bfloat16: such tensors are kept as their upper sixteen bits of a float32.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

STORAGE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2"),
           "I64": np.dtype("<i8"), "I32": np.dtype("<i4")}  # fmt: skip
DTYPE_CODE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 (ties to even) of finite float32 values, as uint16 bit patterns."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def encode(values: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """(safetensors dtype code, array in storage form) of `values` stored as `dtype`."""
    code = DTYPE_CODE[dtype]
    if code == "BF16":
        return code, bf16_bits(values)
    return code, np.ascontiguousarray(values, dtype=STORAGE[code])


def decode(code: str, stored: np.ndarray) -> np.ndarray:
    """The exact values of a stored tensor: float64, or integers as they are."""
    if code == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return stored.astype(np.float64) if stored.dtype.kind == "f" else stored


def write_safetensors(
    path: Path, tensors: dict[str, tuple[str, np.ndarray]], metadata: dict[str, str] | None = None
) -> None:
    """Write `name -> (dtype code, storage array)`; the header is padded to eight bytes."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (code, array) in tensors.items():
        end = offset + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(array.tobytes())


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file as float64 (or integers), by name."""
    blob = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        stored = np.frombuffer(blob[begin:end], dtype=STORAGE[entry["dtype"]])
        tensors[name] = decode(entry["dtype"], stored).reshape(entry["shape"])
    return tensors


def read_folder(folder: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """(config.json, every tensor as float64) of a model folder, sharded or not."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, np.ndarray] = {}
    for name in files:
        tensors |= read_safetensors(folder / name)
    return config, tensors
