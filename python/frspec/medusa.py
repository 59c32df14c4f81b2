"""Which tree a Medusa drafter fills, as users say it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import _core
from .errors import RequestError, short

# A published tree's name, the paths of a tree, or {"accuracies": [heads][ranks]}.
MedusaChoices = str | Sequence[Sequence[int]] | Mapping[str, Sequence[Sequence[float]]]


def read_medusa_choices(name: str) -> MedusaChoices:
    """What `--medusa-choices` names: a published tree, or a JSON file of paths or accuracies."""
    published = _core.published_medusa_trees()
    if name in published:
        return name
    if not os.path.exists(name):
        raise RequestError(
            f"--medusa-choices {name}: no such file, and none of {', '.join(published)}"
        )
    try:
        return json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"--medusa-choices {name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"--medusa-choices {name}: cannot be read as JSON: {error}") from None


def drafter_method(folder: Path) -> str:
    """The method that the drafter in `folder` is for, as its config.json tells."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return "eagle2"  # loading it says what is wrong
    is_medusa = isinstance(config, dict) and config.get("medusa_num_heads") is not None
    return "medusa" if is_medusa else "eagle2"


def medusa_tree_options(choices: Any) -> dict[str, Any]:
    """The engine's arguments for `choices`; RequestError unless they are of its type.

    Whether paths make a tree that the drafter can fill is the engine's to say.
    """
    if choices is None:
        return {}
    if isinstance(choices, str):
        return {"medusa_published": choices}
    if isinstance(choices, Mapping):
        if list(choices) != ["accuracies"]:
            raise RequestError(
                f'medusa_choices: expected the key "accuracies", found {short(list(choices))}'
            )
        table = _table(choices["accuracies"], (int, float, np.integer, np.floating), "accuracies")
        try:
            return {"medusa_accuracies": [[float(number) for number in row] for row in table]}
        except OverflowError:
            raise RequestError(
                "medusa_choices: expected accuracies from 0 to 1, found an integer beyond any float"
            ) from None
    paths = _table(choices, (int, np.integer), "ranks")
    for path in paths:
        for rank in path:
            if not 0 <= rank < 2**31:
                raise RequestError(f"medusa_choices: expected ranks from 0, found {short(rank)}")
    return {"medusa_paths": [[int(rank) for rank in path] for path in paths]}


def _table(rows: Any, kinds: tuple[type, ...], what: str) -> list[list[Any]]:
    """`rows` as lists of numbers, at least one."""
    if not _is_list(rows):
        raise RequestError(
            "medusa_choices: expected a name, a list of lists of ranks, or accuracies,"
            f" found {short(rows)}"
        )
    for row in rows:
        if not _is_list(row) or any(
            isinstance(item, bool) or not isinstance(item, kinds) for item in row
        ):
            raise RequestError(f"medusa_choices: expected lists of {what}, found {short(row)}")
    if len(rows) == 0:
        raise RequestError(f"medusa_choices: expected at least one list of {what}, found none")
    return [list(row) for row in rows]


def _is_list(value: Any) -> bool:
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, (str, bytes))
