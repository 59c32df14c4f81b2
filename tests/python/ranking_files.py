"""A tokenizer of words, corpora in its words, and counting them by command and by hand."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import tokenizers
import zstandard
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers

from frspec.ranking import Ranking, add_arguments, run

COMPRESS = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}

WORDS = ["<end>", "<start>", *"the cat sat on a mat and then slept . , é".split()]
VOCAB_SIZE = len(WORDS) + 3  # the embedding is padded


def write_word_model(path: Path) -> Path:
    """A model folder whose tokens are words."""
    path.mkdir()
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=",")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<end>", "<start>"])
    backend.save(str(path / "tokenizer.json"))
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    return path


def rank(folder: Path, *arguments) -> Ranking:
    """Runs the command and reads what it wrote."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = folder.parent / "ranking.safetensors"
    options = ["--tokenizer", str(folder), "--out", str(out), *map(str, arguments)]
    assert run(parser.parse_args(options)) == 0
    return Ranking.load(out)


def expected_counts(texts: list[str]) -> np.ndarray:
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for text in texts:
        for word in text.split():
            counts[WORDS.index(word if word in WORDS else ",")] += 1
    return counts


def check_counts(ranking: Ranking, texts: list[str]) -> None:
    counts = np.empty(VOCAB_SIZE, dtype=np.int64)
    counts[ranking.token_ids] = ranking.counts
    np.testing.assert_array_equal(counts, expected_counts(texts))


TEXTS = ["the cat sat on the mat .", "the cat slept and\nthen the cat sat", "é é , unknown words"]


def write_lines(path: Path, records) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


RECORDS = {
    "text": [{"text": text} for text in TEXTS],
    "sharegpt": [
        {"id": 1, "conversations": [{"from": "human", "value": t} for t in TEXTS[:2]]},
        {"id": 2, "conversations": [{"from": "gpt", "value": TEXTS[2]}]},
        {"id": 3, "conversations": []},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": TEXTS[0]}, {"role": "tool", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}]},
        {"messages": [{"role": "assistant", "content": TEXTS[2]}]},
    ],
    "a.b": [{"a": {"b": text}, "text": "not this"} for text in TEXTS],
    "turns": [{"turns": TEXTS[:2], "text": "not this"}, {"turns": TEXTS[2:]}],
}
