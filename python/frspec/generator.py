"""The Python front of the engine: prompts in, text out."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from . import hub
from ._core import Engine
from .errors import RequestError, short
from .medusa import MedusaChoices, medusa_tree_options
from .ranking import Ranking
from .streaming import StopMatcher, StreamDecoder
from .tokenizer import Tokenizer
from .tree import Tree

Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]
Method = Literal["plain", "eagle2", "medusa"]


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds. decode_s is everything after the first token: draft_s + verify_s + rest_s."""

    load_s: float
    prefill_s: float
    decode_s: float
    draft_s: float
    verify_s: float
    rest_s: float
    tokens_per_s: float  # tokens after the first, per second of decoding


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished generation."""

    text: str  # "" for a model folder without a tokenizer
    token_ids: list[int]  # generated tokens, an ending token included
    prompt_tokens: int
    finish_reason: Literal["stop", "length", "cancelled"]
    accept_lengths: list[int]  # tokens that each round of draft and verification gave
    timings: Timings
    reused_tokens: int  # prompt tokens whose keys and values were still there
    device: str
    method: Method


class Generator:
    """A target model, and a drafter if there is one, in memory and ready to write.

    model, drafter: folder or hub id. ranking: a ranking file (`frspec rank-tokens`), of which the
    drafter scores the vocab_size most frequent tokens; None or "full": the whole vocabulary.
    device: "cpu", "cuda" (the first GPU), "cuda:N", or "auto", a GPU if there is one.
    dtype: "bf16", "fp16" or "fp32" for the weights in memory, by default as they are stored (fp32
    on a CPU only). max_context: tokens of prompt and answer together. memory_limit: bytes.
    threads: CPU threads, by default all that the process may use. tree: shape of the draft tree,
    by default what suits the device. medusa_choices: which nodes a Medusa drafter's tree has: the
    name of a published tree ("mc_sim_7b_63" by default), of which the first nodes that fit into
    `tree` are taken; or {"accuracies": [heads][ranks]}, of which the best tree of that size is
    made; or the whole tree, a list of paths of ranks such as [[0], [0, 0], [1]].

    One sequence at a time. A prompt that begins like the previous sequence reuses its KV cache.
    The output does not depend on drafter, ranking, vocab_size, tree, medusa_choices, method or
    threads.

    Raises ModelError, RankingError, HubError, RequestError, MemoryPlanError or DeviceError.

    Its memory is free again when it is closed (`close`, or the end of a `with` block) or gone.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        drafter: str | os.PathLike[str] | None = None,
        ranking: str | os.PathLike[str] | None = None,
        vocab_size: int | Literal["full"] | None = None,
        device: str = "auto",
        dtype: Literal["bf16", "fp16", "fp32"] | None = None,
        max_context: int | None = None,
        memory_limit: int | None = None,
        threads: int | None = None,
        tree: Tree | None = None,
        medusa_choices: MedusaChoices | None = None,
    ):
        began = time.perf_counter()
        self._engine, self._folder = plan_engine(
            model,
            drafter,
            ranking,
            vocab_size,
            device,
            dtype,
            max_context,
            memory_limit,
            threads,
            tree,
            medusa_choices,
        )
        self._engine.load()
        self._device = self._engine.device  # asking a GPU that has failed fails again
        self._tokenizer: Tokenizer | None = None
        if (self._folder / "tokenizer.json").exists():
            self._tokenizer = Tokenizer.load(self._folder)
        self._lock = threading.Lock()  # held around every use of the engine
        self._requests = threading.RLock()  # held while `generate` writes a text
        self._current: TextStream | None = None
        self._load_s = time.perf_counter() - began

    def close(self) -> None:
        """Frees the memory, once no other thread's `generate` is under way; a stream that is open
        ends as "cancelled". Requests raise RequestError from then on.
        """
        with self._requests, self._lock:
            if self._current is not None:
                self._current._finish("cancelled")
            self._engine = _Closed()

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; ModelError when its folder has none."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.load(self._folder)
        return self._tokenizer

    @property
    def device(self) -> str:
        return self._device

    @property
    def max_context(self) -> int:
        return self._engine.max_context

    @property
    def memory_plan(self) -> dict[str, int]:
        """Bytes by what they are for."""
        return dict(self._engine.plan)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        method: Method | None = None,
        ignore_eos: bool = False,
    ) -> Result:
        """Writes a continuation of the prompt.

        prompt: a text, token ids, or chat messages ([{"role": ..., "content": ...}], put into the
        model's chat template). temperature 0 takes the likeliest token; above, tokens are drawn
        from the softmax of logits / temperature over what top_k (0: all), top_p and min_p leave,
        and the same seed gives the same text whatever the method. stop: strings that end the text,
        not included in it. method: "eagle2" or "medusa", whichever the drafter is for (default
        with one), or "plain". ignore_eos: write on past ending tokens.

        Raises RequestError. KeyboardInterrupt ends it between two rounds; the generator stays
        usable. Requests of other threads wait until the text is written.
        """
        prompt = self.encode(prompt)  # what is wrong with it is said at once
        with self._requests:
            stream = self.stream(
                prompt, max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, method,
                ignore_eos,
            )  # fmt: skip
            for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        method: Method | None = None,
        ignore_eos: bool = False,
    ) -> TextStream:
        """Like `generate`, as an iterator of text pieces; joined they are the text of `generate`.

        Close it to end early. A new request closes a stream that is still open.
        """
        token_ids = self.encode(prompt)
        if method is None:
            method = self._engine.draft_method
        if not isinstance(method, str):
            raise RequestError(f"method: expected a name, found {short(method)}")
        request = {
            "method": method,
            "max_new_tokens": _number("max_new_tokens", max_new_tokens, int),
            "temperature": _number("temperature", temperature, float),
            "top_k": _number("top_k", top_k, int, _INT32),
            "top_p": _number("top_p", top_p, float),
            "min_p": _number("min_p", min_p, float),
            "seed": _number("seed", seed, int, (-(2**63), 2**64 - 1)) % 2**64,
            "ignore_eos": bool(ignore_eos),
        }
        matcher = StopMatcher(stop)
        decoder = None if self._tokenizer is None else StreamDecoder(self._tokenizer)
        if decoder is None and stop:
            raise RequestError("stop strings need a tokenizer; the model folder has none")
        stream = TextStream(self, method, len(token_ids), decoder, matcher)
        with self._requests, self._lock:
            previous, self._current = self._current, None
            if previous is not None:
                previous._remember_engine()
            try:
                self._engine.start(token_ids, **request)
            except RequestError:
                self._current = previous  # a refused request leaves the open stream alone
                raise
            self._current = stream
        return stream

    def encode(self, prompt: Prompt) -> np.ndarray:
        """Token ids (int32) of a prompt as `generate` takes it."""
        if isinstance(prompt, str):
            if not prompt:
                raise RequestError("the prompt is empty: expected a text")
            return np.array(self.tokenizer.encode(prompt), np.int32)
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            text = self.tokenizer.chat(prompt)
            return np.array(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        try:
            token_ids = np.asarray(prompt)
        except ValueError:
            token_ids = np.array(None)
        if token_ids.size == 0 and token_ids.ndim == 1:
            token_ids = token_ids.astype(np.int32)  # the engine says what is wrong with it
        if token_ids.ndim != 1 or token_ids.dtype.kind not in "iu":
            raise RequestError(
                "prompt: expected a text, a list of token ids or of chat messages,"
                f" found {type(prompt).__name__} {short(prompt)}"
            )
        limits = np.iinfo(np.int32)
        outside = token_ids[(token_ids < 0) | (token_ids > limits.max)]
        if outside.size:
            raise RequestError(f"token id {outside[0]} is outside [0, {self._engine.vocab_size})")
        return np.ascontiguousarray(token_ids, np.int32)


class _Closed:
    """Stands where a generator's engine was."""

    def __getattr__(self, name: str) -> NoReturn:
        raise RequestError("the generator is closed")


class TextStream(Iterator[str]):
    """The pieces of one generation. `result` tells the rest; it is there once the stream ended."""

    def __init__(
        self,
        generator: Generator,
        method: Method,
        prompt_tokens: int,
        decoder: StreamDecoder | None,
        matcher: StopMatcher,
    ):
        self._generator: Generator | None = generator
        self._lock = generator._lock
        self._method: Method = method
        self._prompt_tokens = prompt_tokens
        self._decoder = decoder
        self._matcher = matcher
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._accept_lengths: list[int] = []
        self._result: Result | None = None
        self._seconds: Mapping[str, float] = {}  # of the engine, as it was asked last
        self._reused_tokens = 0

    def __next__(self) -> str:
        while self._result is None:
            piece = self._step()
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Ends the generation here; what was written stands in `result`, as "cancelled"."""
        with self._lock:
            if self._result is None:
                self._finish("cancelled")

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def result(self) -> Result:
        """RequestError while the stream goes on."""
        if self._result is None:
            raise RequestError("the stream has not ended; exhaust or close it first")
        return self._result

    def _step(self) -> str:
        with self._lock:
            if self._result is not None:  # closed by another thread meanwhile
                return ""
            if self._generator._current is not self:
                return self._finish("cancelled")
            try:
                return self._round()
            except BaseException:  # an interrupt loses the round: nothing may follow the gap
                if self._result is None:
                    self._finish("cancelled")
                raise

    def _round(self) -> str:
        engine = self._generator._engine
        new_tokens = engine.step()
        first = not self._token_ids  # the first token comes from the prompt
        text = ""
        kept = 0
        for token_id in new_tokens:
            kept += 1
            self._token_ids.append(token_id)
            if self._decoder is not None:
                piece = self._matcher.push(self._decoder.push([token_id]))
                self._pieces.append(piece)
                text += piece
                if self._matcher.matched is not None:
                    break
        if new_tokens and not first:
            self._accept_lengths.append(kept)
        reason = "stop" if self._matcher.matched is not None else engine.finish_reason
        return text if reason is None else text + self._finish(reason)

    def _remember_engine(self) -> None:
        """The engine's figures, while they are this stream's."""
        engine = self._generator._engine
        self._seconds, self._reused_tokens = engine.timings, engine.reused_tokens

    def _finish(self, reason: Literal["stop", "length", "cancelled"]) -> str:
        """Settles the result; returns the text that was still held back."""
        rest = ""
        if self._decoder is not None and self._matcher.matched is None:
            rest = self._matcher.push(self._decoder.finish())
            if self._matcher.matched is not None:
                reason = "stop"
            rest += self._matcher.finish()
            self._pieces.append(rest)
        if self._generator._current is self:
            self._remember_engine()
            self._generator._current = None
        self._result = Result(
            text="".join(self._pieces),
            token_ids=list(self._token_ids),
            prompt_tokens=self._prompt_tokens,
            finish_reason=reason,
            accept_lengths=list(self._accept_lengths),
            timings=_timings(self._generator._load_s, self._seconds, sum(self._accept_lengths)),
            reused_tokens=self._reused_tokens,
            device=self._generator._device,
            method=self._method,
        )
        self._generator = self._decoder = None  # whose memory may be wanted now
        return rest


def plan_engine(
    model: str | os.PathLike[str],
    drafter: str | os.PathLike[str] | None = None,
    ranking: str | os.PathLike[str] | None = None,
    vocab_size: int | str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_context: int | None = None,
    memory_limit: int | None = None,
    threads: int | None = None,
    tree: Tree | None = None,
    medusa_choices: MedusaChoices | None = None,
) -> tuple[Engine, Path]:
    """The engine with its memory planned and nothing loaded, and the model's folder."""
    folder = hub.resolve(model)
    for name, value in (("device", device), ("dtype", "bf16" if dtype is None else dtype)):
        if not isinstance(value, str):
            raise RequestError(f"{name}: expected a name, found {short(value)}")
    if tree is not None and not isinstance(tree, Tree):
        raise RequestError(f"tree: expected a frspec.Tree, found {short(tree)}")
    sub_vocab_size = 0
    if vocab_size is not None and not (isinstance(vocab_size, str) and vocab_size == "full"):
        sub_vocab_size = _number("vocab_size", vocab_size, int)
        if sub_vocab_size < 1:
            raise RequestError(f'vocab_size must be positive or "full", found {vocab_size}')
    fingerprint = ""
    if ranking is not None:
        if vocab_size is None:
            raise RequestError(
                "a ranking needs vocab_size, how many of its tokens the drafter scores, or"
                ' "full"; found none'
            )
        if not isinstance(ranking, (str, os.PathLike)) or "\0" in os.fspath(ranking):
            raise RequestError(f"ranking: expected the path of a file, found {short(ranking)}")
        tokenizer = Tokenizer.load(folder)
        fingerprint = tokenizer.fingerprint
        loaded = Ranking.load(ranking)
        loaded.validate(fingerprint, tokenizer.vocab_size)
        ranking = loaded.path  # without ~
    medusa = medusa_tree_options(medusa_choices)
    if tree is not None and medusa.get("medusa_paths"):
        raise RequestError("medusa_choices: a list of paths is a whole tree; give it or tree")
    options = {
        "max_context": _option("max_context", max_context),
        "memory_limit": _option("memory_limit", memory_limit),
        "threads": _option("threads", threads),
        "tree": None
        if tree is None
        else (
            *(
                _number(f"tree {name}", getattr(tree, name), int, _INT32)
                for name in ("depth", "topk", "tokens")
            ),
            _number("tree min_probability", tree.min_probability, float),
        ),
    }
    engine = Engine(
        str(folder),
        drafter=None if drafter is None else str(hub.resolve(drafter)),
        ranking=ranking,
        draft_vocab_size=sub_vocab_size,
        tokenizer_fingerprint=fingerprint,
        device=device,
        dtype=dtype,
        **options,
        **medusa,
    )
    return engine, folder


def _timings(load_s: float, seconds: Mapping[str, float], decoded_tokens: int) -> Timings:
    draft, verify = seconds.get("draft", 0.0), seconds.get("verify", 0.0)
    rest = seconds.get("rest", 0.0)
    decode = draft + verify + rest
    return Timings(
        load_s=load_s,
        prefill_s=seconds.get("prefill", 0.0),
        decode_s=decode,
        draft_s=draft,
        verify_s=verify,
        rest_s=rest,
        tokens_per_s=decoded_tokens / decode if decode > 0 else 0.0,
    )


_INT32 = (-(2**31), 2**31 - 1)
_INT64 = (-(2**63), 2**63 - 1)


def _number(
    name: str,
    value: Any,
    kind: type[int] | type[float],
    limits: tuple[int, int] = _INT64,
) -> Any:
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed):
        expected = "an integer" if kind is int else "a number"
        raise RequestError(f"{name} must be {expected}, found {short(value)}")
    if kind is int and not limits[0] <= value <= limits[1]:
        raise RequestError(f"{name} must be {limits[0]} to {limits[1]}, found {short(value)}")
    try:
        return kind(value)
    except OverflowError:
        raise RequestError(f"{name} must be a finite number, found {short(value)}") from None


def _option(name: str, value: int | None) -> int:
    """An option of the engine where 0 means "by default" and a user says None."""
    if value is None:
        return 0
    number = _number(name, value, int)
    if not 1 <= number < 2**31 and not (name == "memory_limit" and 1 <= number < 2**63):
        expected = "a positive number" if number < 1 else "below 2^31"
        raise RequestError(f"{name} must be {expected}, found {value}")
    return number
