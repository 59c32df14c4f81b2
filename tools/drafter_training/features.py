"""What a drafter learns from, cached on disk: the target's hidden states and best tokens.

A cache is a folder of `part-NNNNN.safetensors`, each with some hundred sequences one behind the
other (N tokens in all):

    tokens    int32 [N]
    starts    int64 [sequences + 1]   where each sequence begins, and the end
    features  bf16 [N, d]             the target's hidden states after its final norm
    top_ids   int32 [N, K]            the K likeliest next tokens
    top_probs fp16 [N, K]             their probabilities; 0 where the target writes nothing

`cache.json` says what it was made of. Parts named `held-out-NNNNN.safetensors` are for measuring:
no drafter is trained on them; `held-out-NNNNN.jsonl` has their conversations.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save

from frspec.files import write_whole
from frspec.tokenizer import Tokenizer

from .conversations import (
    Sequence,
    Skipped,
    TrainingError,
    first_question,
    read_conversations,
    tokenize,
)

TOP = 16  # tokens kept of the target's distribution
HELD_OUT_EVERY = 50  # one first question of so many is held out
_PART_TOKENS = 32768
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Recipe:
    """What decides a cache's content."""

    model: str  # folder
    data: list[str]  # files of conversations
    max_tokens: int  # of a sequence
    min_ascii: float  # share of ASCII characters below which a conversation is left out


class Target:
    """The target in PyTorch: hidden states and best tokens of whole sequences."""

    def __init__(self, folder: str, device: str):
        from transformers import AutoModelForCausalLM

        self.device = device
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, batch: list[Sequence]) -> list[dict[str, torch.Tensor]]:
        longest = max(len(sequence.tokens) for sequence in batch)
        tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, sequence in enumerate(batch):  # padding behind a sequence does not reach it
            tokens[row, : len(sequence.tokens)] = torch.from_numpy(sequence.tokens)
        hidden = self.model.model(tokens.to(self.device), use_cache=False).last_hidden_state
        return [self._teach(hidden[row], sequence) for row, sequence in enumerate(batch)]

    def _teach(self, hidden: torch.Tensor, sequence: Sequence) -> dict[str, torch.Tensor]:
        n = len(sequence.tokens)
        features = hidden[:n]
        teaches = torch.zeros(n, dtype=torch.bool)
        teaches[:-1] = torch.from_numpy(sequence.written[1:])
        teaches[-1] = bool(sequence.written[-1])  # an answer that was cut goes on
        logits = self.model.lm_head(features[teaches.to(self.device)]).float()
        top = logits.topk(TOP, dim=-1)
        probs = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
        top_ids = torch.zeros(n, TOP, dtype=torch.int32)
        top_probs = torch.zeros(n, TOP, dtype=torch.float16)
        top_ids[teaches] = top.indices.to(torch.int32).cpu()
        top_probs[teaches] = probs.to(torch.float16).cpu()
        return {
            "tokens": torch.from_numpy(sequence.tokens),
            "features": features.to(torch.bfloat16).cpu(),
            "top_ids": top_ids,
            "top_probs": top_probs,
        }


