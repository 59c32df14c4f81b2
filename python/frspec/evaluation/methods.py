"""What is compared: plain decoding, and each drafter over each vocabulary size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..errors import EvaluationError

PLAIN = "plain"

# Method of `Generator.generate` to its name in tables. A new drafter is one line here.
LABELS = {
    PLAIN: "plain",
    "eagle2": "EAGLE-2",
    "medusa": "Medusa",
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A row of the tables. vocab_size: tokens that the drafter scores; None: all of them."""

    method: str
    vocab_size: int | None = None

    @property
    def name(self) -> str:
        """As it stands in result files: plain, eagle2, eagle2-32768."""
        return self.method if self.vocab_size is None else f"{self.method}-{self.vocab_size}"

    @property
    def label(self) -> str:
        """As it stands in tables."""
        label = LABELS.get(self.method, self.method)
        return label if self.vocab_size is None else f"{label} + FR {short_size(self.vocab_size)}"

    @classmethod
    def parse(cls, name: str) -> Configuration:
        """The configuration of a name; EvaluationError for what is none."""
        method, _, size = name.partition("-")
        if not method or (size and not size.isdecimal()):
            raise EvaluationError(f"expected a method such as eagle2-32768, found {name!r}")
        return cls(method, int(size) if size else None)


def short_size(size: int) -> str:
    """32768 as 32k, in the paper's way."""
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


def configurations(
    methods: Sequence[str], vocab_sizes: Sequence[int | str], drafters: Mapping[str, str]
) -> tuple[Configuration, ...]:
    """Every configuration asked for: plain first, then each drafter from the full vocabulary down.

    drafters: method to folder or hub id.
    """
    unknown = next((method for method in [*methods, *drafters] if method not in LABELS), None)
    if unknown is not None:
        raise EvaluationError(f"unknown method {unknown!r}: expected {', '.join(LABELS)}")
    sizes = [None if size == "full" else int(size) for size in vocab_sizes]
    sizes = sorted(set(sizes), key=lambda size: (size is not None, -(size or 0)))
    found = []
    for method in [method for method in LABELS if method in methods]:
        if method == PLAIN:
            found.append(Configuration(PLAIN))
            continue
        if method not in drafters:
            raise EvaluationError(f"--methods {method} needs its drafter: --drafter {method}=DIR")
        found += [Configuration(method, size) for size in sizes]
    return tuple(found)
