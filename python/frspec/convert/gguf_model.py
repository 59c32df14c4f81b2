"""A GGUF of llama or qwen2 architecture as a Hugging Face model folder."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from frspec.convert.gguf_file import GgufFile, GgufTensor
from frspec.convert.gguf_tokenizer import (
    TokenizerMetadata,
    build_tokenizer,
    end_token_ids,
    special_token_ids,
)
from frspec.convert.layout import bias_settings, check_config, model_shapes, select
from frspec.convert.output import Progress, staged_folder, write_json, write_weights
from frspec.convert.tensors import WEIGHT_DTYPES, LazyTensor
from frspec.errors import ConversionError

_ARCHITECTURES = ("llama", "qwen2")

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Derived from the rope settings, which config.json states.
_ROPE_FREQS = "rope_freqs.weight"
_DROPPED = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")

# Llama 3.1 and later: the settings every published model has but for its factor.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_CONTEXT = 8192


class _Metadata:
    """Metadata of one architecture, checked as it is read."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._file = file
        self._prefix = architecture

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`; an error when it is absent without a default."""
        name = f"{self._prefix}.{key}"
        value = self._file.metadata.get(name, default)
        if isinstance(value, np.ndarray) and value.size and np.all(value == value.flat[0]):
            value = value.flat[0].item()  # one value per layer, all the same
        if kind is float and isinstance(value, int):
            value = float(value)
        if value is None:
            raise ConversionError(f"{self._file.path}: expected metadata {name}, found none")
        if not isinstance(value, kind) or (kind in (int, float) and value < 0):
            raise ConversionError(
                f"{self._file.path}: {name}: expected one {kind.__name__}, found {value!r}"
            )
        return value


def convert_gguf(
    source: Path, out: Path, dtype: str | None, progress: Progress | None = None
) -> list[str]:
    """Writes the GGUF file `source` as the model folder `out`; returns notes for the user.

    `dtype` is "bf16", "fp16", "fp32", or None: the file's own when its matrices are not
    quantised, else bf16.
    """
    file = GgufFile(source)
    notes: list[str] = []
    architecture = file.metadata.get("general.architecture")
    if architecture not in _ARCHITECTURES:
        raise ConversionError(
            f"{source}: expected a GGUF of architecture {' or '.join(_ARCHITECTURES)}, "
            f"found {architecture!r}"
        )
    splits = file.metadata.get("split.count", 1)
    if splits > 1:
        raise ConversionError(
            f"{source}: expected a whole model, found one of {splits} parts; merge them first"
        )
    config = _config(file, architecture)
    code, torch_name = WEIGHT_DTYPES[dtype or _own_dtype(file)]
    config["torch_dtype"] = torch_name
    check_config(config, source)  # before anything is made of its sizes
    tensors = [tensor.cast(code) for tensor in _model_tensors(file, architecture, config)]

    metadata = TokenizerMetadata(source, file.metadata)
    tokenizer, tokenizer_config = build_tokenizer(metadata, config["vocab_size"], notes)
    ids = special_token_ids(metadata, config["vocab_size"])
    config.update(ids)
    generation_config = dict(ids)
    ends = end_token_ids(metadata, config["vocab_size"])
    if ends:
        generation_config["eos_token_id"] = ends if len(ends) > 1 else ends[0]

    nbytes = sum(tensor.nbytes for tensor in tensors)
    with staged_folder(out, nbytes) as stage:
        write_json(stage / "config.json", config)
        write_json(stage / "generation_config.json", generation_config)
        write_json(stage / "tokenizer_config.json", tokenizer_config)
        tokenizer.save(str(stage / "tokenizer.json"))
        write_weights(stage, tensors, progress)
    return notes


def _own_dtype(file: GgufFile) -> str:
    """The dtype of the file's matrices when they share an unquantised one, else "bf16"."""
    kinds = {tensor.quantization for tensor in file.tensors.values() if len(tensor.shape) > 1}
    words = {
        GGMLQuantizationType.F16: "fp16",
        GGMLQuantizationType.BF16: "bf16",
        GGMLQuantizationType.F32: "fp32",
    }
    return words.get(kinds.pop(), "bf16") if len(kinds) == 1 else "bf16"


def _config(file: GgufFile, architecture: str) -> dict[str, Any]:
    meta = _Metadata(file, architecture)
    if meta.get("expert_count", int, 0) > 0:
        raise ConversionError(f"{file.path}: mixture-of-experts models are not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConversionError(f"{file.path}: expected a matrix token_embd.weight, found none")
    hidden = meta.get("embedding_length", int)
    heads = meta.get("attention.head_count", int)
    if heads == 0 or hidden == 0:
        raise ConversionError(f"{file.path}: embedding_length and head_count must not be 0")
    head_dim = meta.get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.get(key, int, head_dim) != head_dim:
            raise ConversionError(
                f"{file.path}: {architecture}.{key}: expected the head size {head_dim}, "
                f"found {meta.get(key, int)}"
            )
    return {
        **_kind(file, architecture),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta.get("feed_forward_length", int),
        "num_hidden_layers": meta.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.get("context_length", int),
        "rms_norm_eps": meta.get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": meta.get("rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(file, meta, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": embedding.shape[0],
    }


def _kind(file: GgufFile, architecture: str) -> dict[str, Any]:
    """The config keys for the architecture and its biases, which a qwen2 always has."""
    names = {_hugging_face_name(name) for name in file.tensors}
    kind = bias_settings(names, "model.layers.0.", file.path)
    if architecture == "qwen2" and kind["model_type"] != "qwen2":
        raise ConversionError(
            f"{file.path}: expected a qwen2 model with biases on q, k and v alone, found others"
        )
    return kind


def _rope_scaling(file: GgufFile, meta: _Metadata, head_dim: int) -> dict[str, Any] | None:
    kind = meta.get("rope.scaling.type", str, "none")
    factor = meta.get("rope.scaling.factor", float, 0.0)
    if kind == "none":
        # The key of GGUF files written before rope.scaling.* existed.
        factor = meta.get("rope.scale_linear", float, 0.0)
        kind = "linear" if factor not in (0.0, 1.0) else kind
    freqs = file.tensors.get(_ROPE_FREQS)
    if kind == "none" and freqs is None:
        return None
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0) and freqs is not None):
        return _llama3_scaling(file, meta, freqs, head_dim)
    if kind == "linear" and freqs is None:
        return {"rope_type": "linear", "factor": factor} if factor not in (0.0, 1.0) else None
    raise ConversionError(
        f"{file.path}: RoPE scaling: expected none, linear or llama3, found {kind}"
        + (f" with {_ROPE_FREQS}" if freqs is not None else "")
    )


def llama3_divisors(theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """What Llama 3.1's RoPE scaling divides each of the head_dim / 2 frequencies by.

    High frequencies stay, low ones are divided by `factor`, those between are interpolated
    (the `llama3` rope type of Hugging Face configs).
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = original * frequency / (2 * math.pi)  # over the original context
    smooth = (turns - _LLAMA3_LOW_FREQ_FACTOR) / (
        _LLAMA3_HIGH_FREQ_FACTOR - _LLAMA3_LOW_FREQ_FACTOR
    )
    smooth = np.clip(smooth, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _llama3_scaling(
    file: GgufFile, meta: _Metadata, freqs: GgufTensor, head_dim: int
) -> dict[str, Any]:
    """The llama3 scaling whose divisors `rope_freqs.weight` holds: its factor is the largest."""
    found = freqs.dequantized(_ROPE_FREQS).numpy().reshape(-1).astype(np.float64)
    theta = meta.get("rope.freq_base", float, 10000.0)
    original = meta.get("rope.scaling.original_context_length", int, _LLAMA3_ORIGINAL_CONTEXT)
    factor = round(float(found.max()), 4)
    if len(found) == head_dim // 2 and np.isfinite(factor) and factor >= 1.0:
        expected = llama3_divisors(theta, head_dim, factor, original)
        if np.allclose(found, expected, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
                "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
                "original_max_position_embeddings": original,
            }
    raise ConversionError(
        f"{file.path}: {_ROPE_FREQS}: expected the divisors of Llama 3.1's RoPE scaling "
        f"for head size {head_dim} and original context {original}, found other values"
    )


def _model_tensors(file: GgufFile, architecture: str, config: dict[str, Any]) -> list[LazyTensor]:
    """Every tensor under its Hugging Face name, in float32, checked for presence and shape."""
    found: dict[str, LazyTensor] = {}
    for tensor in file.tensors.values():
        if tensor.name == _ROPE_FREQS or _DROPPED.fullmatch(tensor.name):
            continue
        name = _hugging_face_name(tensor.name)
        lazy = tensor.dequantized(name)
        if architecture == "llama" and re.search(r"\.attn_[qk]\.", tensor.name):
            lazy = _with_halves_apart(lazy, config["head_dim"])
        found[name] = lazy
    return select(found, model_shapes(config, file.path), {"lm_head.weight"}, file.path)


def _hugging_face_name(name: str) -> str:
    """The name in a Hugging Face model; one that has none there stays, and is refused later."""
    match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _LAYER_NAMES:
        return _GLOBAL_NAMES.get(name, name)
    return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def _with_halves_apart(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Undoes the llama GGUF layout of q and k, whose rotary pairs are neighbours in each head.

    Row 2 i + j of a head there (pair i, half j) is row j head_dim / 2 + i in Hugging Face's.
    """

    def blocks():
        values = tensor.storage()
        paired = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
        yield np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(values.shape)

    return LazyTensor(tensor.name, tensor.dtype, tensor.shape, blocks)
