"""The tokenizer in a GGUF's metadata as a tokenizer.json and a tokenizer_config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from frspec.chat_template import ChatTemplate
from frspec.errors import ConversionError, ModelError

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

# How each pre-tokenizer cuts text before the merges, named as in tokenizer.ggml.pre.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS_AND_SPACE}"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACE}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "tekken": _TEKKEN,
}
_GPT2 = ("gpt-2", "default")
_GPT2_WITH_DIGITS_ALONE = ("smollm", "starcoder", "refact")
_KNOWN = sorted([*_SPLITS, *_GPT2, *_GPT2_WITH_DIGITS_ALONE])
_NFC = ("qwen2",)
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3", "tekken")

# Tokens that end a text or a turn in the families this package runs: a chat model's metadata
# names one of them, its published generation config often two.
_END_TEXTS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)
_SPACE = "\u2581"  # SentencePiece's mark for a space


@dataclass(frozen=True)
class TokenizerMetadata:
    """`metadata` under GGUF's keys, and the file it is from, for messages."""

    path: Path
    metadata: Mapping[str, Any]


def special_token_ids(file: TokenizerMetadata, vocab_size: int) -> dict[str, int]:
    """bos_token_id, eos_token_id and pad_token_id as far as the metadata has them."""
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id"}
    ids = {}
    for short, key in keys.items():
        token = _token_id(file, key, vocab_size)
        if token is not None:
            ids[f"{short}_token_id"] = token
    return ids


def end_token_ids(file: TokenizerMetadata, vocab_size: int) -> list[int]:
    """Every token that ends a text: the metadata's first, then control tokens known by name."""
    ends = [_token_id(file, f"{key}_token_id", vocab_size) for key in ("eos", "eot", "eom")]
    tokens, types = _vocabulary(file)
    by_text = {tokens[i]: i for i in np.flatnonzero(types == _CONTROL).tolist()}
    ends += [by_text.get(text) for text in _END_TEXTS]
    return list(dict.fromkeys(token for token in ends if token is not None))


def build_tokenizer(
    file: TokenizerMetadata, vocab_size: int, notes: list[str]
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer, and the contents of tokenizer_config.json; remarks are added to `notes`."""
    tokens, types = _vocabulary(file)
    if len(tokens) > vocab_size:
        raise ConversionError(
            f"{file.path}: expected at most {vocab_size} tokens (rows of token_embd.weight), "
            f"found {len(tokens)}"
        )
    kind = file.metadata.get("tokenizer.ggml.model")
    vocab: dict[str, int] = {}
    for token_id, (text, token_type) in enumerate(zip(tokens, types.tolist(), strict=True)):
        if token_type == _UNUSED:
            continue
        if text in vocab:
            raise ConversionError(
                f"{file.path}: tokens {vocab[text]} and {token_id} are both {text!r}"
            )
        vocab[text] = token_id
    if kind == "gpt2":
        tokenizer = _byte_level(file, vocab, notes)
    elif kind == "llama":
        tokenizer = _sentencepiece(file, vocab, types)
    else:
        raise ConversionError(
            f"{file.path}: tokenizer.ggml.model: expected gpt2 or llama, found {kind!r}"
        )
    added = [
        AddedToken(tokens[i], special=types[i] != _USER_DEFINED, normalized=False)
        for i in np.flatnonzero(
            (types == _CONTROL) | (types == _UNKNOWN) | (types == _USER_DEFINED)
        ).tolist()
    ]
    tokenizer.add_tokens(added)
    for token in added:
        if tokenizer.token_to_id(token.content) != vocab[token.content]:
            raise ConversionError(f"{file.path}: token {token.content!r} cannot keep its id")

    adds_bos = _adds(file, "bos", kind)
    adds_eos = _adds(file, "eos", kind)
    _add_post_processor(file, tokenizer, tokens, adds_bos, adds_eos, kind, vocab_size)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        token_id = _token_id(file, f"{key}_token_id", vocab_size)
        if token_id is not None and token_id < len(tokens):
            config[f"{name}_token"] = tokens[token_id]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        try:
            ChatTemplate(template, "the metadata")
            config["chat_template"] = template
        except ModelError as error:
            notes.append(f"{error}; it is left out, and prompts need --raw")
    else:
        notes.append("no chat template in the metadata: prompts need --raw")
    context = file.metadata.get(f"{file.metadata.get('general.architecture')}.context_length")
    if isinstance(context, int):
        config["model_max_length"] = context
    return tokenizer, config


def _vocabulary(file: TokenizerMetadata) -> tuple[list[str], np.ndarray]:
    """Token texts and their types."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConversionError(f"{file.path}: expected tokenizer.ggml.tokens, found none")
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(tokens), _NORMAL)
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ConversionError(
            f"{file.path}: tokenizer.ggml.token_type: expected {len(tokens)} numbers, "
            f"found {len(types)}"
        )
    return tokens, types


def _token_id(file: TokenizerMetadata, key: str, vocab_size: int) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < vocab_size:
        raise ConversionError(
            f"{file.path}: tokenizer.ggml.{key}: expected a token below {vocab_size}, "
            f"found {value!r}"
        )
    return value


