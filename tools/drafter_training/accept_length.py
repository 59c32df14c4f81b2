"""Accept length on held-out questions, as frspec itself writes the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.progress import Progress

import frspec

from .conversations import TrainingError, first_question, read_conversations


def measure(
    model: Path,
    drafter: Path,
    cache: Path,
    tree: frspec.Tree | None,
    limit: int,
    max_new_tokens: int,
    temperature: float,
    progress: Progress,
) -> dict[str, Any]:
    """Mean tokens a round of greedy or sampled answers to the cache's held-out questions."""
    questions = []
    for path in sorted(cache.glob("held-out-*.jsonl")):
        questions += [first_question(messages) for messages in read_conversations(path)]
    questions = [question for question in questions if question][:limit]
    if not questions:
        raise TrainingError(f"{cache}: expected held-out conversations with a question, found none")
    generator = frspec.Generator(model, drafter, tree=tree)
    tokens = rounds = 0
    for question in progress.track(questions, description="answers"):
        try:
            result = generator.generate(
                question, max_new_tokens=max_new_tokens, temperature=temperature
            )
        except frspec.RequestError:  # longer than the context
            continue
        tokens += sum(result.accept_lengths)
        rounds += len(result.accept_lengths)
    return {"questions": len(questions), "rounds": rounds, "accept_length": tokens / max(rounds, 1)}


def write_answers(
    model: Path,
    questions: Path,
    out: Path,
    max_new_tokens: int,
    temperature: float,
    limit: int | None,
    progress: Progress,
) -> None:
    """The target's own answers to the first question of each conversation, as JSON lines.

    Lines that `out` holds already are not written again.
    """
    asked = [first_question(messages) for messages in read_conversations(questions)]
    asked = [question for question in asked if question][:limit]
    done = out.read_bytes() if out.is_file() else b""
    whole = done[: done.rfind(b"\n") + 1]  # without what a killed run left of a line
    generator = frspec.Generator(model)
    task = progress.add_task("answers", total=len(asked), completed=whole.count(b"\n"))
    with out.open("r+b" if done else "wb") as file:
        file.truncate(len(whole))
        file.seek(len(whole))
        for index in range(whole.count(b"\n"), len(asked)):
            messages = asked[index]
            try:
                result = generator.generate(
                    messages, max_new_tokens=max_new_tokens, temperature=temperature, seed=index
                )
                messages = [*messages, {"role": "assistant", "content": result.text}]
            except frspec.RequestError:
                pass  # longer than the context: the line is there, and teaches nothing
            line = json.dumps({"messages": messages}, ensure_ascii=False)
            file.write(line.encode() + b"\n")
            file.flush()
            progress.advance(task)
