"""Answers of GSM8K and HumanEval: what of a text is the answer."""

from __future__ import annotations

import re
import warnings

from .prompts import ANSWER_TRIGGER

_REFERENCE = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?\d+\.?\d*")
_FENCE = re.compile(r"^[ \t]*```.*$", re.MULTILINE)


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

    A chat model answers with the whole function or with its body, in a code block or without one,
    or with a block of which it wrote one end only. A whole function defines the name once more; a
    body is indented as it has to be.
    """
    pieces = _FENCE.split(text)
    pieces = [*pieces[1::2], *pieces[0::2]]  # what stands in blocks first
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    whole = [piece for piece in pieces if definition.search(piece)]
    completions = [
        each + "\n"
        for piece in whole or pieces
        for each in (["\n" + piece] if whole else _bodies(piece.strip("\n").rstrip()))
    ]
    return next((each for each in completions if _is_code(each)), completions[0])


def _bodies(code: str) -> list[str]:
    """Code as the body of a function: as it is, with the blanks that a model left away before the
    first line, and moved to the right."""
    moved = "\n".join("    " + line if line.strip() else line for line in code.split("\n"))
    return [code, "    " + code, moved]


def _is_code(completion: str) -> bool:
    """Whether a completion that is not empty is Python behind the head of a function."""
    if not completion.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about escapes in its strings
            compile("def head():\n    0\n" + completion, "completion", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