def _adds(file: TokenizerMetadata, which: str, kind: str) -> bool:
    """Whether encoding adds the bos (eos) token: as stated, else as the family's default is."""
    stated = file.metadata.get(f"tokenizer.ggml.add_{which}_token")
    if isinstance(stated, bool):
        return stated
    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    return which == "bos" and (kind == "llama" or pre in _WHOLE_WORDS_FIRST)


def _byte_level(file: TokenizerMetadata, vocab: dict[str, int], notes: list[str]) -> Tokenizer:
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre in (None, "default"):
        notes.append("the metadata names no pre-tokenizer: GPT-2's is used")
        pre = "default"
    if pre not in _KNOWN:
        raise ConversionError(
            f"{file.path}: tokenizer.ggml.pre: expected one of {', '.join(_KNOWN)}, found {pre!r}"
        )
    merges = file.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ConversionError(f"{file.path}: expected tokenizer.ggml.merges, found none")
    model = _bpe(file, vocab, _split_merges(file, merges), ignore_merges=pre in _WHOLE_WORDS_FIRST)
    tokenizer = Tokenizer(model)
    if pre in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    if pre in _SPLITS:
        cut = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.pre_tokenizer = byte_level
        if pre in _GPT2_WITH_DIGITS_ALONE:
            digits = pre_tokenizers.Digits(individual_digits=True)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _split_merges(file: TokenizerMetadata, merges: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for merge in merges:
        left, space, right = merge.partition(" ")
        if not (left and space and right):
            raise ConversionError(
                f"{file.path}: tokenizer.ggml.merges: expected two pieces, found {merge!r}"
            )
        pairs.append((left, right))
    return pairs


def _bpe(
    file: TokenizerMetadata, vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> models.BPE:
    try:
        return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise ConversionError(f"{file.path}: tokenizer: {error}") from error


def _sentencepiece(file: TokenizerMetadata, vocab: dict[str, int], types: np.ndarray) -> Tokenizer:
    """A SentencePiece BPE model: a merge for every way to make a piece of two, best score first."""
    merges = file.metadata.get("tokenizer.ggml.merges")
    scores = file.metadata.get("tokenizer.ggml.scores")
    if isinstance(scores, np.ndarray) and len(scores) == len(types):
        pairs = _merges_from_scores(vocab, types, scores)
    elif isinstance(merges, list):
        pairs = _split_merges(file, merges)
    else:
        raise ConversionError(
            f"{file.path}: expected tokenizer.ggml.scores for {len(types)} tokens, found "
            f"{'none' if scores is None else len(scores)}"
        )
    unknown = _token_id(file, "unknown_token_id", len(types))
    if unknown is None:
        unknown = next(iter(np.flatnonzero(types == _UNKNOWN).tolist()), None)
    by_id = {token_id: text for text, token_id in vocab.items()}
    model = _bpe(
        file,
        vocab,
        pairs,
        unk_token=by_id.get(unknown),
        fuse_unk=True,
        byte_fallback=bool((types == _BYTE).any()),
    )
    tokenizer = Tokenizer(model)
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Replace(" ", _SPACE)]
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.insert(0, normalizers.Prepend(_SPACE))
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _merges_from_scores(
    vocab: dict[str, int], types: np.ndarray, scores: np.ndarray
) -> list[tuple[str, str]]:
    mergeable = {
        text: token_id for text, token_id in vocab.items() if types[token_id] in (_NORMAL, _BYTE)
    }
    pieces = {
        text: token_id
        for text, token_id in mergeable.items()
        if types[token_id] == _NORMAL and len(text) > 1
    }
    found: list[tuple[float, int, int, str, str]] = []
    for text, token_id in pieces.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                score = -float(scores[token_id])
                found.append((score, mergeable[left], mergeable[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_post_processor(
    file: TokenizerMetadata,
    tokenizer: Tokenizer,
    tokens: list[str],
    adds_bos: bool,
    adds_eos: bool,
    kind: str,
    vocab_size: int,
) -> None:
    """Byte-level offsets, and the tokens that encoding puts around a text."""
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    around: dict[str, int] = {}
    for which, wanted in (("bos", adds_bos), ("eos", adds_eos)):
        token_id = _token_id(file, f"{which}_token_id", vocab_size)
        if not wanted:
            continue
        if token_id is None or token_id >= len(tokens):
            raise ConversionError(
                f"{file.path}: expected tokenizer.ggml.{which}_token_id, which "
                f"add_{which}_token needs, found none"
            )
        around[which] = token_id
    if around:
        before, after = (
            [tokens[around[which]]] if which in around else [] for which in ("bos", "eos")
        )
        template = " ".join([*before, "$A", *after])
        pieces = [(tokens[token_id], token_id) for token_id in around.values()]
        if any(re.search(r"[\s$:]", text) for text, _ in pieces):
            raise ConversionError(
                f"{file.path}: bos or eos token {pieces!r} cannot be put in a template"
            )
        steps.append(processors.TemplateProcessing(single=template, special_tokens=pieces))
    if steps:
        tokenizer.post_processor = steps[0] if len(steps) == 1 else processors.Sequence(steps)
