"""Text while it is generated: token ids to text pieces, and stop strings over pieces."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tokenizers

from .errors import RequestError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


class StreamDecoder:
    """Decodes tokens as they come; the pieces joined equal Tokenizer.decode of all of them.

    A piece is given as soon as no later token can change it, at a cost per token that does not
    grow with the text. How soon that is depends on the tokenizer's decoder:

    - byte level (Llama 3, Qwen2, SmolLM2): when the bytes of a character are complete;
    - SentencePiece style (Llama 2): at once, but for runs of byte tokens, which are text or
      replacement characters depending on the whole run;
    - one whose text may depend on any later token: everything comes from finish().
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        backend = tokenizer.backend
        self._token_of = backend.id_to_token
        self._skipped: frozenset[int] = frozenset()
        if skip_special_tokens:
            added = backend.get_added_tokens_decoder()
            self._skipped = frozenset(i for i, token in added.items() if token.special)
        self._decoder = _make(backend.decoder)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens settle, "" when they settle none."""
        tokens = (self._token_of(i) for i in token_ids if i not in self._skipped)
        return self._decoder.push([token for token in tokens if token is not None])

    def finish(self) -> str:
        """The rest of the text. Nothing may be pushed afterwards."""
        return self._decoder.finish()


def _make(decoder: tokenizers.decoders.Decoder | None):
    """The cheapest exact way to stream a decoder."""
    # The description that tokenizer.json holds too, without writing out a whole tokenizer.
    spec = None if decoder is None else json.loads(decoder.__getstate__())
    while spec is not None and spec["type"] == "Sequence" and len(spec["decoders"]) == 1:
        spec = spec["decoders"][0]
    if spec is not None and spec["type"] == "ByteLevel":
        return _ByteLevelDecoder()
    # The library joins with spaces when there is no decoder.
    decode = " ".join if decoder is None else decoder.decode
    if _is_local(spec) and decode([_SENTINEL]):
        return _LocalDecoder(decode)
    return _WholeDecoder(decode)


def _byte_of_character() -> dict[str, int]:
    """The byte each character stands for in byte-level vocabularies (as GPT-2 defined it).

    Bytes that print as a Latin-1 character stand for themselves; the others, in order, are the
    characters from U+0100 on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printing))
    table = {chr(byte): byte for byte in printing}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


class _ByteLevelDecoder:
    """Tokens are bytes: an incremental UTF-8 decoder holds back an unfinished character."""

    _BYTES = _byte_of_character()

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, tokens: list[str]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes, tokens)))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)

    def _bytes(self, token: str) -> bytes:
        try:
            return bytes([self._BYTES[character] for character in token])
        except KeyError:  # an added token, written as it is
            return token.encode("utf-8")


# Stands for all earlier text: decoders treat the first token apart (its leading space), and runs
# of byte tokens end at any other token.
_SENTINEL = "x"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _LocalDecoder:
    """Each token's text depends on the token, on being first, and on its run of byte tokens."""

    def __init__(self, decode):
        self._decode = decode
        self._prefix_length = len(decode([_SENTINEL]))
        self._head: list[str] | None = []  # the tokens so far, while they give no text
        self._run: list[str] = []  # byte tokens not followed by another token yet

    def push(self, tokens: list[str]) -> str:
        settled = len(tokens)
        while settled and _BYTE_TOKEN.fullmatch(tokens[settled - 1]):
            settled -= 1
        text = self._settle(self._run + tokens[:settled]) if settled else ""
        if settled:
            self._run = []
        self._run += tokens[settled:]
        return text

    def finish(self) -> str:
        run, self._run = self._run, []
        return self._settle(run)

    def _settle(self, tokens: list[str]) -> str:
        if self._head is None:
            return self._decode([_SENTINEL, *tokens])[self._prefix_length :]
        self._head += tokens
        text = self._decode(self._head)
        if text:
            self._head = None
        return text


class _WholeDecoder:
    """Any token may change the text before it: nothing is settled before the end."""

    def __init__(self, decode):
        self._decode = decode
        self._tokens: list[str] = []

    def push(self, tokens: list[str]) -> str:
        self._tokens += tokens
        return ""

    def finish(self) -> str:
        tokens, self._tokens = self._tokens, []
        return self._decode(tokens)


def _is_local(spec: dict[str, Any] | None) -> bool:
    """Whether _LocalDecoder is exact for a decoder, from its JSON description."""
    if spec is None:
        return True
    fused = False
    for step in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif not fused:
            # These look at one token (and whether it is the first, or a run of byte tokens).
            if kind not in ("Replace", "Strip", "ByteFallback", "Metaspace", "WordPiece"):
                return False
        elif kind == "Strip":
            if step["stop"] > 0:
                return False
        elif kind == "Replace":
            if len(step["pattern"].get("String", "")) != 1:
                return False
        else:
            return False
    return True


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, whatever the pieces are.

    The text ends where a stop string is first complete (of those complete at the same character,
    before the longest); text that may be the beginning of a stop string is held back until it is
    known. `matched` is the stop string found, else None.
    """

    def __init__(self, stops: Iterable[str]):
        if isinstance(stops, str):
            stops = [stops]
        if not isinstance(stops, Iterable):
            raise RequestError(f"stop: expected a string or strings, found {stops!r:.60}")
        self._stops = list(stops)
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop: expected non-empty strings, found {stop!r}")
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that may be shown now; "" once a stop string was found."""
        if self.matched is not None:
            return ""
        text = self._held + piece
        found = []
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        split = len(text) - self._open_length(text)
        self._held = text[split:]
        return text[:split]

    def finish(self) -> str:
        """The text held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _open_length(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
