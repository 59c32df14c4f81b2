"""A SentencePiece tokenizer.model as a tokenizer.json.

The file is a protocol buffer (sentencepiece_model.proto). Only the few fields that a BPE model
needs are read; they get the names that GGUF gives them, so that one builder serves both.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from frspec.convert.gguf_tokenizer import TokenizerMetadata, build_tokenizer
from frspec.errors import ConversionError

_BPE = 2  # TrainerSpec.model_type
_NORMAL, _CONTROL = 1, 3  # SentencePiece.type; the numbers of tokenizer.ggml.token_type


def tokenizer_from_sentencepiece(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in the file `path`, with the added_tokens.json beside it."""
    try:
        metadata = _metadata(path.read_bytes())
    except (OSError, ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
        raise ConversionError(f"{path}: not a SentencePiece BPE model: {error}") from error
    _add_tokens(metadata, path.parent / "added_tokens.json")
    tokenizer, _ = build_tokenizer(TokenizerMetadata(path, metadata), vocab_size, [])
    return tokenizer


def _metadata(data: bytes) -> dict[str, Any]:
    tokens: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:  # SentencePiece: piece, score, type
            piece = dict(_fields(value))
            tokens.append(str(piece[1], "utf-8") if 1 in piece else "")
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, _NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not tokens or trainer.get(3) != _BPE:
        raise ValueError(f"{len(tokens)} pieces, model type {trainer.get(3, 1)} (expected {_BPE})")
    ids = {
        "unknown": trainer.get(40, 0),
        "bos": trainer.get(41, 1),
        "eos": trainer.get(42, 2),
    }
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int64),
        "tokenizer.ggml.add_space_prefix": bool(normalizer.get(3, 1)),
        # A missing token is written as -1, which a varint holds as 2^64 - 1.
        **{f"tokenizer.ggml.{k}_token_id": v for k, v in ids.items() if v < len(tokens)},
    }


def _add_tokens(metadata: dict[str, Any], path: Path) -> None:
    """Appends the tokens that were added behind the model's own."""
    if not path.is_file():
        return
    tokens = metadata["tokenizer.ggml.tokens"]
    try:
        added = json.loads(path.read_text(encoding="utf-8"))
        own = set(tokens)  # the file may repeat the model's own control tokens
        ordered = sorted((number, text) for text, number in added.items() if text not in own)
        expected = range(len(tokens), len(tokens) + len(ordered))
        if [number for number, _ in ordered] != list(expected):
            raise ValueError(f"expected ids from {len(tokens)} on without gaps, found {ordered}")
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ConversionError(f"{path}: {error}") from error
    count = len(ordered)
    metadata["tokenizer.ggml.tokens"] = tokens + [text for _, text in ordered]
    for key, filler in (("scores", 0.0), ("token_type", _CONTROL)):
        name = f"tokenizer.ggml.{key}"
        metadata[name] = np.append(metadata[name], np.full(count, filler, metadata[name].dtype))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a protocol buffer message: integers, or the bytes of the rest."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size, position = _varint(data, position)
        if size is None or position + size > len(data):
            raise ValueError(f"a damaged field at byte {position}")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"a damaged number at byte {position}")
