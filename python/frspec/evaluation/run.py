"""A run of an evaluation: what is planned before anything is loaded, then question by question."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .. import _core, hub
from ..errors import RequestError
from ..generator import plan_engine
from ..tokenizer import Tokenizer
from ..tree import Tree
from .fingerprint import file_fingerprint, folder_fingerprint
from .methods import PLAIN, Configuration
from .process_workers import ProcessWorkers
from .results import Record, ResultsFile
from .schedule import InlineWorker, Workers, run_jobs
from .tasks import TASKS, Question
from .worker import Job, Setup, chat_messages, mark_identity

_TELL_EVERY_S = 60.0  # where no terminal shows the progress


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the methods run: device, and whether all of them fit into its memory together."""

    device: str
    device_name: str  # for a CPU with its instruction set, on which the rounding depends
    max_context: int
    vocab_size: int
    trees: dict[str, Tree]  # of the methods that draft
    together: bool


def plan_methods(setup: Setup, methods: Iterable[Configuration], workers: str = "1") -> Plan:
    """Plans every generator before any is loaded: what is wrong with one ends the run here."""
    total, trees = 0, {}
    for method in methods:
        engine, _ = plan_engine(**setup.generator_options(method))
        total += sum(dict(engine.plan).values())
        if method.method != PLAIN:
            trees.setdefault(method.method, Tree(*engine.tree))  # of the first, largest head
    # Those of one machine share its memory; of a cluster each machine may have its own.
    sharing = workers.removeprefix("" if "RAY_ADDRESS" in os.environ else "ray:")
    if engine.device == "cpu" and sharing.isdecimal():
        total *= max(1, int(sharing))
    kind = engine.device.split(":")[0]
    device = next(d for d in _core.devices() if d["name"] == kind)
    available = device["available_bytes"]
    if setup.machine["memory_limit"] is not None:
        available = min(available, setup.machine["memory_limit"])
    words = device["description"].split(", ")
    name = ", ".join(words[:2] if kind == "cpu" else words[:1])
    fits = total <= available
    return Plan(engine.device, name, engine.max_context, engine.vocab_size, trees, fits)


def check_template(setup: Setup, questions: Sequence[Question]) -> None:
    """RequestError when the model's chat template is missing or refuses the questions' messages."""
    asked = next((question for question in questions if not question.raw), None)
    if asked is not None:
        Tokenizer.load(hub.resolve(setup.model)).chat(chat_messages(asked, asked.turns[:1]))


def make_header(
    setup: Setup, methods: Iterable[Configuration], plan: Plan, version: str, workers: str
) -> dict[str, Any]:
    """What results depend on. Tasks and --limit are not in it: a run may be extended."""
    drafters = {name: hub.resolve(folder) for name, folder in setup.drafters.items()}
    return {
        "model": setup.model,
        "model_fingerprint": folder_fingerprint(hub.resolve(setup.model)),
        "vocab_size": plan.vocab_size,
        "drafters": dict(setup.drafters),
        "drafter_fingerprints": {n: folder_fingerprint(path) for n, path in drafters.items()},
        "ranking": setup.ranking,
        "ranking_fingerprint": None
        if setup.ranking is None
        else file_fingerprint(Path(setup.ranking)),
        "methods": [method.name for method in methods],
        "request": dict(setup.request),
        "trees": {name: dataclasses.asdict(tree) for name, tree in plan.trees.items()},
        "medusa_choices": setup.medusa_choices,
        "device": plan.device.split(":")[0],
        "device_name": plan.device_name,
        "dtype": setup.machine["dtype"],
        "max_context": plan.max_context,
        "threads": setup.machine["threads"],
        "workers": workers,
        "versions": {"frspec": version},
    }


def generate(
    setup: Setup,
    methods: tuple[Configuration, ...],
    questions: Sequence[Question],
    results: ResultsFile,
    together: bool = True,
    workers: str = "1",
) -> list[Job]:
    """Puts the questions through the methods and adds to the results what is not there yet.

    together: all methods of a question one after the other, so that a machine that slows down for a
    while slows all of them down; else each method through all questions, for memory that holds one
    generator only. workers: "N", "ray" or "ray:N". Returns the jobs that had to be left out.
    """
    passes = [methods] if together else [(method,) for method in methods]
    if len(passes) > 1:
        say("memory does not hold all methods at once: one after the other through all questions")
    jobs_of_passes = [
        [job for question in questions if (job := _job(question, of_pass, results))]
        for of_pass in passes
    ]
    total = len(questions) * len(passes)
    left = sum(map(len, jobs_of_passes))
    if left < total:
        say(f"{total - left} of {total} jobs were done before")
    if not left:
        return []
    running = start_workers(setup, workers, left)
    left_out: list[Job] = []
    told = time.monotonic()
    try:
        with _progress() as progress:
            bar = progress.add_task("", total=total, completed=total - left)

            def done(job: Job, records: list[Record]) -> None:
                nonlocal told
                question = job.question
                plain = results.plain_ids(question.task, question.question_id)
                results.append(mark_identity(records, plain))
                label = f"{TASKS[question.task].label} {question.question_id}"
                progress.update(bar, description=label, advance=1)
                if progress.disable and time.monotonic() - told > _TELL_EVERY_S:
                    told = time.monotonic()
                    say(f"{progress.tasks[bar].completed:.0f} of {total} jobs done")

            # A pass ends before the next begins: later ones are compared with plain decoding.
            for jobs in jobs_of_passes:
                left_out += run_jobs(running, jobs, done, say)
    finally:
        running.close()
    return left_out


def _job(
    question: Question, methods: tuple[Configuration, ...], results: ResultsFile
) -> Job | None:
    """What is left to do of a question; None when nothing is."""
    key = (question.task, question.question_id)
    left = tuple(m for m in methods if not results.has(*key, m.name, question.fingerprint))
    return Job(question, left) if left else None


def start_workers(setup: Setup, workers: str, jobs: int) -> Workers:
    """workers: as in `generate`; never more processes than jobs."""
    kind, _, count = workers.partition(":")
    if kind == "ray" and (not count or count.isdecimal() and int(count)):
        from .ray_workers import RayWorkers

        return RayWorkers(setup, int(count) if count else None)
    if not workers.isdecimal() or not int(workers):
        raise RequestError(f"--workers: expected a number, ray or ray:N, found {workers!r}")
    number = min(int(workers), jobs)
    return InlineWorker(setup) if number == 1 else ProcessWorkers(setup, number)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.description}", markup=False),
        console=console,
        disable=not console.is_terminal,  # an unfinished bar would stand before an error's line
    )


def say(text: str) -> None:
    """A line for the user, on stderr."""
    print(f"frspec: {text}", file=sys.stderr)
