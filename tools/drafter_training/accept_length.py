"""Accept length on held-out questions, as frspec itself writes the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import Progress

import frspec

from .conversations import TrainingError, first_question, read_conversations


def measure(
    model: Path,
    drafter: Path,
    cache: Path,
    drafting: dict[str, Any],
    limit: int,
    max_new_tokens: int,
    temperature: float,
    progress: Progress,
) -> dict[str, Any]:
    """Mean tokens a round of greedy or sampled answers to the cache's held-out questions.

    drafting: tree, ranking and vocab_size of frspec.Generator.
    """
    questions = []
    for path in sorted(cache.glob("held-out-*.jsonl")):
        questions += [first_question(messages) for messages in read_conversations(path)]
    questions = [question for question in questions if question][:limit]
    if not questions:
        raise TrainingError(f"{cache}: expected held-out conversations with a question, found none")
    generator = frspec.Generator(model, drafter, **drafting)
    tokens = rounds = asked = 0
    for question in progress.track(questions, description="answers"):
        try:
            result = generator.generate(
                question, max_new_tokens=max_new_tokens, temperature=temperature
            )
        except frspec.RequestError:  # longer than the context
            continue
        asked += 1
        tokens += sum(result.accept_lengths)
        rounds += len(result.accept_lengths)
    return {"questions": asked, "rounds": rounds, "accept_length": tokens / max(rounds, 1)}
