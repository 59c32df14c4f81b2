"""What each kind of drafter is trained to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .conversations import TrainingError
from .drafters import Eagle, KeysValues, Medusa, load_eagle, write_checkpoint
from .features import Cache, read_tensor
from .objective import Columns
from .training import Settings

_FEATURE_NOISE = 0.1  # of the features' deviation: a drafter reads its own guesses later
_FEATURE_LOSS = 0.5
_SECOND_LEVEL = 0.7  # weight of the loss of the second level beside the first's
_START_BATCHES = 60  # of the linear map that an EAGLE layer begins as


class TargetHead:
    """The target's matrices that drafters share: embedding and head [vocabulary, d], in bf16."""

    def __init__(self, folder: Path, device: str):
        self.config: dict[str, Any] = json.loads(
            (folder / "config.json").read_text(encoding="utf-8")
        )
        embedding = read_tensor(folder, "model.embed_tokens.weight")
        if embedding is None:
            raise TrainingError(f"{folder}: expected model.embed_tokens.weight, found none")
        head = read_tensor(folder, "lm_head.weight")
        self.embedding = embedding.to(device, torch.bfloat16)
        self.head = self.embedding if head is None else head.to(device, torch.bfloat16)


def _columns(target: TargetHead, cache: Cache, settings: Settings) -> Columns:
    counts = cache.counts(len(target.head))
    return Columns(target.head, counts, settings.frequent, settings.sampled)


class EagleTask:
    """Predict the next feature, and with it the target's distribution behind it."""

    def __init__(
        self, folder: Path, cache: Cache, settings: Settings, start_from: Path | None = None
    ):
        self.target = TargetHead(folder, settings.device)
        self.columns = _columns(self.target, cache, settings)
        self.drafter = Eagle(self.target.config).to(settings.device)
        self.rope = _rope_tables(folder, max(cache.lengths), settings.device)
        first = list(range(min(len(cache.lengths), 64)))
        features = cache.batch(first, settings.device)["features"].float()
        self.deviation = features[features.abs().sum(-1) > 0].std()
        if start_from is not None:
            load_eagle(self.drafter, start_from)
        else:
            self.drafter.start(*self._normal_equations(cache, settings))

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        features = batch["features"].float()
        noise = torch.rand(features.shape, generator=generator).to(features.device) - 0.5
        noisy = features + 2 * _FEATURE_NOISE * self.deviation * noise
        self.columns.draw(generator)
        hidden, committed = self._forward(batch, noisy)
        first = self._distance(hidden, batch)
        # The second level: every row but the first again, upon the feature that was predicted.
        guessed = torch.cat([features[:, :1], hidden.float()], 1)
        second, _ = self._forward(batch, guessed, committed)
        return first + _SECOND_LEVEL * self._distance(second, batch)

    def _distance(self, hidden: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Of what was predicted from the target's next features and their distributions."""
        probs, ids = batch["top_probs"][:, 1:], batch["top_ids"][:, 1:]
        taught = probs.sum(-1) > 0
        hidden, wanted = hidden[taught], batch["features"][:, 1:][taught].float()
        cross_entropy = self.columns.cross_entropy(hidden, ids[taught], probs[taught])
        features = functional.smooth_l1_loss(
            hidden.float() / self.deviation, wanted / self.deviation
        )
        return cross_entropy + _FEATURE_LOSS * features

    def agreement(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Of the first level, and of the second upon what the first one predicted."""
        features = batch["features"].float()
        hidden, committed = self._forward(batch, features)
        guessed = torch.cat([features[:, :1], hidden.float()], 1)
        levels = [hidden, self._forward(batch, guessed, committed)[0]]
        taught = batch["top_probs"][:, 1:].sum(-1) > 0
        wanted = batch["top_ids"][:, 1:, 0][taught]
        hits = [
            ((level[taught].to(torch.bfloat16) @ self.target.head.T).argmax(-1) == wanted).sum()
            for level in levels
        ]
        return torch.stack(hits), len(wanted)

    def save(self, folder: Path) -> None:
        write_checkpoint(folder, self.drafter.state_dict(), self.drafter.config)

    def _forward(
        self, batch: dict[str, Tensor], features: Tensor, committed: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Rows with the token behind each position and its feature, the last position aside."""
        embedded = self.target.embedding[batch["tokens"][:, 1:]].float()
        rows = embedded.shape[1]
        rope = tuple(table[:rows] for table in self.rope)
        return self.drafter(embedded, features[:, :-1], rope, committed)

    def _normal_equations(self, cache: Cache, settings: Settings) -> tuple[Tensor, Tensor]:
        gram, product = 0.0, 0.0
        generator = torch.Generator().manual_seed(settings.seed)
        chosen = torch.randperm(len(cache.lengths), generator=generator)[: 8 * _START_BATCHES]
        for index in chosen.tolist():
            batch = cache.batch([index], settings.device)
            embedded = self.target.embedding[batch["tokens"][0, 1:]].float()
            features = batch["features"][0].float()
            ones = torch.ones_like(features[:-1, :1])
            x = torch.cat([embedded, features[:-1], ones], 1)
            gram = gram + (x.T @ x).double()
            product = product + (x.T @ features[1:]).double()
        return gram.cpu(), product.cpu()


class MedusaTask:
    """Head h predicts the target's distribution h + 1 tokens behind the next one."""

    def __init__(self, folder: Path, cache: Cache, settings: Settings, heads: int):
        self.target = TargetHead(folder, settings.device)
        self.columns = _columns(self.target, cache, settings)
        hidden = self.target.head.shape[1]
        drafter = Medusa(heads, hidden, self.columns.frequent_rows)
        self.drafter = drafter.to(settings.device)

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        self.columns.draw(generator)
        losses = []
        for head, rows in enumerate(self.drafter.rows):
            hidden, ids, probs = self._rows(batch, head)
            losses.append(self.columns.cross_entropy(hidden, ids, probs, rows))
        return torch.stack(losses).mean()

    def agreement(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        hits = []
        for head, rows in enumerate(self.drafter.rows):
            hidden, ids, _ = self._rows(batch, head)
            logits = hidden.to(torch.bfloat16) @ self.target.head.T
            trained = hidden.to(torch.bfloat16) @ rows.to(torch.bfloat16).T
            logits[:, self.columns.frequent] = trained
            hits.append((logits.argmax(-1) == ids[:, 0]).sum())
        return torch.stack(hits), int((batch["top_probs"][:, 1:].sum(-1) > 0).sum())

    def save(self, folder: Path) -> None:
        tensors = self.drafter.checkpoint(self.target.head, self.columns.frequent)
        write_checkpoint(folder, tensors, self.drafter.config)

    def _rows(self, batch: dict[str, Tensor], head: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden [n, d], and the target's tokens and probabilities [n, K] as many rows later."""
        ahead = head + 1
        probs = batch["top_probs"][:, ahead:]
        taught = probs.sum(-1) > 0
        features = batch["features"][:, :-ahead].float()[taught]
        return self.drafter(features, head), batch["top_ids"][:, ahead:][taught], probs[taught]


def _rope_tables(folder: Path, length: int, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin [length, head_dim] of the target's rotary embedding, its scaling included."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    return cos[0].to(device), sin[0].to(device)
