"""Numbers of the tables, out of the records of results files.

As the paper's code has it (evaluation/mt_bench/speed_mt_bench.py): the accept length of a task is
the mean over all its rounds; tokens/s is the mean over its questions of tokens over seconds, both
summed over a question's turns; a speed-up is the ratio of two such means; the average of a row is
the mean of its tasks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from .methods import PLAIN, Configuration
from .results import Record
from .scoring import gsm8k_answer
from .tasks import TASKS

Questions = dict[tuple[str, str], list[Record]]  # (task, question_id) to turns


@dataclasses.dataclass(frozen=True)
class Identity:
    """How many texts are the ones of plain decoding."""

    same: int
    compared: int

    def __str__(self) -> str:
        if not self.compared:
            return "not compared"
        some = f"{self.same} of {self.compared}"
        return f"all {self.same}" if self.same == self.compared else some


class Run:
    """The results of one file. name: what it is called where several are compared."""

    def __init__(self, name: str, header: dict[str, Any], records: Sequence[Record]):
        self.name = name
        self.header = header
        self.records = [record for record in records if "error" not in record]
        self.errors = [record for record in records if "error" in record]
        found = {record["method"] for record in records}
        named = [name for name in header.get("methods", []) if name in found]
        self.methods = [Configuration.parse(name) for name in named]
        present = {record["task"] for record in self.records}
        self.tasks = [task for task in TASKS.values() if task.name in present]

    @cached_property
    def _by_method(self) -> dict[str, Questions]:
        """Questions that every method has answered to the end: only these are comparable."""
        failed = {(record["task"], record["question_id"]) for record in self.errors}
        found: dict[str, Questions] = {}
        for record in self.records:
            key = (record["task"], record["question_id"])
            if key not in failed:
                found.setdefault(record["method"], {}).setdefault(key, []).append(record)
        if found:
            common = set.intersection(*(set(questions) for questions in found.values()))
            for method, questions in found.items():
                found[method] = {key: questions[key] for key in questions if key in common}
        return found

    def questions(self, method: Configuration, task: str | None = None) -> list[list[Record]]:
        """The turns of each question of a task, or of all tasks."""
        of_method = self._by_method.get(method.name, {})
        return [turns for key, turns in of_method.items() if task in (None, key[0])]

    def accept_length(self, method: Configuration, task: str) -> float | None:
        """Mean number of tokens that a round gave; None without a round."""
        questions = self.questions(method, task)
        return _mean(n for turns in questions for record in turns for n in record["accept_lengths"])

    def tokens_per_s(
        self, method: Configuration, task: str, with_prompt: bool = True
    ) -> float | None:
        """with_prompt: over the whole time of a question, as in the paper's code; else tokens
        after the first over the seconds after it."""
        rates = []
        for turns in self.questions(method, task):
            if with_prompt:
                tokens = sum(record["tokens"] for record in turns)
                seconds = sum(record["prefill_s"] + record["decode_s"] for record in turns)
            else:
                tokens = sum(sum(record["accept_lengths"]) for record in turns)
                seconds = sum(record["decode_s"] for record in turns)
            if tokens and seconds > 0:
                rates.append(tokens / seconds)
        return _mean(rates)

    def speed_up(self, method: Configuration, task: str, with_prompt: bool = True) -> float | None:
        """tokens_per_s over that of plain decoding; None where that was not run."""
        own = self.tokens_per_s(method, task, with_prompt)
        plain = self.tokens_per_s(Configuration(PLAIN), task, with_prompt)
        return own / plain if own and plain else None

    def average(self, value: Callable[..., float | None], method: Configuration, *args: Any):
        """The mean of a statistic over the tasks that have it; None where none has.

        GSM8K is not among the paper's seven tasks: it counts only where nothing else was run.
        """
        tasks = [task for task in self.tasks if task.name != "gsm8k"] or self.tasks
        values = [value(method, task.name, *args) for task in tasks]
        return _mean(each for each in values if each is not None)

    def identity(self, method: Configuration) -> Identity:
        compared = [
            record["same_as_plain"]
            for record in self.records
            if record["method"] == method.name and record.get("same_as_plain") is not None
        ]
        return Identity(sum(compared), len(compared))

    def time_shares(self, method: Configuration) -> dict[str, float]:
        """Seconds per generated token by what they went into, over all tasks."""
        records = [record for turns in self.questions(method) for record in turns]
        tokens = sum(sum(record["accept_lengths"]) for record in records)
        names = ("draft_s", "verify_s", "rest_s")
        return {n: sum(r[n] for r in records) / tokens if tokens else 0.0 for n in names}

    def gsm8k_accuracy(self, method: Configuration) -> float | None:
        """Share of right answers in [0, 1]."""
        answers = [turns[0] for turns in self.questions(method, "gsm8k")]
        return _mean(gsm8k_answer(record["text"]) == record["reference"] for record in answers)

    def has_plain(self) -> bool:
        return any(method.method == PLAIN for method in self.methods)


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
