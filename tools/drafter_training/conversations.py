"""Conversations as token sequences, with the tokens that the target has to write marked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frspec.errors import FrspecError, RequestError
from frspec.tokenizer import Tokenizer

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
          "system": "system"}  # fmt: skip


class TrainingError(FrspecError):
    """Data, a cache or a checkpoint that training cannot use."""


@dataclass
class Skipped:
    """Lines that are no conversations."""

    count: int = 0
    first: str = ""  # what is wrong with the first of them

    def __str__(self) -> str:
        lines = "a line" if self.count == 1 else f"{self.count} lines"
        return f"skipped {lines} without a conversation ({self.first})"


@dataclass
class Sequence:
    tokens: np.ndarray  # int32 [n]
    written: np.ndarray  # bool [n]: of an answer, so that the target predicts it


def read_conversations(
    path: Path, skipped: Skipped | None = None
) -> Iterator[list[dict[str, str]]]:
    """Chat messages of each line: {"conversations": [{"from", "value"}]} as in ShareGPT, or
    {"messages": [{"role", "content"}]}. Lines of another kind are counted in `skipped`; without
    it they are an error that names them."""
    if not path.is_file():
        raise TrainingError(f"{path}: no such file of conversations")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.isspace():
                continue
            messages = _messages(line)
            if messages is not None:
                yield messages
                continue
            wrong = (
                f"{path}:{number}: expected an object with conversations"
                ' ([{"from", "value"}, ...]) or messages ([{"role", "content"}, ...])'
            )
            if skipped is None:
                raise TrainingError(wrong)
            skipped.first = skipped.first or wrong
            skipped.count += 1


def _messages(line: bytes) -> list[dict[str, str]] | None:
    """None when the line has none."""
    try:
        record = json.loads(line)
        turns = record["conversations" if "conversations" in record else "messages"]
        return [_message(turn) for turn in turns]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _message(turn: dict[str, Any]) -> dict[str, str]:
    role = turn.get("from") or turn["role"]
    content = turn["value"] if "value" in turn else turn["content"]
    return {"role": _ROLES.get(role, role), "content": str(content)}


def first_question(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages up to the first answer; empty when there is no user among them."""
    question = []
    for message in messages:
        if message["role"] == "assistant":
            break
        question.append(message)
    return question if question and question[-1]["role"] == "user" else []


def tokenize(
    tokenizer: Tokenizer, messages: list[dict[str, str]], max_tokens: int
) -> Sequence | None:
    """A conversation in the model's chat template, cut to max_tokens; None when nothing in it is
    an answer, or the template has no form for it.

    Prompts and answers are encoded apart, as they are when a text is generated.
    """
    tokens: list[int] = []
    written: list[bool] = []
    done = ""  # text of the turns so far
    try:
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = tokenizer.chat(messages[:end])
            whole = tokenizer.chat(messages[: end + 1], add_generation_prompt=False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                return None  # a template that rewrites earlier turns
            for text, is_answer in ((prompt[len(done) :], False), (whole[len(prompt) :], True)):
                ids = tokenizer.encode(text, add_special_tokens=False)
                tokens += ids
                written += [is_answer] * len(ids)
            done = whole
            if len(tokens) >= max_tokens:
                break
    except RequestError:
        return None
    written = written[:max_tokens]
    if not any(written):
        return None
    return Sequence(np.array(tokens[:max_tokens], np.int32), np.array(written, bool))
