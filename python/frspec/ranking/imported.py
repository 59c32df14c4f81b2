"""Published FR-Spec lists of token ids (freq_32768.pt) as rankings."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import RankingError
from ..tokenizer import Tokenizer
from .file import Ranking


def import_ids(path: Path, tokenizer: Tokenizer, corpus: str) -> Ranking:
    """A ranking from a PyTorch file that holds token ids by frequency (a list or a tensor)."""
    from ..convert.tensors import LazyTensor
    from ..convert.torch_file import load_torch_file

    if not path.is_file():
        raise RankingError(f"{path}: no such input file")
    value = load_torch_file(path)
    try:
        array = value.numpy() if isinstance(value, LazyTensor) else np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.size == 0:
        found = f"{type(value).__name__} ({array.dtype} {list(array.shape)})"
        raise RankingError(f"{path}: expected a list of token ids, found {found}")
    outside = array[(array < 0) | (array >= tokenizer.vocab_size)]
    if outside.size:
        raise RankingError(
            f"{path}: expected ids in [0, {tokenizer.vocab_size}) of the tokenizer,"
            f" found {outside[0]}"
        )
    ranking = Ranking(
        token_ids=array.astype(np.int32),
        counts=np.zeros(array.size, dtype=np.int64),
        tokenizer_fingerprint=tokenizer.fingerprint,
        corpus=corpus,
        tokens_counted=0,
        special_ids=tokenizer.ending_ids,
        vocab_size=tokenizer.vocab_size,
        source="imported",
        path=str(path),
    )
    ranking.validate()
    return ranking
