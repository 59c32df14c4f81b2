"""The training loop: batches by tokens, AdamW on a cosine schedule, a checkpoint to go on from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.progress import Progress
from torch import Tensor, nn

from frspec.files import write_whole

from .conversations import TrainingError
from .features import Cache, batches

_CHECKPOINT = ".training.pt"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a training run, the cache and the drafter aside."""

    epochs: float
    minutes: float  # of training, 0: no limit; the schedule ends with whichever comes first
    batch_tokens: int
    learning_rate: float
    frequent: int  # columns of the objective: the most frequent tokens
    sampled: int  # and others, drawn for each batch
    seed: int
    device: str


class Task(Protocol):
    """A drafter and its loss."""

    drafter: nn.Module

    def loss(self, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor: ...

    def agreement(self, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """How often each head's best token is the target's: hits [heads], and of how many rows."""
        ...

    def save(self, folder: Path) -> None: ...


def shuffled_batches(cache: Cache, settings: Settings, epoch: int) -> list[list[int]]:
    """An epoch's batches: sequences of like lengths together, in an order of its own."""
    generator = torch.Generator().manual_seed(settings.seed * 1000 + epoch)
    order = torch.randperm(len(cache.lengths), generator=generator).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), 256):
        pool = sorted(order[start : start + 256], key=cache.lengths.__getitem__)
        lengths = [cache.lengths[index] for index in pool]
        found += [[pool[i] for i in batch] for batch in batches(lengths, settings.batch_tokens)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def agreement(task: Task, held_out: Cache, settings: Settings) -> list[float]:
    """Share of held-out positions at which each head's best token is the target's."""
    hits, rows = torch.zeros(1), 0
    for indices in batches(held_out.lengths, settings.batch_tokens):
        batch = held_out.batch(indices, settings.device)
        with torch.inference_mode(), _autocast(settings):
            found, n = task.agreement(batch)
        hits, rows = hits + found.cpu(), rows + n
    return (hits / max(rows, 1)).tolist()


def train(
    task: Task,
    cache: Cache,
    held_out: Cache,
    settings: Settings,
    recipe: dict[str, Any],
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Trains and saves; returns what it did. A run that was ended goes on from its checkpoint."""
    run = Run(task, settings, recipe, out)
    run.resume()
    total = int(settings.epochs * cache.tokens)
    bar = progress.add_task("training", total=total, completed=run.tokens)
    for epoch, number, indices in _from(cache, settings, run):
        done = max(
            run.tokens / total, run.seconds / 60 / settings.minutes if settings.minutes else 0
        )
        if done >= 1:
            break
        began = time.perf_counter()
        loss = run.step(cache.batch(indices, settings.device), done)
        run.tokens += sum(cache.lengths[index] for index in indices)
        run.seconds += time.perf_counter() - began
        run.epoch, run.batch = epoch, number + 1
        progress.update(bar, completed=run.tokens, description=f"training, loss {loss:.3f}")
        if run.due():
            run.checkpoint()
            shares = agreement(task, held_out, settings)
            progress.console.print(
                f"{run.tokens / 1e6:.2f} M tokens, {run.tokens / run.seconds:.0f} a second:"
                f" loss {loss:.3f}, held-out agreement {_percent(shares)}"
            )
    progress.update(bar, completed=total)
    run.checkpoint()  # what comes now takes a while, and may be ended, too
    report = recipe | {
        "settings": dataclasses.asdict(settings),
        "tokens_seen": run.tokens,
        "training_s": run.seconds,
        "held_out_agreement": agreement(task, held_out, settings),
    }
    task.save(out)
    write_whole(out / "training.json", (json.dumps(report, indent=1) + "\n").encode())
    (out / _CHECKPOINT).unlink(missing_ok=True)  # last: until here the same command goes on
    progress.console.print(f"held-out agreement {_percent(report['held_out_agreement'])}")
    return report


def _from(cache: Cache, settings: Settings, run: Run) -> Iterator[tuple[int, int, list[int]]]:
    """(epoch, number, sequences) of the batches that are left."""
    for epoch in range(run.epoch, math.ceil(settings.epochs)):
        found = shuffled_batches(cache, settings, epoch)
        first = run.batch if epoch == run.epoch else 0
        for number in range(first, len(found)):
            yield epoch, number, found[number]


class Run:
    """The state of a training run that its checkpoint holds."""

    def __init__(self, task: Task, settings: Settings, recipe: dict[str, Any], out: Path):
        self.task, self.settings, self.recipe, self.out = task, settings, recipe, out
        self.optimizer = torch.optim.AdamW(
            task.drafter.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0
        )
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.epoch = self.batch = self.steps = self.tokens = 0
        self.seconds = 0.0
        self._saved = time.monotonic()

    def step(self, batch: dict[str, Tensor], done: float) -> float:
        """One batch; done: share of the schedule behind it."""
        warm = min(1.0, (self.steps + 1) / 50)
        cosine = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * warm * cosine
        with _autocast(self.settings):
            loss = self.task.loss(batch, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.task.drafter.parameters(), 1.0)
        self.optimizer.step()
        self.steps += 1
        return loss.item()

    def due(self) -> bool:
        """Two minutes have passed since the latest checkpoint."""
        return time.monotonic() - self._saved > 120

    def checkpoint(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "identity": self._identity(),
            "drafter": self.task.drafter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "progress": (self.epoch, self.batch, self.steps, self.tokens, self.seconds),
        }
        data = io.BytesIO()
        torch.save(state, data)
        write_whole(self.out / _CHECKPOINT, data.getvalue())
        self._saved = time.monotonic()

    def resume(self) -> None:
        """Goes on from the checkpoint if there is one; TrainingError for another run's."""
        path = self.out / _CHECKPOINT
        if not path.is_file():
            if (self.out / "model.safetensors").exists():
                raise TrainingError(f"{self.out}: expected a new folder, found a drafter in it")
            return
        state = torch.load(path, map_location=self.settings.device, weights_only=True)
        if state["identity"] != self._identity():
            raise TrainingError(
                f"{self.out}: expected a run of {self._identity()}, found one of"
                f" {state['identity']}"
            )
        self.task.drafter.load_state_dict(state["drafter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch, self.batch, self.steps, self.tokens, self.seconds = state["progress"]

    def _identity(self) -> str:
        return json.dumps(self.recipe | dataclasses.asdict(self.settings), sort_keys=True)


def _autocast(settings: Settings) -> torch.autocast:
    return torch.autocast(settings.device.split(":")[0], torch.bfloat16)


def _percent(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.1f} %" for share in shares)
