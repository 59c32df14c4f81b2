"""Text to token ids and back: the tokenizer of a model folder and its chat template.

The folder is Hugging Face's layout: tokenizer.json, and when there tokenizer_config.json,
special_tokens_map.json, chat_template.jinja, config.json and generation_config.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from .chat_template import ChatTemplate
from .errors import ModelError, RequestError, first_line

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")


class Tokenizer:
    """The tokenizer of one model. Loading fails with ModelError, encoding with RequestError."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
        ending_ids: Iterable[int] = (),
        config_vocab_size: int = 0,
    ):
        # A tokenizer.json may carry the truncation of its training run; a prompt is never cut.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        self._ending_ids = set(ending_ids)
        self._config_vocab_size = config_vocab_size

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Reads the tokenizer of a model folder."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: no such file; the model folder needs a tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the library raises a bare Exception
            raise ModelError(f"{path}: not a tokenizer: {first_line(error)}") from None
        settings = _read_object(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_object(folder / "special_tokens_map.json"))
        special_tokens.update(_special_tokens(settings))
        config = _read_object(folder / "config.json")
        endings = _eos_ids(folder / "config.json", config)
        path = folder / "generation_config.json"
        endings |= _eos_ids(path, _read_object(path))
        if "eos_token" in special_tokens:
            token_id = backend.token_to_id(special_tokens["eos_token"])
            endings |= set() if token_id is None else {token_id}
        vocab_size = config.get("vocab_size", 0)
        if type(vocab_size) is not int or vocab_size < 0:
            raise ModelError(
                f"{folder / 'config.json'}: vocab_size: expected a count, found {vocab_size!r}"
            )
        return cls(
            backend,
            special_tokens=special_tokens,
            chat_template=ChatTemplate.load(folder, settings),
            ending_ids=endings,
            config_vocab_size=vocab_size,
        )

    @cached_property
    def size(self) -> int:
        """One more than the largest token id the tokenizer knows."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def vocab_size(self) -> int:
        """Ids that the model has rows for: config.json's vocab_size, or `size` if it says none.

        Embeddings are often padded, and a tokenizer may know tokens that the model has no row for.
        """
        return self._config_vocab_size or self.size

    @cached_property
    def ending_ids(self) -> list[int]:
        """Ids of the tokens that end a text, ascending: every eos the folder's files name.

        Ids that the model does not have (-1 for "none") never occur, and are left out.
        """
        return sorted(i for i in self._ending_ids if 0 <= i < self.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over (id, token) of every token with added ones, by id: what an id means.

        Each entry is the id (u32), the byte length of the token (u32) and its UTF-8, little-endian.
        """
        vocab = self.backend.get_vocab(with_added_tokens=True)
        entries = sorted((token_id, token.encode("utf-8")) for token, token_id in vocab.items())
        pack = struct.Struct("<II").pack
        data = b"".join(pack(token_id, len(token)) + token for token_id, token in entries)
        return hashlib.sha256(data).hexdigest()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Pass add_special_tokens=False for what `chat` returned."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise RequestError(f"prompt: expected a Unicode text: {first_line(error)}") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids without a token (padding of the embedding) give nothing."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation ([{"role": ..., "content": ...}]) in the model's format."""
        if self._chat_template is None:
            raise RequestError(
                "chat: the model folder has no chat template (chat_template in"
                " tokenizer_config.json, or chat_template.jinja); give a plain prompt instead"
            )
        return self._chat_template.render(messages, add_generation_prompt, self.special_tokens)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} when there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Name to text; a token is written as a string or as an object with "content"."""
    found = {}
    for name in _SPECIAL_NAMES:
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _eos_ids(path: Path, config: Mapping[str, Any]) -> set[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token_id) is not int for token_id in ids):
        raise ModelError(f"{path}: eos_token_id: expected an id or a list of ids, found {value!r}")
    return set(ids)
