"""Tiny random models in the layouts of Hugging Face, SafeAILab/EAGLE and FasterDecoding/Medusa.

The weights are random but shaped so that the models are worth decoding: rows of the embedding
and of the head have very different lengths, as frequent and rare tokens do, which spreads the
logits and gives the sub-vocabulary its meaning; the MLP of the first layer is strong, so that the
next token depends mostly on the current one but not only; and a drafter is a disturbed copy of
its target's first layers, fitted to its features, so that it is right often and wrong often.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from reference.eagle import Eagle
from reference.llama import Llama
from reference.medusa import Medusa
from reference.storage import encode, read_folder, write_safetensors


@dataclass(frozen=True)
class TinyModel:
    """The sizes of a tiny target. `config` overrides or adds keys of its config.json."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    layers: int = 2
    head_dim: int | None = None
    tied: bool = False
    family: str = "llama"
    dtype: str = "float32"
    shards: int = 1
    max_position: int = 1024
    eos: int | list[int] | None = None
    tokenizer: bool = False
    seed: int = 1
    config: dict = field(default_factory=dict, hash=False)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden // self.heads

    def with_(self, **changes) -> TinyModel:
        return replace(self, **changes)


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that the scaling shows at once
}

FAMILIES = {
    model.name: model
    for model in [
        TinyModel("llama2", 96, 4, 4, 152, 509, layers=3, config={"rope_theta": 10000.0}),
        TinyModel("llama3", 64, 8, 2, 176, 512, shards=3, config={"rope_theta": 500000.0}),
        TinyModel(
            "llama3.1", 128, 8, 4, 200, 391,
            config={"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING},
        ),
        TinyModel(
            "llama3.2", 96, 6, 2, 136, 300, tied=True, head_dim=16, shards=2,
            config={"rope_theta": 500000.0, "rope_scaling": LLAMA3_SCALING | {"factor": 32.0}},
        ),
        TinyModel(
            "linear", 80, 2, 1, 152, 331, layers=3,
            config={"rope_scaling": {"type": "linear", "factor": 4.0}, "rms_norm_eps": 0.01},
        ),
        TinyModel("smollm2", 72, 9, 3, 152, 509, layers=3, tied=True,
                  config={"rope_theta": 100000.0}),
        TinyModel("qwen2", 112, 14, 2, 152, 401, tied=True, family="qwen2"),
        TinyModel("qwen2.5", 56, 7, 1, 168, 601, family="qwen2", shards=2),
        TinyModel("wide_heads", 72, 3, 1, 152, 283, head_dim=40),
        TinyModel("narrow_heads", 120, 5, 5, 88, 257, head_dim=8, layers=3),
        TinyModel(
            "rope_parameters", 96, 2, 1, 152, 347, head_dim=80,
            config={"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        ),
    ]
}  # fmt: skip


def model_config(model: TinyModel) -> dict:
    """config.json of a target, in the words of its family."""
    config = {
        "architectures": ["Qwen2ForCausalLM" if model.family == "qwen2" else "LlamaForCausalLM"],
        "model_type": model.family,
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.max_position,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": model.tied,
        "torch_dtype": model.dtype,
        "bos_token_id": 1,
        "eos_token_id": model.eos,
    }
    if model.family == "qwen2":
        config |= {"rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "use_sliding_window": False}
    if model.head_dim:
        config["head_dim"] = model.head_dim
    return config | model.config


def layer_weights(
    rng: np.random.Generator, prefix: str, model: TinyModel, unit: float, gain: float, bias: bool
) -> dict[str, np.ndarray]:
    """One decoder layer that adds to a stream of length `unit` per element; `gain`: the MLP's."""
    d, f, c = model.hidden, model.ffn, model.head_size
    q, kv = model.heads * c, model.kv_heads * c

    def matrix(out: int, inputs: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0.0, scale / np.sqrt(inputs), (out, inputs))

    weights = {
        "input_layernorm.weight": 1.0 + 0.2 * rng.normal(size=d),
        "self_attn.q_proj.weight": matrix(q, d, 1.5),
        "self_attn.k_proj.weight": matrix(kv, d, 1.5),
        "self_attn.v_proj.weight": matrix(kv, d),
        "self_attn.o_proj.weight": matrix(d, q, 0.5 * unit),
        "post_attention_layernorm.weight": 1.0 + 0.2 * rng.normal(size=d),
        "mlp.gate_proj.weight": matrix(f, d, 1.5),
        "mlp.up_proj.weight": matrix(f, d, 1.5),
        "mlp.down_proj.weight": matrix(d, f, gain * unit),
    }
    if bias:
        for name, size in (("q", q), ("k", kv), ("v", kv)):
            weights[f"self_attn.{name}_proj.bias"] = 0.4 * rng.normal(size=size)
    return {prefix + name: values for name, values in weights.items()}


def frequency_lengths(rng: np.random.Generator, vocab: int) -> np.ndarray:
    """Random relative lengths of the rows of a vocabulary matrix: a long tail, mean square 1."""
    lengths = np.exp(0.45 * rng.normal(size=vocab))
    return lengths / np.sqrt((lengths**2).mean())


def write_model(folder: Path, model: TinyModel) -> Path:
    """Write a target's folder; returns it."""
    rng = np.random.default_rng([model.seed, model.vocab, model.hidden])
    spread = 2.5 / np.sqrt(model.hidden)  # of logits, for features of mean square 1
    lengths = frequency_lengths(rng, model.vocab)[:, None]
    embedding = rng.normal(size=(model.vocab, model.hidden))
    # Tied: the layers must outweigh the embedding, or every token would be followed by itself.
    unit = 1.0
    if model.tied:
        embedding, unit = embedding * lengths * spread, 3.0 * spread
    weights = {"model.embed_tokens.weight": embedding}
    for index in range(model.layers):
        prefix = f"model.layers.{index}."
        gain = 3.0 if index == 0 else 0.7
        weights |= layer_weights(rng, prefix, model, unit, gain, model.family == "qwen2")
    weights["model.norm.weight"] = 1.0 + 0.2 * rng.normal(size=model.hidden)
    if not model.tied:
        weights["lm_head.weight"] = rng.normal(size=(model.vocab, model.hidden)) * lengths * spread
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, weights, model.dtype, model.shards)
    (folder / "config.json").write_text(json.dumps(model_config(model), indent=1))
    if model.tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(model)))
    return folder


def tokenizer_json(model: TinyModel) -> dict:
    """A tokenizer whose words are "w0", "w1", ...: one per token id."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: token for token, word in enumerate(words(model))},
            "unk_token": "w0",
        },
    }


def words(model: TinyModel) -> list[str]:
    return [f"w{token}" for token in range(model.vocab)]


def tokenizer_fingerprint(model: TinyModel) -> str:
    """SHA-256 over (id, bytes, UTF-8) of every token in order; numbers are little-endian u32."""
    digest = hashlib.sha256()
    for token, word in enumerate(words(model)):
        digest.update(struct.pack("<II", token, len(word)) + word.encode())
    return digest.hexdigest()


def write_weights(folder: Path, weights: dict[str, np.ndarray], dtype: str, shards: int) -> None:
    """Write tensors as one file, or as `shards` files with an index, dealt out in turn."""
    stored = {name: encode(values, dtype) for name, values in weights.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", stored, {"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(stored.items())[shard::shards])
        write_safetensors(folder / file, part, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {
        "metadata": {"total_size": sum(array.nbytes for _, array in stored.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@dataclass(frozen=True)
class TinyDrafter:
    """An EAGLE drafter for a tiny target.

    noise: relative disturbance of its weights after they are fitted: 0 is right as often as a
    fit can be, 1 is rarely right. `feature`: weight of the feature half of `fc`.
    """

    layers: int = 1
    fc_bias: bool = False
    attention_bias: bool = False
    own_embedding: bool = False
    noise: float = 0.05
    feature: float = 0.25
    dtype: str = "float32"
    seed: int = 7


def write_drafter(folder: Path, model: TinyModel, target: Path, drafter: TinyDrafter) -> Path:
    """Write a drafter's folder for the target that `write_model` put into `target`.

    It starts as a copy of the target's first layers; the last projection is then fitted by ridge
    regression to the target's features on text like the target's own.
    """
    rng = np.random.default_rng([drafter.seed, model.hidden])
    _, weights = read_folder(target)
    llama = Llama.load(target)
    d = model.hidden
    sample = own_text(llama, rng, rows=384)
    rows = np.arange(len(sample))
    stream = llama.residual(sample, rows, np.tri(len(sample), dtype=bool))
    shrink = 1.0 / np.sqrt((stream**2).mean())  # of the stream to the features' length

    turned = drafter.feature * np.eye(d)[rng.permutation(d)]
    out = {"fc.weight": np.concatenate([shrink * np.eye(d), turned], axis=1)}
    if drafter.own_embedding:
        out["embed_tokens.weight"] = weights["model.embed_tokens.weight"].copy()
    if drafter.fc_bias:
        out["fc.bias"] = 0.3 * rng.normal(size=d)
    for index in range(drafter.layers):
        source, prefix = f"model.layers.{min(index, model.layers - 1)}.", f"layers.{index}."
        for name, values in weights.items():
            if name.startswith(source) and not name.endswith("_proj.bias"):
                if index == 0 and "input_layernorm" in name:
                    continue
                into_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                out[prefix + name.removeprefix(source)] = values * (shrink if into_stream else 1)
        if drafter.attention_bias:
            for name in ("q", "k", "v"):
                size = out[f"{prefix}self_attn.{name}_proj.weight"].shape[0]
                out[f"{prefix}self_attn.{name}_proj.bias"] = 0.4 * rng.normal(size=size)

    config = model_config(model) | {
        "num_hidden_layers": drafter.layers,
        "torch_dtype": drafter.dtype,
        "bias": drafter.fc_bias,
    }
    fit_last_projection(Eagle(config, out, llama), sample)
    for name, values in out.items():
        if values.ndim == 2:
            out[name] = values + drafter.noise * values.std() * rng.normal(size=values.shape)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, out, drafter.dtype, 1)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def own_text(target: Llama, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Tokens as frequent as in the target's own text: each row's prediction of random tokens'."""
    tokens = rng.integers(0, len(target.head), rows)
    for _ in range(3):
        logits, _ = target.forward(tokens)
        tokens = (logits + rng.gumbel(size=logits.shape)).argmax(1)
    return tokens


def fit_last_projection(eagle: Eagle, sample: np.ndarray) -> None:
    """Replace the last `down_proj` of a drafter by the best linear map to the features."""
    features = eagle.target.forward(sample)[1]
    x = eagle.inputs(sample[1:], features[:-1])
    positions, visible = np.arange(len(x)), np.tri(len(x), dtype=bool)
    for layer in eagle.layers[:-1]:
        x = layer(x, positions, visible)
    last = eagle.layers[-1]
    x = x + last.attention(last.norm("input_layernorm", x), positions, visible)
    gated = last.gated(last.norm("post_attention_layernorm", x))
    ridge = 0.02 * len(x) * (gated**2).mean() * np.eye(gated.shape[1])
    solved = np.linalg.solve(gated.T @ gated + ridge, gated.T @ (features[1:] - x))
    eagle.weights[last.prefix + "mlp.down_proj.weight"] = solved.T


@dataclass(frozen=True)
class TinyMedusa:
    """Medusa heads for a tiny target. noise: as of TinyDrafter."""

    heads: int = 4
    layers: int = 1
    noise: float = 0.05
    dtype: str = "float32"
    seed: int = 7


def write_medusa(folder: Path, model: TinyModel, target: Path, medusa: TinyMedusa) -> Path:
    """Write a folder of heads for the target that `write_model` put into `target`.

    The residual blocks are random; each LM head is the target's after the linear map that fits best
    from what the blocks give to the feature that comes as many tokens later.
    """
    rng = np.random.default_rng([medusa.seed, model.hidden])
    llama = Llama.load(target)
    d = model.hidden
    features = continued_features(llama, own_text(llama, rng, rows=256), medusa.heads)
    config = {"medusa_num_heads": medusa.heads, "medusa_num_layers": medusa.layers}
    weights: dict[str, np.ndarray] = {}
    heads = Medusa(config, weights, llama)
    for head in range(medusa.heads):
        for layer in range(medusa.layers):
            name = f"{head}.{layer}.linear"
            weights[f"{name}.weight"] = rng.normal(size=(d, d)) * 0.7 / np.sqrt(d)
            weights[f"{name}.bias"] = 0.3 * rng.normal(size=d)
        x = heads.hidden(head, features[0])
        ridge = 0.02 * len(x) * (x**2).mean() * np.eye(d)
        fitted = np.linalg.solve(x.T @ x + ridge, x.T @ features[head + 1])
        weights[f"{head}.{medusa.layers}.weight"] = llama.head @ fitted.T
    for name, values in weights.items():
        if values.ndim == 2:
            weights[name] = values + medusa.noise * values.std() * rng.normal(size=values.shape)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, weights, medusa.dtype, 1)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def continued_features(target: Llama, sample: np.ndarray, steps: int) -> list[np.ndarray]:
    """Features of every row of `sample`, then of 1 ... `steps` likeliest tokens behind each row."""
    rows = len(sample)
    tokens, positions = np.asarray(sample), np.arange(rows)
    visible = np.tri(rows, dtype=bool)
    found = []
    for step in range(steps + 1):
        logits, features = target.forward(tokens, positions, visible)
        found.append(features[-rows:])
        tokens = np.concatenate([tokens, logits[-rows:].argmax(1)])
        positions = np.concatenate([positions, np.arange(rows) + step + 1])
        visible = np.pad(visible, ((0, rows), (0, rows)))
        visible[-rows:] = visible[-2 * rows : -rows]
        visible[-rows:, -rows:] |= np.eye(rows, dtype=bool)
    return found


def frequent_tokens(target: Llama) -> np.ndarray:
    """All token ids, the ones the model tends to write first: longest rows of the head first."""
    return np.argsort(-np.linalg.norm(target.head, axis=1), kind="stable")
