"""The forward pass of the Llama and Qwen2 families in double precision, from the formulas.

Letters: n rows, d hidden, h heads, g key-value heads, c head size, f ffn size, v vocabulary.

  RMSNorm   y = x / sqrt(mean(x^2) + eps) * w                            (arXiv 1910.07467)
  RoPE      angle_j = position * theta^(-2j/c); the pair (x_j, x_{j+c/2}) is turned by it
            (arXiv 2104.09864; Hugging Face keeps the two halves of a head apart)
  linear    every frequency divided by `factor`                          (arXiv 2306.15595)
  llama3    wavelengths above original/low_freq_factor are stretched by `factor`, those below
            original/high_freq_factor are kept, between them the two are blended linearly in
            original/wavelength
  SwiGLU    down(silu(gate x) * up x)                                    (arXiv 2002.05202)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from reference.storage import read_folder


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def inverse_frequencies(config: dict) -> np.ndarray:
    """Radians per position of each pair, float64[c/2]; reads both spellings of the config."""
    size = head_dim(config)
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    frequencies = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return keep * frequencies + (1.0 - keep) * frequencies / scaling["factor"]
    if kind != "default":
        raise ValueError(f"the reference knows no rope scaling {kind!r}")
    return frequencies


def head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotate(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """RoPE of x[n, heads, c] at positions[n]."""
    angle = positions[:, None, None] * frequencies
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle),
         second * np.cos(angle) + first * np.sin(angle)], axis=-1,
    )  # fmt: skip


@dataclass
class Layer:
    """One decoder layer over named tensors; a missing `input_layernorm` means no norm there."""

    config: dict
    weights: dict[str, np.ndarray]
    prefix: str

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[f"{self.prefix}{name}.weight"].T
        bias = self.weights.get(f"{self.prefix}{name}.bias")
        return y if bias is None else y + bias

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.weights.get(f"{self.prefix}{name}.weight")
        return x if weight is None else rms_norm(x, weight, self.config["rms_norm_eps"])

    def attention(self, x: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
        rows, size = len(x), head_dim(self.config)
        heads = self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads", heads)
        frequencies = inverse_frequencies(self.config)
        q = self.linear("self_attn.q_proj", x).reshape(rows, heads, size)
        k = self.linear("self_attn.k_proj", x).reshape(rows, kv_heads, size)
        v = self.linear("self_attn.v_proj", x).reshape(rows, kv_heads, size)
        q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        out = np.empty_like(q)
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, group].T / np.sqrt(size)
            weights = np.exp(log_softmax(np.where(visible, scores, -np.inf)))
            out[:, head] = weights @ v[:, group]
        return self.linear("self_attn.o_proj", out.reshape(rows, heads * size))

    def gated(self, x: np.ndarray) -> np.ndarray:
        return silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        return self.linear("mlp.down_proj", self.gated(x))

    def __call__(self, x: np.ndarray, positions: np.ndarray, visible: np.ndarray) -> np.ndarray:
        x = x + self.attention(self.norm("input_layernorm", x), positions, visible)
        return x + self.mlp(self.norm("post_attention_layernorm", x))


@dataclass
class Llama:
    """A target model: `logits, features = model.forward(tokens)`."""

    config: dict
    weights: dict[str, np.ndarray]
    layers: list[Layer] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [
            Layer(self.config, self.weights, f"model.layers.{index}.")
            for index in range(self.config["num_hidden_layers"])
        ]
        self.embedding = self.weights["model.embed_tokens.weight"]
        tied = self.config.get("tie_word_embeddings", False)
        self.head = self.embedding if tied else self.weights["lm_head.weight"]

    @classmethod
    def load(cls, folder: Path) -> Llama:
        return cls(*read_folder(folder))

    def residual(
        self, tokens: np.ndarray, positions: np.ndarray, visible: np.ndarray
    ) -> np.ndarray:
        """The stream after the last layer, before the final norm: [n, d]."""
        x = self.embedding[tokens]
        for layer in self.layers:
            x = layer(x, positions, visible)
        return x

    def forward(
        self,
        tokens: np.ndarray,
        positions: np.ndarray | None = None,
        visible: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(logits [n, v], features [n, d]) of any set of rows.

        visible[i, j]: may row i attend to row j (itself included). Left out, the rows are a
        plain causal sequence. Features are the hidden states after the final norm.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        rows = len(tokens)
        if positions is None:
            positions = np.arange(rows)
        if visible is None:
            visible = np.tri(rows, dtype=bool)
        x = self.residual(tokens, np.asarray(positions), visible)
        features = rms_norm(x, self.weights["model.norm.weight"], self.config["rms_norm_eps"])
        return features @ self.head.T, features

    def greedy(self, prompt: list[int], count: int, margin: float = 0.0) -> list[int]:
        """The `count` tokens of largest logit after `prompt`, one at a time.

        Stops early (returns fewer) at a step whose two best logits are closer than
        margin * rms(logits): a text that ends early has a near-tie in it.
        """
        tokens = list(prompt)
        for _ in range(count):
            logits = self.forward(tokens)[0][-1]
            if relative_margin(logits) < margin:
                break
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]


def relative_margin(logits: np.ndarray) -> float:
    """How far the best logit is ahead of the second, in units of rms(logits)."""
    second, best = np.partition(logits, -2)[-2:]
    return float((best - second) / np.sqrt((logits * logits).mean()))
