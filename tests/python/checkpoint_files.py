"""Checkpoints for tests: what torch.save would write, without torch, and small models in it."""

from __future__ import annotations

import json
import math
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

_STORAGE_CLASSES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclass
class Tensor:
    """A view of `values`, one-dimensional storage, as torch describes it.

    `values` of dtype uint16 are bfloat16 bits. `size` is what the pickle says the storage has.
    """

    values: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    size: int | None = None


@dataclass
class Raw:
    """Opcodes put into the pickle as they are."""

    code: bytes


@dataclass
class Archive:
    """The pickle of `value` and the storages that it names."""

    value: Any
    storages: list[np.ndarray] = field(default_factory=list)

    def pickle(self) -> bytes:
        return b"\x80\x02" + self._code(self.value) + b"."

    def save(self, path: Path) -> Path:
        """Writes the zip format; the arrays are kept as they are."""
        program = self.pickle()
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
            archive.writestr("archive/byteorder", "little")
            for key, values in enumerate(self.storages):
                archive.writestr(f"archive/data/{key}", values.tobytes())
            archive.writestr("archive/version", "3\n")
        return path

    def _code(self, value: Any) -> bytes:
        if isinstance(value, Raw):
            return value.code
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            size = value.bit_length() // 8 + 1
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, str):
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self._code, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self._code, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(self._code(k) + self._code(v) for k, v in value.items())
            return b"}(" + items + b"u"
        assert isinstance(value, Tensor), value
        return self._tensor(value)

    def _tensor(self, tensor: Tensor) -> bytes:
        keys = [key for key, known in enumerate(self.storages) if known is tensor.values]
        if not keys:
            keys.append(len(self.storages))
            self.storages.append(tensor.values)
        dtype = str(tensor.values.dtype)
        name = "BFloat16Storage" if dtype == "uint16" else _STORAGE_CLASSES[dtype]
        size = tensor.values.size if tensor.size is None else tensor.size
        storage = (b"(" + self._code("storage") + global_code("torch", name)) + b"".join(
            self._code(item) for item in (str(keys[0]), "cpu", size)
        )
        arguments = (tensor.offset, tensor.shape, tensor.strides, False)
        hooks = global_code("collections", "OrderedDict") + b")R"
        rest = b"".join(map(self._code, arguments)) + hooks
        rebuild = global_code("torch._utils", "_rebuild_tensor_v2")
        return rebuild + b"(" + storage + b"tQ" + rest + b"tR"


def global_code(module: str, name: str) -> bytes:
    """The opcode that pushes a global."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def contiguous(array: np.ndarray) -> Tensor:
    """A tensor over a storage of its own."""
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
    return Tensor(np.ascontiguousarray(array).reshape(-1), array.shape, strides)


def save_checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A PyTorch state dict; uint16 arrays are bfloat16 bits."""
    return Archive({name: contiguous(array) for name, array in tensors.items()}).save(path)


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """dtype code and storage by name, read independently of the package under test."""
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}
    out, end = {}, 0
    for name, info in header.items():
        start, stop = info["data_offsets"]
        assert start == end, f"a gap before {name}"
        end = stop
        raw = data[8 + length + start : 8 + length + stop]
        array = np.frombuffer(raw, dtypes[info["dtype"]]).reshape(info["shape"])
        out[name] = (info["dtype"], array)
    assert 8 + length + end == len(data), "bytes behind the last tensor"
    return out


# --- a small llama -------------------------------------------------------------------------------

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 32, 48, 4, 2, 40
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 2,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4},
    "dtype": "float32",
}


def layer_tensors(rng: np.random.Generator, prefix: str) -> dict[str, np.ndarray]:
    head_dim = HIDDEN // HEADS
    shapes = {
        "input_layernorm": (HIDDEN,),
        "self_attn.q_proj": (HEADS * head_dim, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * head_dim),
        "post_attention_layernorm": (HIDDEN,),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    return {
        f"{prefix}{name}.weight": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def model_tensors(tied: bool = False, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, HIDDEN))}
    for layer in range(2):
        tensors |= layer_tensors(rng, f"model.layers.{layer}.")
    tensors["model.norm.weight"] = rng.standard_normal(HIDDEN)
    if not tied:
        tensors["lm_head.weight"] = rng.standard_normal((VOCAB, HIDDEN))
    return {name: tensor.astype(dtype) for name, tensor in tensors.items()}


def write_model(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    save_checkpoint(folder / "pytorch_model.bin", tensors)
    return folder