def write_cache(
    folder: Path,
    recipe: Recipe,
    tokens_wanted: int,
    device: str,
    progress: Progress,
    skipped: Skipped | None = None,
) -> None:
    """Fills a cache up to tokens_wanted; one that was begun with the same recipe goes on.

    TrainingError when it was begun with another one. skipped: as in read_conversations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_path = folder / "cache.json"
    state = {"recipe": vars(recipe), "conversations": 0, "tokens": 0, "parts": 0}
    if state_path.is_file():
        found = json.loads(state_path.read_text(encoding="utf-8"))
        if found["recipe"] != state["recipe"]:
            raise TrainingError(
                f"{folder}: expected a cache of {state['recipe']}, found one of {found['recipe']}"
            )
        state = found
    if state["tokens"] >= tokens_wanted:
        return
    task = progress.add_task("features", total=tokens_wanted, completed=state["tokens"])
    target = Target(recipe.model, device)
    tokenizer = Tokenizer.load(recipe.model)
    pool: dict[bool, list[Sequence]] = {False: [], True: []}
    held: list[str] = []

    def flush() -> None:
        """Writes both kinds of part, then the state that counts them."""
        if not any(pool.values()):
            return
        number = f"{state['parts']:05}"
        write_whole(folder / f"held-out-{number}.jsonl", "".join(held).encode())
        held.clear()
        for is_held_out, sequences in pool.items():
            if sequences:
                name = "held-out" if is_held_out else "part"
                _write_part(folder / f"{name}-{number}.safetensors", target, sequences)
                sequences.clear()
        state["parts"] += 1
        write_whole(state_path, json.dumps(state, indent=1).encode())
        progress.update(task, completed=state["tokens"])

    for index, messages in enumerate(_all_conversations(recipe.data, skipped)):
        if index < state["conversations"]:
            continue
        text = "".join(message["content"] for message in messages)
        ascii_share = sum(map(str.isascii, text)) / max(len(text), 1)
        sequence = None
        if ascii_share >= recipe.min_ascii:
            sequence = tokenize(tokenizer, messages, recipe.max_tokens)
        state["conversations"] = index + 1
        if sequence is None:
            continue
        is_held_out = holds_out(messages)
        pool[is_held_out].append(sequence)
        if is_held_out:
            held.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        state["tokens"] += len(sequence.tokens)
        if sum(len(s.tokens) for s in pool[False]) >= _PART_TOKENS:
            flush()
            if state["tokens"] >= tokens_wanted:
                return
    flush()


def holds_out(messages: list[dict[str, str]]) -> bool:
    """By the first question alone: what is asked twice must not be trained on and measured, too."""
    question = json.dumps(first_question(messages) or messages[:1], sort_keys=True)
    return (
        int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") % HELD_OUT_EVERY == 0
    )


def _all_conversations(files: list[str], skipped: Skipped | None) -> Iterator[list[dict[str, str]]]:
    for file in files:
        yield from read_conversations(Path(file), skipped)


def _write_part(path: Path, target: Target, sequences: list[Sequence]) -> None:
    sequences.sort(key=lambda sequence: len(sequence.tokens))
    rows: list[dict[str, torch.Tensor]] = []
    for batch in batches([len(sequence.tokens) for sequence in sequences], _BATCH_TOKENS):
        rows += target([sequences[index] for index in batch])
    tensors = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    lengths = [len(row["tokens"]) for row in rows]
    tensors["starts"] = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int64))
    write_whole(path, save(tensors))


def batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Consecutive indices whose padded rows hold at most `tokens`, or one row."""
    batch: list[int] = []
    longest = 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        if batch and longest * (len(batch) + 1) > tokens:
            yield batch
            batch, longest = [], length
        batch.append(index)
    if batch:
        yield batch


class Cache:
    """Sequences of a cache, read from mapped files as they are asked for."""

    def __init__(self, folder: Path, held_out: bool = False):
        pattern = "held-out-*.safetensors" if held_out else "part-*.safetensors"
        self._files = [safe_open(path, "pt") for path in sorted(folder.glob(pattern))]
        if not self._files:
            raise TrainingError(f"{folder}: expected a cache of `features`, found no {pattern}")
        self._where: list[tuple[int, int, int]] = []  # file, first row, end
        for number, file in enumerate(self._files):
            starts = file.get_tensor("starts").tolist()
            self._where += [(number, *ends) for ends in zip(starts[:-1], starts[1:], strict=True)]
        self.lengths = [end - start for _, start, end in self._where]
        self.tokens = sum(self.lengths)

    def counts(self, vocab_size: int) -> torch.Tensor:
        """How often the target is likeliest to write each token: float32 [vocab_size]."""
        counts = torch.zeros(vocab_size)
        for file in self._files:
            ids = file.get_tensor("top_ids").long().flatten()
            counts.index_add_(0, ids, file.get_tensor("top_probs").float().flatten())
        return counts

    def batch(self, indices: list[int], device: str) -> dict[str, torch.Tensor]:
        """Sequences padded to the longest: tokens [B, T], features [B, T, d], top_ids and
        top_probs [B, T, K], the padding with probability 0."""
        longest = max(self.lengths[index] for index in indices)
        found: dict[str, list[torch.Tensor]] = {}
        for index in indices:
            number, start, end = self._where[index]
            for name in ("tokens", "features", "top_ids", "top_probs"):
                rows = self._files[number].get_slice(name)[start:end]
                padding = [0, 0] * (rows.dim() - 1) + [0, longest - (end - start)]
                found.setdefault(name, []).append(torch.nn.functional.pad(rows, padding))
        tensors = {name: torch.stack(rows).to(device) for name, rows in found.items()}
        tensors["tokens"] = tensors["tokens"].long()
        tensors["top_ids"] = tensors["top_ids"].long()
        tensors["top_probs"] = tensors["top_probs"].float()
        return tensors


def read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    """A tensor of a model folder (one file or shards with an index), None when it has none."""
    index = folder / "model.safetensors.index.json"
    file_name = "model.safetensors"
    if not (folder / file_name).is_file():
        file_name = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(name)
        if file_name is None:
            return None
    with safe_open(folder / file_name, "pt") as file:
        return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
