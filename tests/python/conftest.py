"""Shared fixtures: tiny models with their references, rankings, and stepping round by round."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reference import tiny
from reference.eagle import Eagle
from reference.llama import Llama
from reference.medusa import Medusa
from reference.storage import write_safetensors

# A shell's background job, and what it starts, ignores Ctrl-C: the tests of it need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class RankingFile:
    """A ranking file and the order that is in it."""

    path: Path
    order: np.ndarray

    def sub_vocab(self, size: int, always: tuple[int, ...] = ()) -> np.ndarray:
        """Ascending ids of the `size` first tokens; `always` displaces the last ones."""
        forced = [token for token in always if token not in self.order[:size]]
        rest = [token for token in self.order if token not in always]
        present = len(always) - len(forced)
        return np.sort([*always, *rest[: size - present - len(forced)]])


class TinyModels:
    """Writes each tiny model, drafter and ranking once and keeps it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache: dict = {}

    def _once(self, key, make: Callable[[Path], object]):
        if key not in self.cache:
            self.cache[key] = make(self.root / str(len(self.cache)))
        return self.cache[key]

    def target(self, model: tiny.TinyModel) -> tuple[Path, Llama]:
        def make(folder: Path):
            tiny.write_model(folder, model)
            return folder, Llama.load(folder)

        return self._once(("target", repr(model)), make)

    def drafter(self, model: tiny.TinyModel, drafter: tiny.TinyDrafter) -> tuple[Path, Eagle]:
        folder, target = self.target(model)

        def make(own: Path):
            tiny.write_drafter(own, model, folder, drafter)
            return own, Eagle.load(own, target)

        return self._once(("drafter", repr(model), drafter), make)

    def medusa(self, model: tiny.TinyModel, heads: tiny.TinyMedusa) -> tuple[Path, Medusa]:
        folder, target = self.target(model)

        def make(own: Path):
            tiny.write_medusa(own, model, folder, heads)
            return own, Medusa.load(own, target)

        return self._once(("medusa", repr(model), heads), make)

    def ranking(self, model: tiny.TinyModel) -> RankingFile:
        """Ranks the tokens that the model tends to write first."""
        _, target = self.target(model)

        def make(folder: Path):
            path = folder.with_suffix(".safetensors")
            order = tiny.frequent_tokens(target)
            write_ranking(path, order, tiny.tokenizer_fingerprint(model))
            return RankingFile(path, order)

        return self._once(("ranking", repr(model)), make)


def write_ranking(path: Path, order: np.ndarray, fingerprint: str) -> None:
    """A ranking file over the whole vocabulary with falling counts."""
    counts = np.arange(len(order), 0, -1, dtype=np.int64)
    metadata = {
        "format": "frspec-ranking",
        "version": "1",
        "tokenizer_fingerprint": fingerprint,
        "corpus": "made up",
        "tokens_counted": str(counts.sum()),
        "special_ids": "[]",
        "vocab_size": str(len(order)),
        "source": "counted",
    }
    # The wider type first, as the format's own writer orders them: both stay aligned.
    tensors = {"counts": ("I64", counts), "token_ids": ("I32", order.astype(np.int32))}
    write_safetensors(path, tensors, metadata)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ranking_writer() -> Callable[..., None]:
    return write_ranking


@dataclass
class EngineRound:
    """One pass of the runtime that chose tokens: the end of the prompt, or a verified tree.

    The end of the prompt counts as a tree of one node, its last token.
    """

    before: list[int]  # the sequence it started from; its last token is the root
    tokens: np.ndarray  # int32 [n] of the tree
    parents: np.ndarray  # int32 [n], -1 for the root
    logits: np.ndarray  # float32 [n, v]
    emitted: list[int]
    is_prompt: bool


def engine_rounds(generator, prompt: list[int], **options) -> Iterator[EngineRound]:
    """Runs a request one pass at a time. The only place that knows the engine's own API."""
    engine = generator._engine
    engine.start(np.asarray(prompt, dtype=np.int32), **options)
    sequence = list(prompt)
    while engine.finish_reason is None:
        emitted = list(engine.step())
        if not emitted:
            continue  # a chunk of the prompt, but not its last
        is_prompt = len(sequence) == len(prompt)
        tokens, parents = engine.last_tree()
        if is_prompt:
            assert len(tokens) == 0
            tokens, parents = np.array(prompt[-1:], np.int32), np.array([-1], np.int32)
        logits = engine.last_logits()
        yield EngineRound(list(sequence), tokens, parents, logits, emitted, is_prompt)
        sequence += emitted


@pytest.fixture(scope="session")
def step_rounds() -> Callable[..., Iterator[EngineRound]]:
    return engine_rounds


def make_generator(folder: Path, **options):
    """A Generator on the CPU whose context is long enough for every tiny test."""
    import frspec  # late: the references are tested without the compiled core

    options = {"device": "cpu", "threads": 2, "max_context": 768} | options
    return frspec.Generator(str(folder), **options)


@pytest.fixture(scope="session")
def new_generator() -> Callable[..., object]:
    return make_generator


@pytest.fixture
def new_tiny_generator(tiny_models):
    """new(model, drafter=None, vocab_size=None, tree=None, **options).

    drafter: a TinyDrafter or a TinyMedusa. tree: (depth, topk, tokens[, min_probability]).
    """

    def new(model: tiny.TinyModel, drafter=None, vocab_size=None, tree=None, **options):
        import frspec

        if vocab_size is not None:
            model = model.with_(tokenizer=True)  # rankings are checked against the tokenizer
        folder, _ = tiny_models.target(model)
        if drafter is not None:
            medusa = isinstance(drafter, tiny.TinyMedusa)
            find = tiny_models.medusa if medusa else tiny_models.drafter
            options["drafter"] = str(find(model, drafter)[0])
        if vocab_size is not None:
            options["ranking"] = str(tiny_models.ranking(model).path)
            options["vocab_size"] = vocab_size
        if tree is not None:
            options["tree"] = frspec.Tree(*tree)
        return make_generator(folder, **options)

    return new


@pytest.fixture
def instruction_set(monkeypatch, tiny_models):
    """choose(name): generators made from here on use that instruction set, or the test skips."""

    def choose(name: str) -> None:
        from frspec import DeviceError

        monkeypatch.setenv("FRSPEC_CPU_ISA", name)
        try:
            make_generator(tiny_models.target(tiny.FAMILIES["linear"])[0])
        except DeviceError as error:
            assert "this CPU cannot run" in str(error)
            pytest.skip(str(error))

    return choose
