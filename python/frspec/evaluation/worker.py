"""A worker's part: one question through all methods, in one process, one after the other."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import RequestError
from ..generator import Generator, Result
from ..medusa import MedusaChoices
from ..tree import Tree
from .methods import PLAIN, Configuration
from .pool import GeneratorPool
from .results import Record
from .tasks import TASKS, Question

_WARM_UP_TOKENS = 8


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that a worker needs to know; it travels to other processes and machines.

    machine: device, dtype, max_context, memory_limit, threads of Generator. request: the sampling
    parameters and stop strings of `Generator.generate`, and max_new_tokens, None: the task's own.
    """

    model: str
    drafters: Mapping[str, str]
    ranking: str | None
    machine: Mapping[str, Any]
    tree: Tree | None
    request: Mapping[str, Any]
    medusa_choices: MedusaChoices | None = None

    def on(self, **machine: Any) -> Setup:
        """The same with another device or number of threads."""
        return dataclasses.replace(self, machine=dict(self.machine) | machine)

    def generator_options(self, configuration: Configuration) -> dict[str, Any]:
        """The arguments of Generator and plan_engine; plain decoding has no drafter in memory."""
        options = {"model": self.model, "tree": self.tree, **self.machine}
        if configuration.method != PLAIN:
            options["drafter"] = self.drafters[configuration.method]
            if configuration.method == "medusa":
                options["medusa_choices"] = self.medusa_choices
            if configuration.vocab_size is not None:
                options |= {"ranking": self.ranking, "vocab_size": configuration.vocab_size}
        return options


@dataclasses.dataclass(frozen=True)
class Job:
    """A question and the methods that it is still to be put through, plain decoding first."""

    question: Question
    configurations: tuple[Configuration, ...]


class Worker:
    """What one process generates, with a generator for each configuration."""

    def __init__(self, setup: Setup):
        self._setup = setup
        self._generators = GeneratorPool(self._load, self._warm_up)
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def run(self, job: Job) -> list[Record]:
        """The records of a question, in the order of methods and turns."""
        records: list[Record] = []
        for configuration in job.configurations:
            records += self._ask(job.question, configuration)
        return records

    def _ask(self, question: Question, configuration: Configuration) -> list[Record]:
        generator = self._generators.get(configuration)
        request = dict(self._setup.request)
        request["max_new_tokens"] = (
            request.get("max_new_tokens") or TASKS[question.task].max_new_tokens
        )
        messages = chat_messages(question)
        records = []
        for turn, text in enumerate(question.turns, 1):
            messages.append(_message("user", text))
            record = _describe(question, configuration, turn) | {"worker": self._name}
            try:
                result = generator.generate(
                    text if question.raw else messages, method=configuration.method, **request
                )
            except RequestError as error:
                # A prompt longer than the context, say: the others go on, the report tells of it.
                records.append(record | {"error": str(error)})
                break
            records.append(record | measure(result))
            # Stripped, as the paper's code gives it back.
            messages.append(_message("assistant", result.text.strip()))
        return records

    def _load(self, configuration: Configuration) -> Generator:
        return Generator(**self._setup.generator_options(configuration))

    def _warm_up(self, generator: Generator, configuration: Configuration) -> None:
        # With the sampling parameters: one that is refused is so here, not question by question.
        request = dict(self._setup.request)
        request |= {"max_new_tokens": _WARM_UP_TOKENS, "ignore_eos": True}
        generator.generate([1], method=configuration.method, **request)


def measure(result: Result) -> Record:
    """What is kept of a generated text. Seconds as in `Timings`."""
    timings = result.timings
    ids = np.asarray(result.token_ids, np.int32).tobytes()
    return {
        "tokens": len(result.token_ids),
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused_tokens,
        "accept_lengths": result.accept_lengths,
        "prefill_s": timings.prefill_s,
        "decode_s": timings.decode_s,
        "draft_s": timings.draft_s,
        "verify_s": timings.verify_s,
        "rest_s": timings.rest_s,
        "finish_reason": result.finish_reason,
        "token_ids_sha256": hashlib.sha256(ids).hexdigest(),
        "text": result.text,
        "device": result.device,
    }


def chat_messages(question: Question, turns: Sequence[str] = ()) -> list[dict[str, str]]:
    """The conversation before the first answer: the system message, and the turns given."""
    system = [] if question.system is None else [_message("system", question.system)]
    return system + [_message("user", turn) for turn in turns]


def mark_identity(records: list[Record], plain_ids: Mapping[int, str]) -> list[Record]:
    """Adds same_as_plain to the records of a job; plain_ids: turn to fingerprint, of earlier ones.

    It is None where plain decoding was not run.
    """
    plain = dict(plain_ids) | {
        record["turn"]: record["token_ids_sha256"]
        for record in records
        if record["method"] == PLAIN and "token_ids_sha256" in record
    }
    return [
        record | {"same_as_plain": record["token_ids_sha256"] == plain[record["turn"]]}
        if "token_ids_sha256" in record and record["turn"] in plain
        else record | {"same_as_plain": None}
        for record in records
    ]


def _describe(question: Question, configuration: Configuration, turn: int) -> Record:
    record = {
        "task": question.task,
        "question_id": question.question_id,
        "question": question.fingerprint,
        "category": question.category,
        "turn": turn,
        "method": configuration.name,
    }
    return record if question.reference is None else record | {"reference": question.reference}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
