"""The tensors of a checkpoint on disk: safetensors or PyTorch files, single or sharded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frspec.convert.tensors import STORAGE, LazyTensor
from frspec.convert.torch_file import load_state_dict
from frspec.errors import ConversionError

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
_TORCH_SUFFIXES = (".bin", ".pt", ".pth")
# In the order in which a folder is searched, the runtime's and Hugging Face's.
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "medusa_lm_head.safetensors",
    "medusa_lm_head.pt",
)


@dataclass(frozen=True)
class Checkpoint:
    """`folder` holds config.json and the tokenizer; `kind` is "safetensors" or "torch"."""

    folder: Path
    kind: str
    tensors: dict[str, LazyTensor]


def open_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint in a folder, or in one file of a folder."""
    if source.is_dir():
        folder, file = source, weights_file(source)
    else:
        folder, file = source.parent, source
    if not file.is_file():
        raise ConversionError(f"{file}: no such file")
    files = _sharded_files(file) if file.name.endswith(".index.json") else [file]
    tensors: dict[str, LazyTensor] = {}
    for path in files:
        for name, tensor in _open_file(path).items():
            if name in tensors:
                raise ConversionError(f"{path}: tensor {name} is in another shard too")
            tensors[name] = tensor
    kind = "safetensors" if files[0].suffix == ".safetensors" else "torch"
    return Checkpoint(folder, kind, tensors)


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file, mapped (the package's NumPy reader has no bfloat16)."""
    try:
        data = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot read: {error}") from error
    length = int.from_bytes(bytes(data[:8]), "little")
    if len(data) < 8 or length > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ConversionError(
            f"{path}: expected a safetensors header, found one of {length} bytes in a file of "
            f"{len(data)}"
        )
    try:
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        entries = [(name, *_entry(info)) for name, info in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConversionError(f"{path}: damaged safetensors header: {error}") from error
    values = np.asarray(data[8 + length :])
    tensors = {}
    for name, dtype, shape, start, end in entries:
        if not name.isprintable():
            raise ConversionError(f"{path}: expected printable tensor names, found {name!r}")
        if dtype not in STORAGE:
            raise ConversionError(
                f"{path}: tensor {name}: expected a dtype of {', '.join(STORAGE)}, found {dtype!r}"
            )
        needed = math.prod(shape) * STORAGE[dtype].itemsize
        if not 0 <= start <= end <= len(values) or end - start != needed:
            raise ConversionError(
                f"{path}: tensor {name}: expected {needed} bytes within {len(values)}, "
                f"found offsets {start} to {end}"
            )
        array = values[start:end].view(STORAGE[dtype]).reshape(shape)
        tensors[name] = LazyTensor.from_array(name, dtype, array)
    return tensors


def _entry(info: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    shape, (start, end) = tuple(info["shape"]), info["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError(f"shape {shape}, offsets {start} to {end}")
    # NumPy's limits, which an empty tensor's other dimensions may exceed.
    if len(shape) > 32 or math.prod(number for number in shape if number) >= 2**62:
        raise ValueError(f"shape {shape}")
    return str(info["dtype"]), shape, start, end


def _open_file(path: Path) -> dict[str, LazyTensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else load_state_dict(path)


def weights_file(folder: Path) -> Path:
    """The file of weights, or the index of several, that the folder is loaded from."""
    for name in _FOLDER_FILES:
        if (folder / name).is_file():
            return folder / name
    suffixes = (".safetensors", *_TORCH_SUFFIXES)
    others = sorted(path for path in folder.iterdir() if path.suffix in suffixes)
    if len(others) != 1:
        raise ConversionError(
            f"{folder}: expected {', '.join(_FOLDER_FILES)} or one file of weights, "
            f"found {len(others)} ({', '.join(path.name for path in others[:4]) or 'none'})"
        )
    return others[0]


def _sharded_files(index: Path) -> list[Path]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        ordered = sorted(names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{index}: expected an index with a weight_map: {error}") from error
    for name in ordered:
        # A name with a folder in it could point anywhere.
        if not isinstance(name, str) or Path(name).name != name:
            raise ConversionError(f"{index}: expected names of files beside it, found {name!r}")
        if not (index.parent / name).is_file():
            raise ConversionError(f"{index.parent / name}: no such file, which {index.name} names")
    if not ordered:
        raise ConversionError(f"{index}: expected names of files, found none")
    return [index.parent / name for name in ordered]
