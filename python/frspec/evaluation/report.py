"""Markdown tables in the manner of the paper's: methods in rows, tasks in columns, an average."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import write_whole
from .methods import LABELS, Configuration
from .statistics import Run

FILE_NAME = "report.md"

Cell = Callable[[Configuration, str], str]


def markdown(
    runs: Sequence[Run], passes: Mapping[str, Mapping[str, float]], plots: Mapping[str, str]
) -> str:
    """The report of one run, or of several compared.

    passes: name of a run to HumanEval's pass@1 by method. plots: file name to what it shows.
    """
    parts = ["# Evaluation"]
    if len(runs) > 1:
        parts += ["## Comparison", comparison_table(runs)]
    for run in runs:
        level = "##"
        if len(runs) > 1:
            parts.append(f"## {run.name}")
            level = "###"
        parts += _run_parts(run, passes.get(run.name, {}), level)
    if plots:
        parts.append("## Plots")
        parts += [f"![{title}]({name})" for name, title in plots.items()]
    return "\n\n".join(parts) + "\n"


def _run_parts(run: Run, passes: Mapping[str, float], level: str) -> list[str]:
    parts = [_describe(run)]
    if not run.tasks or not run.methods:
        return [*parts, "There are no results yet.", *_errors(run, level)]
    parts += [
        f"{level} Accept length",
        "Mean number of tokens of a round; in brackets, of the full vocabulary's.",
        task_table(run, accept_length_cell(run), lambda m: _average_length(run, m)),
        f"{level} Tokens/s",
        "Mean over questions of tokens over seconds, those of the prompt among them (but what the"
        " KV cache held of a prompt is not computed again).",
        task_table(
            run,
            lambda m, task: _number(run.tokens_per_s(m, task), 1),
            lambda m: _number(run.average(run.tokens_per_s, m), 1),
        ),
    ]
    if run.has_plain():
        parts += [
            f"{level} Speed-up",
            "Of tokens/s over plain decoding's.",
            task_table(
                run,
                lambda m, task: _times(run.speed_up(m, task)),
                lambda m: _times(run.average(run.speed_up, m)),
            ),
        ]
    if len(run.tasks) > 1 and any(task.name == "gsm8k" for task in run.tasks):
        parts.append("The averages of all tables are over the paper's seven tasks, without GSM8K.")
    parts += [f"{level} Decoding alone", _decoding_note(run), decoding_table(run)]
    if {task.name for task in run.tasks} & {"code", "gsm8k"}:
        parts += [f"{level} Correctness", *_correctness(run, passes)]
    return parts + _errors(run, level)


def task_table(run: Run, cell: Cell, average: Callable[[Configuration], str]) -> str:
    rows = [
        [method.label, *(cell(method, task.name) for task in run.tasks), average(method)]
        for method in run.methods
    ]
    return markdown_table(["", *(task.label for task in run.tasks), "Average"], rows)


def accept_length_cell(run: Run) -> Cell:
    return lambda method, task: _with_share(
        run.accept_length(method, task),
        run.accept_length(Configuration(method.method), task),
        method,
    )


def decoding_table(run: Run) -> str:
    """Averages of what comes after the first token, and where that time goes."""
    rows = []
    for method in run.methods:
        shares = run.time_shares(method)
        rows.append(
            [
                method.label,
                _number(run.average(run.tokens_per_s, method, False), 1),
                _times(run.average(run.speed_up, method, False)),
                *(f"{seconds * 1e3:.2f}" for seconds in shares.values()),
                str(run.identity(method)),
            ]
        )
    columns = ["", "tokens/s", "speed-up", "draft ms", "verify ms", "rest ms", "same text as plain"]
    return markdown_table(columns, rows)


def comparison_table(runs: Sequence[Run]) -> str:
    rows = [
        [
            run.name,
            method.label,
            _number(run.average(run.accept_length, method), 2),
            _number(run.average(run.tokens_per_s, method), 1),
            _times(run.average(run.speed_up, method)),
            str(run.identity(method)),
        ]
        for run in runs
        for method in run.methods
    ]
    columns = ["run", "method", "accept length", "tokens/s", "speed-up", "same text as plain"]
    return markdown_table(columns, rows, words=2)


def write_file(path: Path, data: bytes) -> None:
    """Writes a file of the report, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be written: {error.strerror}") from None


