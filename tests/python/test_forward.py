"""The forward pass of every family and dtype against the double-precision reference.

The weights are the same numbers on both sides, so what remains is the runtime's own rounding: of
fp32 sums, and of the activations that enter a product with bf16 weights where the instruction set
multiplies bf16 by bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from reference import tiny
from reference.llama import Llama, relative_margin
from reference.storage import decode, encode


@dataclass(frozen=True)
class Accuracy:
    """What may be expected of a row of logits."""

    error: float  # |found - expected| / |expected|, of the whole row
    margin: float  # two best logits this far apart (in rms of the row) do not change places


def accuracy(generator, dtype: str) -> Accuracy:
    if dtype == "bfloat16" and "avx512_bf16" in generator._engine.device_description:
        return Accuracy(error=0.02, margin=0.12)
    return Accuracy(error=5e-6, margin=5e-5)


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    assert np.isfinite(found).all()
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def clear_prompts(target, lengths: list[int], count: int, margin: float) -> list[tuple]:
    """For each length a random prompt whose greedy text of `count` tokens has no near-tie."""
    chosen = []
    for length in lengths:
        for seed in range(200):
            prompt = np.random.default_rng([seed, length]).integers(0, len(target.head), length)
            text = target.greedy(prompt.tolist(), count, margin)
            if len(text) == count:
                chosen.append((prompt.tolist(), text))
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens is clear of near-ties")
    return chosen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_greedy_text_and_logits(tiny_models, new_tiny_generator, step_rounds, name, dtype):
    model = tiny.FAMILIES[name].with_(dtype=dtype)
    _, target = tiny_models.target(model)
    generator = new_tiny_generator(model)
    allowed = accuracy(generator, dtype)
    for prompt, text in clear_prompts(target, [1, 2, 17, 65], 6, allowed.margin):
        result = generator.generate(prompt, max_new_tokens=6, temperature=0.0)
        assert result.token_ids == text
        assert result.finish_reason == "length"

        logits, _ = target.forward(prompt + text)
        rounds = list(step_rounds(generator, prompt, max_new_tokens=6))
        assert [token for each in rounds for token in each.emitted] == text
        for each in rounds:
            expected = logits[len(each.before) - 1]
            assert each.logits.shape == (1, model.vocab)
            assert relative_error(each.logits[0], expected) < allowed.error


@pytest.mark.parametrize(
    "length", [1, 2, 3, 7, 8, 9, 63, 64, 65, 255, 256, 257, 511, 512, 513, 700]
)
def test_prompts_of_every_length(tiny_models, new_tiny_generator, step_rounds, length):
    """Prompts are computed in chunks and keys are read in blocks: try the lengths around both."""
    model = tiny.FAMILIES["llama3.1"]
    _, target = tiny_models.target(model)
    generator = new_tiny_generator(model)
    prompt = np.random.default_rng(length).integers(0, model.vocab, length).tolist()
    rounds = list(step_rounds(generator, prompt, max_new_tokens=3))
    text = [token for each in rounds for token in each.emitted]
    expected, _ = target.forward(prompt + text)
    for each in rounds:
        row = expected[len(each.before) - 1]
        assert relative_error(each.logits[0], row) < accuracy(generator, "float32").error


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_longer_greedy_text(tiny_models, new_tiny_generator, dtype):
    """48 tokens on; where a token differs, the reference must call it a near-tie."""
    model = tiny.FAMILIES["smollm2"].with_(dtype=dtype)
    _, target = tiny_models.target(model)
    generator = new_tiny_generator(model)
    margin = accuracy(generator, dtype).margin
    different = near_ties = 0
    for seed in range(4):
        prompt = np.random.default_rng([9, seed]).integers(0, model.vocab, 12).tolist()
        text = generator.generate(prompt, max_new_tokens=48, temperature=0.0).token_ids
        assert len(text) == 48
        logits = target.forward(prompt + text)[0][len(prompt) - 1 : -1]
        for row, token in zip(logits, text, strict=True):
            near_ties += relative_margin(row) < margin
            if row.argmax() != token:
                different += 1
                assert row.max() - row[token] < margin * np.sqrt((row**2).mean())
    assert different <= max(1, near_ties) and near_ties < 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_instruction_sets(
    tiny_models, new_tiny_generator, step_rounds, instruction_set, isa, dtype
):
    """Every instruction set that this CPU has, on the family with the raggedest sizes."""
    instruction_set(isa)
    model = tiny.FAMILIES["linear"].with_(dtype=dtype)
    _, target = tiny_models.target(model)
    generator = new_tiny_generator(model)
    assert isa in generator._engine.device_description
    error = accuracy(generator, dtype).error
    for length in (1, 5, 70):
        prompt = np.random.default_rng(length).integers(0, model.vocab, length).tolist()
        for each in step_rounds(generator, prompt, max_new_tokens=5):
            expected = target.forward(each.before)[0][-1]
            assert relative_error(each.logits[0], expected) < error


@pytest.mark.parametrize(
    ("stored", "kept"),
    [("float32", "bfloat16"), ("float32", "float16"), ("float16", "bfloat16"),
     ("bfloat16", "float16"), ("bfloat16", "float32")],
)  # fmt: skip
def test_dtype_option_rounds_the_weights(
    tiny_models, new_tiny_generator, step_rounds, stored, kept
):
    """Matrices kept in another dtype than they are stored in: the nearest values of it."""
    model = tiny.FAMILIES["llama2"].with_(dtype=stored)
    _, target = tiny_models.target(model)
    rounded = {
        name: decode(*encode(values, kept)) if values.ndim == 2 else values
        for name, values in target.weights.items()
    }
    prompt = [5, 300, 17, 8]
    generator = new_tiny_generator(model, dtype=kept)
    (first,) = step_rounds(generator, prompt, max_new_tokens=1)
    expected = Llama(target.config, rounded).forward(prompt)[0][-1]
    assert relative_error(first.logits[0], expected) < accuracy(generator, kept).error


def test_tree_rows_against_the_reference(tiny_models, new_tiny_generator, step_rounds):
    """Every node of verified trees has the logits of its path, accepted or not."""
    model = tiny.FAMILIES["qwen2"]
    _, target = tiny_models.target(model)
    generator = new_tiny_generator(model, drafter=tiny.TinyDrafter(), tree=(4, 5, 40))
    prompt = np.random.default_rng(6).integers(0, model.vocab, 20).tolist()
    checked = 0
    for each in step_rounds(generator, prompt, method="eagle2", max_new_tokens=12):
        paths: list[list[int]] = []
        for token, parent in zip(each.tokens.tolist(), each.parents.tolist(), strict=True):
            paths.append([] if parent < 0 else [*paths[parent], token])
        for path, row in zip(paths, each.logits, strict=True):
            expected = target.forward(each.before + path)[0][-1]
            assert relative_error(row, expected) < accuracy(generator, "float32").error
            checked += 1
    assert checked > 100
