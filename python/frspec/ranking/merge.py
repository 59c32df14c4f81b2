"""Rankings of the parts of a corpus as one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import RankingError
from .file import Ranking


def merge_rankings(paths: Sequence[Path], corpus: str | None = None) -> Ranking:
    """What counting all parts in one run gives. RankingError for files that do not belong together.

    corpus: by default the names of the parts' corpora, each once.
    """
    _check_distinct(paths)
    rankings = [Ranking.load(path) for path in paths]
    first = rankings[0]
    counts = np.zeros(first.vocab_size, np.int64)
    parts: dict[str, str] = {}  # fingerprint to the file it came with
    for ranking in rankings:
        if ranking.source != "counted":
            raise RankingError(f"{ranking.path}: an imported list has no counts to merge")
        ranking.validate(first.tokenizer_fingerprint)
        for name in ("vocab_size", "special_ids"):
            expected, found = getattr(first, name), getattr(ranking, name)
            if found != expected:
                raise RankingError(
                    f"{ranking.path}: {name}: expected {expected} as in {first.path}, found {found}"
                )
        for part in {*ranking.parts, ranking.fingerprint()}:
            if part in parts:
                raise RankingError(
                    f"{ranking.path}: would be counted twice, its counts are in {parts[part]} too"
                )
            parts[part] = ranking.path
        counts += ranking.counts_by_id()
    names = dict.fromkeys(name for r in rankings for name in r.corpus.split(", "))
    return Ranking.from_counts(
        counts,
        tokenizer_fingerprint=first.tokenizer_fingerprint,
        corpus=corpus or ", ".join(names),
        special_ids=first.special_ids,
        parts=parts,
    )


def _check_distinct(paths: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in paths:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise RankingError(f"{path}: would be counted twice, it is given as {other} too")