def _describe(run: Run) -> str:
    header, request = run.header, run.header.get("request", {})
    devices = sorted({record["device"] for record in run.records})
    sampling = f"temperature {request.get('temperature', 0):g}"
    if request.get("temperature"):
        sampling += f", seed {request.get('seed')}"
    counts = (
        f"{task.label} {len({r['question_id'] for r in run.records if r['task'] == task.name})}"
        for task in run.tasks
    )
    lines = [
        f"- model: {header.get('model')}",
        *_describe_drafters(header),
        f"- device: {', '.join(devices) or 'none yet'} ({', '.join(_describe_machine(header))})",
        f"- {sampling}; {_describe_length(request)}",
        f"- questions: {', '.join(counts) or 'none yet'}",
        f"- frspec {header.get('versions', {}).get('frspec')}",
    ]
    return "\n".join(lines)


def _describe_drafters(header: Mapping[str, Any]) -> list[str]:
    trees = header.get("trees", {})
    lines = []
    for method, path in header.get("drafters", {}).items():
        line = f"- {LABELS.get(method, method)} drafter: {path}"
        if method == "medusa" and method in trees:
            choices = header.get("medusa_choices") or {}
            line += f"; tree of {trees[method]['tokens']} tokens"
            line += f" of {choices}" if isinstance(choices, str) else ""
        elif method in trees:
            tree = trees[method]
            line += f"; tree of depth {tree['depth']}, top {tree['topk']}, {tree['tokens']} tokens"
        if least := trees.get(method, {}).get("min_probability"):
            line += f" at most, of paths of probability {least:g} or more"
        lines.append(line)
    if header.get("ranking"):
        lines.append(f"- ranking: {header['ranking']}")
    return lines or ["- drafter: none"]


def _describe_machine(header: Mapping[str, Any]) -> list[str]:
    words = [str(header.get("device_name"))]
    if header.get("device") == "cpu":
        words.append(f"{header.get('threads') or 'all'} threads")
    words.append(f"weights in {header.get('dtype') or 'the type of the file'}")
    workers = header.get("workers", "1")
    return words if workers == "1" else [*words, f"workers: {workers}"]


def _describe_length(request: Mapping[str, Any]) -> str:
    tokens = request.get("max_new_tokens")
    return f"{tokens or 'as many as the task has'} new tokens at most"


def _decoding_note(run: Run) -> str:
    note = "Tokens after the first over the seconds after it, averaged as above; milliseconds are"
    note += " those of one generated token."
    if not run.has_plain():
        note += " Plain decoding was not run: there is no speed-up and no text to compare with."
    return note


def _correctness(run: Run, passes: Mapping[str, float]) -> list[str]:
    rows = []
    for method in run.methods:
        accuracy = run.gsm8k_accuracy(method)
        passed = passes.get(method.name)
        rows.append([method.label, _percent(passed), _percent(accuracy)])
    parts = [markdown_table(["", "HumanEval pass@1", "GSM8K accuracy"], rows)]
    if not passes and any(task.name == "code" for task in run.tasks):
        parts.append("Programs were not run: that takes `--run-generated-code`.")
    return parts


def _errors(run: Run, level: str) -> list[str]:
    if not run.errors:
        return []
    found: dict[tuple[str, str], str] = {}
    for record in run.errors:
        found.setdefault((record["task"], record["question_id"]), record["error"])
    lines = [f"- {task} {question}: {error}" for (task, question), error in found.items()]
    return [f"{level} Questions left out", "\n".join(lines)]


def _average_length(run: Run, method: Configuration) -> str:
    full = run.average(run.accept_length, Configuration(method.method))
    return _with_share(run.average(run.accept_length, method), full, method)


def _with_share(value: float | None, full: float | None, method: Configuration) -> str:
    if value is None or not full or method.vocab_size is None:
        return _number(value, 2)
    return f"{value:.2f} ({value / full:.1%})"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first `words` columns are aligned to the left."""
    marks = [":--" if index < words else "--:" for index in range(len(columns))]
    lines = [columns, marks, *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
