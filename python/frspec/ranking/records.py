"""What a record of a corpus says: its texts, and what is told of records that say nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..evaluation.methods import PLAIN

# Where a record's text is when no field is named, by precedence.
KNOWN_FIELDS = ("conversations", "messages", "text")


class Record(NamedTuple):
    """The texts of one record, and the evaluation task that it belongs to, if any."""

    texts: list[str]
    task: str | None = None


@dataclass
class Broken:
    """What was skipped, and where the first of it was."""

    records: int = 0
    archives: int = 0  # compressed files that end or go bad before their end
    first: str = ""

    def add_record(self, place: str, reason: str) -> None:
        self.records += 1
        self.first = self.first or f"{place}: {reason}"

    def add_archive(self, place: str, reason: str) -> None:
        self.archives += 1
        self.first = self.first or f"{place}: {reason}"

    def __bool__(self) -> bool:
        return bool(self.first)

    def __add__(self, later: Broken) -> Broken:
        return Broken(
            self.records + later.records,
            self.archives + later.archives,
            self.first or later.first,
        )

    def __str__(self) -> str:
        parts = []
        if self.records:
            parts.append(f"skipped {_counted(self.records, 'broken record')}")
        if self.archives:
            archives = _counted(self.archives, "damaged archive")
            parts.append(f"of {archives} the readable part was counted")
        return f"{'; '.join(parts)}; the first at {self.first}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def read_record(value: Any, field: str | None) -> Record:
    """A record out of its JSON value; ValueError says why it has no text."""
    if isinstance(value, dict):
        if _adds_nothing(value):
            return Record([])
        task = value.get("task")
        return Record(texts_of(value, field), task if isinstance(task, str) else None)
    return Record(texts_of(value, field))


def texts_of(value: Any, field: str | None) -> list[str]:
    """The texts of a record; ValueError says why it has none. `field` names where they are ("a.b"
    for nested ones); without it conversations, messages and text are recognised."""
    if field is not None:
        found = value
        for name in field.split("."):
            if not isinstance(found, dict) or name not in found:
                raise ValueError(f"expected field {field!r}, found {_describe(value)}")
            found = found[name]
        return _flatten(found, field)
    if isinstance(value, dict):
        for name in KNOWN_FIELDS:
            if value.get(name) is not None:
                return _flatten(value[name], name)
    raise ValueError(
        f"expected an object with conversations, messages or text, found {_describe(value)}"
    )


def reason(error: Exception) -> str:
    """Why something could not be read, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno} " if error.lineno > 1 else ""  # of an array's element
        what = error.msg.removesuffix(" at")
        return f"not JSON: {what} at {line}column {error.colno}"
    if isinstance(error, RecursionError):
        return "JSON nested too deeply"
    return " ".join(str(error).split()) or type(error).__name__


def _adds_nothing(value: dict[str, Any]) -> bool:
    """Whether it is a line of `frspec eval`'s results that has no text of its own: the header, a
    question that was refused, or a text that plain decoding's record holds too."""
    if value.get("kind") == "header":
        return "version" in value and "text" not in value
    if not {"task", "question_id", "turn", "method"} <= value.keys():
        return False
    if "text" not in value:
        return "error" in value
    return value["method"] != PLAIN and value.get("same_as_plain") is True


def _flatten(value: Any, name: str) -> list[str]:
    """A text, a list of texts, or a list of messages ({"value"}, {"content"} or {"text"})."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        texts = []
        for item in value:
            if isinstance(item, dict):
                parts = [item[k] for k in ("value", "content", "text") if item.get(k) is not None]
                # A message without words (a tool call) is no fault of the line.
                texts += _flatten(parts[0], name) if parts else []
            else:
                texts += _flatten(item, name)
        return texts
    raise ValueError(f"{name}: expected text or messages, found {_describe(value)}")


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        names = ", ".join(list(map(str, value))[:8])
        return f"an object with {names}" if names else "an empty object"
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
