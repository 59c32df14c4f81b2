"""The results file: JSON Lines, a header and then one record per question, method and turn.

    header   kind "header", version, and what the results depend on (`run.make_header`)
    record   task, question_id, question (its fingerprint), category, turn, method, then what was
             measured (`generate.measure`); part and parts: its place among the records that were
             written together

The records of a job are appended in one write and synced. A run that was killed while it wrote
leaves a part of them at the end of the file; it is cut off when the file is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from .methods import PLAIN

FILE_NAME = "results.jsonl"
VERSION = 1

Record = dict[str, Any]
Key = tuple[str, str, str]  # task, question_id, method

# Of the header: what things are called; their fingerprints say whether they are the same.
_NAMES = ("model", "drafters", "ranking")
_KEYS = ("task", "question_id", "question", "turn", "method", "part", "parts")
# Of a record without an error, what the report needs.
_MEASURED = (
    "tokens", "accept_lengths", "prefill_s", "decode_s", "draft_s", "verify_s", "rest_s", "device",
    "token_ids_sha256", "text",
)  # fmt: skip


class ResultsFile:
    """Results on disk that a run adds to. Only one process at a time may hold a file open."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        """Opens or begins the file. EvaluationError when it holds results of another
        configuration, when it is damaged, or when another run writes to it."""
        self.path = path
        self.records: list[Record] = []
        self._keys: dict[Key, str] = {}  # to the question's fingerprint
        self.dropped = 0  # records of an unfinished write that were cut off
        if path.parent.exists() and not path.parent.is_dir():
            raise EvaluationError(f"{path.parent}: expected a folder for the results, found a file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise EvaluationError(f"{path}: cannot be opened: {error.strerror}") from None
        try:
            self._lock()
            self._restore(dict(header))
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, task: str, question_id: str, method: str, question: str) -> bool:
        """Whether the results of a question are there; question: its fingerprint."""
        found = self._keys.get((task, question_id, method))
        if found is not None and found != question:
            raise EvaluationError(
                f"{self.path}: {task} {question_id} was asked in other words (fingerprint"
                f" {found}, now {question}); the data file has changed, use another --out"
            )
        return found is not None

    def append(self, records: Sequence[Record]) -> None:
        """Adds the records of a job, all or none of them, and waits until they are on the disk."""
        keys = {_key(record): record["question"] for record in records}
        again = next((key for key in keys if key in self._keys), None)
        if again is not None:
            raise EvaluationError(f"{self.path}: {' '.join(again)} would be counted twice")
        parts = len(records)
        records = [
            dict(record) | {"part": part, "parts": parts} for part, record in enumerate(records, 1)
        ]
        self._write("".join(_line(record) for record in records))
        self.records += records
        self._keys |= keys

    def plain_ids(self, task: str, question_id: str) -> dict[int, str]:
        """Turn to the fingerprint of plain decoding's token ids, where there is one."""
        return {
            record["turn"]: record["token_ids_sha256"]
            for record in self.records
            if _key(record) == (task, question_id, PLAIN) and "token_ids_sha256" in record
        }

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(f"{self.path}: another run is writing to it") from None
        except OSError:
            pass  # a file system without locks

    def _restore(self, header: dict[str, Any]) -> None:
        lines, whole = _parse(self.path)
        if lines:
            _check_header(self.path, lines[0], header if len(lines) > 1 else None)
        if len(lines) < 2:
            # Nothing but a header, or the beginning of one: a run that ended before its first
            # result, perhaps because its options were refused.
            os.ftruncate(self._fd, 0)
            self._write(_line({"kind": "header", "version": VERSION} | header))
            return
        self.records = lines[1:]
        self.dropped = _count_lines(self.path) - len(lines)
        os.ftruncate(self._fd, whole)
        for record in self.records:
            self._keys[_key(record)] = record["question"]

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        size = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, size)
            raise EvaluationError(
                f"{self.path}: cannot be written: {error.strerror}; {len(self.records)} records"
                " are safe, and the same command goes on from there"
            ) from None


def read_results(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Header and records of a results file, or of the folder that holds one."""
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise EvaluationError(f"{path}: no such results file")
    lines, _ = _parse(path)
    if not lines:
        raise EvaluationError(f"{path}: expected a header, found nothing")
    _check_header(path, lines[0], None)
    return lines[0], lines[1:]


def _key(record: Mapping[str, Any]) -> Key:
    return record["task"], record["question_id"], record["method"]


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value) + "\n"


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Header and records up to the last finished write, and how many bytes these are."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path}: cannot be read: {error.strerror}") from None
    values: list[dict[str, Any]] = []
    finished, whole = 0, 0  # values and bytes up to the end of the last finished write
    offset = 0
    for number, line in enumerate(_lines(data), 1):
        offset += len(line)
        is_last = offset == len(data)
        value = _parse_line(line)
        if value is None:
            if is_last:
                break  # cut short by a kill
            raise EvaluationError(f"{path}:{number}: expected a JSON object; the file is damaged")
        if number > 1:
            _check_record(path, number, value)
        values.append(value)
        if number == 1 or value["part"] == value["parts"]:
            finished, whole = len(values), offset
    return values[:finished], whole


def _lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(data):
        end = data.find(b"\n", start) + 1 or len(data)
        yield data[start:end]
        start = end


def _parse_line(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_record(path: Path, number: int, record: Mapping[str, Any]) -> None:
    names = _KEYS if "error" in record else _KEYS + _MEASURED
    missing = [name for name in names if name not in record]
    if missing:
        raise EvaluationError(f"{path}:{number}: expected a field {missing[0]}; not a record")


def _check_header(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any] | None) -> None:
    if found.get("kind") != "header":
        raise EvaluationError(f"{path}:1: expected a header, found {str(dict(found))[:60]}")
    if found.get("version") != VERSION:
        raise EvaluationError(
            f"{path}: version: expected {VERSION}, found {found.get('version')!r:.40}"
        )
    if expected is None:
        return
    for name, was, now in _differences(found, json.loads(json.dumps(expected))):
        raise EvaluationError(
            f"{path}: results of another configuration: {name} was {was!r:.100}, now {now!r:.100};"
            " use another --out"
        )


def _differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = ""
) -> Iterable[tuple[str, Any, Any]]:
    for name, now in expected.items():
        was = found.get(name)
        if name in _NAMES:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name}", was, now
