"""The drafters in PyTorch: an EAGLE layer (arXiv 2401.15077) and Medusa heads (arXiv 2401.10774).

Tensor names and layouts are those of the checkpoints that frspec loads.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from frspec.files import write_whole

from .conversations import TrainingError

KeysValues = tuple[Tensor, Tensor]  # [B, heads, T, head_dim] each


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        self.head_dim = config.get("head_dim") or hidden // heads
        self.heads, self.kv_heads = heads, config.get("num_key_value_heads") or heads
        self.q_proj = nn.Linear(hidden, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], committed: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """x [B, T, d]. committed: of the rows in whose place other rows stand in x; a row sees the
        committed rows before it, and itself as it is in x."""

        def split(y: Tensor, heads: int) -> Tensor:
            return y.view(*y.shape[:2], heads, self.head_dim).transpose(1, 2)

        q = _rotate(split(self.q_proj(x), self.heads), rope)
        k = _rotate(split(self.k_proj(x), self.kv_heads), rope)
        v = split(self.v_proj(x), self.kv_heads)
        if committed is None:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            rows = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
            visible = torch.cat([rows.tril(-1), rows.tril() & rows.triu()], 1)
            keys = torch.cat([committed[0], k], 2)
            values = torch.cat([committed[1], v], 2)
            y = functional.scaled_dot_product_attention(
                q, keys, values, attn_mask=visible, enable_gqa=True
            )
        return self.o_proj(y.transpose(1, 2).flatten(2)), (k, v)


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (table.to(x.dtype) for table in rope)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Mlp(nn.Module):
    def __init__(self, config: dict[str, Any]):
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """A decoder layer without an input norm, as EAGLE's first is."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], committed: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        attended, own = self.self_attn(x, rope, committed)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), own


class Eagle(nn.Module):
    """Row i: embedding of token i + 1 and feature i -> feature i + 1."""

    def __init__(self, target_config: dict[str, Any]):
        super().__init__()
        self.config = target_config | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "bias": True,
            "torch_dtype": "bfloat16",
        }
        hidden = self.config["hidden_size"]
        self.fc = nn.Linear(2 * hidden, hidden, bias=True)
        self.layers = nn.ModuleList([Layer(self.config)])

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        rope: tuple[Tensor, Tensor],
        committed: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """embedded, features [B, T, d] -> hidden [B, T, d], and the layer's keys and values.

        With `committed` the features are the drafter's own, as in the second level of a tree.
        """
        return self.layers[0](self.fc(torch.cat([embedded, features], -1)), rope, committed)

    @torch.no_grad()
    def start(self, gram: Tensor, product: Tensor) -> None:
        """Begins as the best linear map and a layer that adds nothing to it.

        gram [2 d + 1, 2 d + 1] and product [2 d + 1, d] are sums of X^T X and X^T Y over rows X of
        (embedding, feature, 1) and Y of the next feature.
        """
        ridge = 1e-5 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        solved = torch.linalg.solve(gram + ridge, product).T.float()
        self.fc.weight.copy_(solved[:, :-1])
        self.fc.bias.copy_(solved[:, -1])
        attention = self.layers[0].self_attn
        attention.o_proj.weight.zero_()
        self.layers[0].mlp.down_proj.weight.zero_()
        attention.q_proj.weight.mul_(0.15)  # features are long: attention begins soft
        attention.k_proj.weight.mul_(0.15)


class Medusa(nn.Module):
    """Heads of one residual block each. Their LM heads are the target's, of which the rows of the
    most frequent tokens are trained."""

    def __init__(self, heads: int, hidden: int, frequent_rows: Tensor):
        super().__init__()
        self.config = {"medusa_num_heads": heads, "medusa_num_layers": 1}
        self.blocks = nn.ModuleList([nn.Linear(hidden, hidden) for _ in range(heads)])
        for block in self.blocks:
            nn.init.zeros_(block.weight)
            nn.init.zeros_(block.bias)
        rows = frequent_rows.float()
        self.rows = nn.ParameterList([nn.Parameter(rows.clone()) for _ in range(heads)])

    def forward(self, features: Tensor, head: int) -> Tensor:
        """features [..., d] -> what the LM head of `head` reads."""
        return features + functional.silu(self.blocks[head](features))

    def checkpoint(self, head: Tensor, frequent: Tensor) -> dict[str, Tensor]:
        """The tensors of FasterDecoding/Medusa's layout. head: the target's [vocabulary, d]."""
        tensors = {}
        for number, (block, rows) in enumerate(zip(self.blocks, self.rows, strict=True)):
            tensors[f"{number}.0.linear.weight"] = block.weight
            tensors[f"{number}.0.linear.bias"] = block.bias
            whole = head.clone()
            whole[frequent] = rows.detach().to(whole.dtype)
            tensors[f"{number}.1.weight"] = whole
        return tensors


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """A drafter's folder in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        name: tensor.detach().to(torch.bfloat16).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    write_whole(folder / "model.safetensors", save(stored, metadata={"format": "pt"}))
    write_whole(folder / "config.json", (json.dumps(config, indent=1) + "\n").encode())


def load_eagle(drafter: Eagle, folder: Path) -> None:
    """Takes the weights of an EAGLE checkpoint to go on from."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise TrainingError(f"{folder}: expected an EAGLE drafter with a model.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    expected = {name: tuple(tensor.shape) for name, tensor in drafter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise TrainingError(f"{path}: expected tensors {expected}, found {found}")
    drafter.load_state_dict(tensors)
