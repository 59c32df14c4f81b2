"""The layout of a model folder: which tensors a config asks for, and which files travel along."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from frspec.convert.tensors import LazyTensor
from frspec.errors import ConversionError, ModelError, RequestError

# Names in a config's `architectures`, and the `model_type` that goes with each.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}

# What a model folder has beside its weights and config.json.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def read_config(path: Path) -> dict[str, Any]:
    """The object in the config.json at `path`."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot read: {error}") from error
    if not isinstance(config, dict):
        raise ConversionError(f"{path}: expected an object, found {type(config).__name__}")
    if config.get("quantization_config") is not None:
        raise ConversionError(f"{path}: quantization_config: quantised weights are not supported")
    return config


def config_count(config: dict[str, Any], key: str, where: Path, default: int | None = None) -> int:
    """The positive integer under `key`."""
    value = config.get(key)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        raise ConversionError(f"{where}: {key}: expected a positive integer, found {value!r}")
    return value


def check_target(drafter: dict[str, Any], where: Path, target: Path) -> None:
    """ConversionError unless the drafter's sizes, where its config has them, are the target's."""
    config = read_config(target / "config.json")
    for key in ("hidden_size", "vocab_size"):
        expected = config.get(key)
        if drafter.get(key, expected) != expected:
            raise ConversionError(
                f"{where}: {key}: expected the target's {expected}, found {drafter.get(key)}"
            )


def check_loads(folder: Path) -> None:
    """ConversionError unless the runtime takes the model in `folder`; no weights are read."""
    from frspec.generator import plan_engine

    try:
        plan_engine(folder, device="cpu")
    except (ModelError, RequestError) as error:
        raise ConversionError(str(error)) from None


def check_config(config: dict[str, Any], where: Path) -> None:
    """ConversionError unless the runtime takes a model of this config, which came from `where`."""
    with tempfile.TemporaryDirectory() as folder:
        # A synthetic model is nothing but its config.
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config | {"frspec_synthetic_seed": 0}), encoding="utf-8")
        try:
            check_loads(path.parent)
        except ConversionError as error:
            raise ConversionError(str(error).replace(str(path), str(where))) from None


def with_classic_rope(config: dict[str, Any]) -> dict[str, Any]:
    """A copy with rope_theta and rope_scaling in place of the newer rope_parameters.

    RoPE that differs between layers cannot be said so, and stays as it is.
    """
    parameters = config.get("rope_parameters")
    if parameters is None:
        return {key: value for key, value in config.items() if key != "rope_parameters"}
    if not isinstance(parameters, dict) or any(isinstance(v, dict) for v in parameters.values()):
        return dict(config)
    classic = {key: value for key, value in config.items() if key != "rope_parameters"}
    scaling = dict(parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in scaling:
            classic[key] = scaling.pop(key)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    classic["rope_scaling"] = None if kind == "default" else scaling
    return classic


def with_torch_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A copy that names the weights' dtype under torch_dtype alone (newer configs use dtype)."""
    return {**{key: value for key, value in config.items() if key != "dtype"}, "torch_dtype": name}


def layer_shapes(prefix: str, config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of one decoder layer, every bias it may have included."""
    hidden = config_count(config, "hidden_size", where)
    ffn = config_count(config, "intermediate_size", where)
    heads = config_count(config, "num_attention_heads", where)
    kv_heads = config_count(config, "num_key_value_heads", where, heads)
    head_dim = config_count(config, "head_dim", where, hidden // heads)
    attention, kv = heads * head_dim, kv_heads * head_dim
    matrices = {
        "self_attn.q_proj": (attention, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, attention),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {
        prefix + "input_layernorm.weight": (hidden,),
        prefix + "post_attention_layernorm.weight": (hidden,),
    }
    for name, shape in matrices.items():
        shapes[f"{prefix}{name}.weight"] = shape
        shapes[f"{prefix}{name}.bias"] = shape[:1]
    return shapes


def model_shapes(config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of a whole model, in the order they are written."""
    hidden = config_count(config, "hidden_size", where)
    vocab = config_count(config, "vocab_size", where)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config_count(config, "num_hidden_layers", where)):
        shapes.update(layer_shapes(f"model.layers.{layer}.", config, where))
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def select(
    found: dict[str, LazyTensor],
    shapes: dict[str, tuple[int, ...]],
    optional: set[str],
    where: Path,
) -> list[LazyTensor]:
    """The tensors of `shapes` in that order; refuses missing, extra and wrongly shaped ones.

    Biases may be absent, and so may the names in `optional`.
    """
    for name, tensor in found.items():
        if name not in shapes:
            raise ConversionError(f"{where}: tensor {name}: not part of the model in its config")
        if tensor.shape != shapes[name]:
            raise ConversionError(
                f"{where}: tensor {name}: expected shape {list(shapes[name])}, "
                f"found {list(tensor.shape)}"
            )
    for name in shapes:
        if name not in found and name not in optional and not name.endswith(".bias"):
            raise ConversionError(f"{where}: tensor {name}: expected, found none")
    return [found[name] for name in shapes if name in found]


def bias_settings(names: set[str], prefix: str, where: Path) -> dict[str, Any]:
    """The config keys that say which biases the layer under `prefix` has.

    A llama with biases on q, k and v but not on o is exactly what qwen2 names.
    """

    def count(*projections: str) -> int:
        return sum(f"{prefix}{name}_proj.bias" in names for name in projections)

    qkv = count("self_attn.q", "self_attn.k", "self_attn.v")
    output = count("self_attn.o")
    mlp = count("mlp.gate", "mlp.up", "mlp.down")
    if (qkv, output) not in ((0, 0), (3, 0), (3, 1)) or mlp not in (0, 3):
        raise ConversionError(
            f"{where}: biases of {prefix}*: expected on q, k, v (and o) or none of them, and on "
            f"gate, up, down or none, found {qkv} of q, k, v, {output} of o, {mlp} of the last"
        )
    if (qkv, output) == (3, 0):
        if mlp:
            raise ConversionError(
                f"{where}: biases of {prefix}mlp.*: expected none beside those of q, k, v alone"
            )
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": qkv > 0,
        "mlp_bias": mlp > 0,
    }


def copy_companions(source: Path, out: Path) -> None:
    """Copies the tokenizer's and the generation settings' files as they are."""
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
