"""Answers of GSM8K and HumanEval: what of a text is the answer."""

from __future__ import annotations

import re

from .prompts import ANSWER_TRIGGER

_REFERENCE = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_TOP_LEVEL = re.compile(r"(?:def|class|import|from|async)\b|@|#")


def gsm8k_reference(answer: str) -> str | None:
    """The number behind #### in a solution of the data set, without thousands separators."""
    match = _REFERENCE.search(answer)
    return None if match is None else match[1].replace(",", "")


def gsm8k_answer(text: str) -> str | None:
    """The number that a text answers with: the first one behind the first "The answer is", or the
    last one of a text without these words. (What stands behind the answer is the model going on
    with questions of its own.)"""
    before, _, answer = text.lower().partition(ANSWER_TRIGGER.lower())
    numbers = _NUMBER.findall((answer or before).replace(",", ""))
    if not numbers:
        return None
    return (numbers[0] if answer else numbers[-1]).rstrip(".")


def human_eval_completion(entry_point: str, text: str) -> str:
    """What is to stand behind a HumanEval prompt so that together they are a program.

    A chat model answers with the whole function or with its body, in a code block or without one.
    A whole function defines the name once more; a body is indented as it has to be.
    """
    blocks = _FENCE.findall(text)
    code = next((block for block in blocks if f"def {entry_point}" in block), None)
    if code is None:
        code = blocks[0] if blocks else text
    code = code.strip("\n").rstrip()
    if re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        return "\n" + code + "\n"
    return _as_body(code) + "\n"


def _as_body(code: str) -> str:
    """Code as the body of a function of four spaces."""
    first, *rest = code.split("\n")
    if not first or first[0].isspace() or _TOP_LEVEL.match(first):
        return code
    indents = [len(line) - len(line.lstrip(" ")) for line in rest if line.strip()]
    # An answer that lost the blanks before its first line has its other lines in their place.
    opens_block = first.rstrip().endswith(":")
    if indents and min(indents) >= 4 and (not opens_block or indents[0] >= 8):
        return "\n".join(["    " + first, *rest])
    return "\n".join("    " + line if line.strip() else line for line in [first, *rest])
