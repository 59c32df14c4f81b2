"""Draft trees, round by round, against the double-precision EAGLE-2 reference.

A tree is compared exactly (tokens, parents, order) wherever no decision that shaped it was closer
than the runtime's rounding; where one was, the trees may differ, and the tests count how many
comparisons remain.
"""

from __future__ import annotations

import numpy as np
import pytest

from reference import tiny

# Sums of log-probabilities of magnitude 10 to 50 in fp32, through a few tiny layers.
MARGIN = 2e-4

DRAFTERS = {
    "plain": tiny.TinyDrafter(),
    "fc_bias": tiny.TinyDrafter(fc_bias=True, seed=11),
    "attention_bias": tiny.TinyDrafter(attention_bias=True, seed=12),
    "two_layers": tiny.TinyDrafter(layers=2, seed=13),
    "own_embedding": tiny.TinyDrafter(own_embedding=True, fc_bias=True, seed=14),
    "all": tiny.TinyDrafter(
        layers=3, fc_bias=True, attention_bias=True, own_embedding=True, seed=15
    ),
}

# (depth, topk, tokens[, min_probability])
TREES = [
    (1, 1, 1), (3, 4, 1), (1, 1, 2), (4, 1, 5), (1, 10, 11), (2, 2, 5), (3, 4, 13),
    (6, 10, 59), (6, 10, 60), (5, 10, 63), (5, 8, 64), (6, 10, 65), (5, 10, 100), (6, 10, 256),
    (2, 3, 60),  # the pool has 3 + 9 nodes: all are taken
    (12, 2, 40),
]  # fmt: skip


class Comparison:
    """Compares a generator's rounds with the reference; counts what was exactly comparable."""

    def __init__(self, step_rounds, reference, margin: float = MARGIN) -> None:
        self.step_rounds, self.reference, self.margin = step_rounds, reference, margin
        self.compared = self.near_ties = 0
        self.sizes: set[int] = set()

    def run(self, generator, prompt, tree, sub_vocab=None, **options) -> None:
        depth, topk, tokens, min_probability = (*tree, 0.0)[:4]
        sequence = list(prompt)
        for each in self.step_rounds(generator, prompt, method="eagle2", **options):
            assert each.before == sequence
            sequence += each.emitted
            if each.is_prompt:
                continue
            _, features = self.reference.target.forward(each.before[:-1])
            expected = self.reference.draft(
                each.before, features,
                depth=depth, topk=topk, tree_tokens=tokens, min_probability=min_probability,
                sub_vocab=sub_vocab,
            )  # fmt: skip
            assert each.logits.shape[0] == len(each.tokens) == len(each.parents)
            assert min_probability or len(each.tokens) == len(expected.tokens)
            if expected.margin < self.margin:
                self.near_ties += 1
                continue
            self.sizes.add(len(expected.tokens))
            np.testing.assert_array_equal(each.tokens, expected.tokens)
            np.testing.assert_array_equal(each.parents, expected.parents)
            self.compared += 1


def prompt_of(model: tiny.TinyModel, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, model.vocab, length).tolist()


@pytest.fixture
def compare_trees(tiny_models, new_tiny_generator, step_rounds):
    """compare(tree, size, max_new_tokens): the rounds of three prompts."""

    def compare(tree, size, max_new_tokens: int) -> Comparison:
        model, drafter = tiny.FAMILIES["llama3"], DRAFTERS["plain"]
        _, reference = tiny_models.drafter(model, drafter)
        generator = new_tiny_generator(model, drafter=drafter, vocab_size=size, tree=tree)
        sub_vocab = tiny_models.ranking(model).sub_vocab(size) if size else None
        comparison = Comparison(step_rounds, reference)
        for seed in range(3):
            prompt = prompt_of(model, 5 + 9 * seed, seed)
            comparison.run(generator, prompt, tree, sub_vocab, max_new_tokens=max_new_tokens)
        return comparison

    return compare


@pytest.mark.parametrize("size", [None, 7, 33, 129], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: "x".join(map(str, tree)))
def test_tree_shapes(compare_trees, tree, size):
    comparison = compare_trees(tree, size, max_new_tokens=6)
    assert comparison.compared >= 1
    assert comparison.compared > comparison.near_ties or tree[2] > 100


@pytest.mark.parametrize("size", [None, 33], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("least", [1e-4, 0.01, 0.06, 0.3, 0.9])
def test_unlikely_nodes_are_left_out(compare_trees, least, size):
    comparison = compare_trees((5, 4, 64, least), size, max_new_tokens=16)
    assert comparison.compared > comparison.near_ties
    assert len(comparison.sizes) > 1, "trees of one size prove nothing"


@pytest.mark.parametrize("size", [None, 50], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", ["llama2", "llama3.2", "qwen2", "wide_heads"])
def test_drafter_kinds(tiny_models, new_tiny_generator, step_rounds, name, kind, size):
    model, drafter, tree = tiny.FAMILIES[name], DRAFTERS[kind], (4, 4, 24)
    _, reference = tiny_models.drafter(model, drafter)
    generator = new_tiny_generator(model, drafter=drafter, vocab_size=size, tree=tree)
    sub_vocab = tiny_models.ranking(model).sub_vocab(size) if size else None
    comparison = Comparison(step_rounds, reference)
    comparison.run(generator, prompt_of(model, 11), tree, sub_vocab, max_new_tokens=10)
    # The next prompt extends the last: committed drafter rows are kept and must still be right.
    comparison.run(generator, prompt_of(model, 30), tree, sub_vocab, max_new_tokens=6)
    assert comparison.compared > comparison.near_ties


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_long_runs(tiny_models, new_tiny_generator, step_rounds, temperature):
    """Many rounds: the drafter's cache stays right however many nodes each round accepts."""
    model, drafter, tree = tiny.FAMILIES["smollm2"], DRAFTERS["plain"], (4, 3, 16)
    _, reference = tiny_models.drafter(model, drafter)
    generator = new_tiny_generator(model, drafter=drafter, tree=tree)
    comparison = Comparison(step_rounds, reference)
    comparison.run(
        generator, prompt_of(model, 40), tree, max_new_tokens=60, temperature=temperature, seed=5
    )
    assert comparison.compared >= 10
    assert comparison.compared > 4 * comparison.near_ties


def test_prompt_kept_from_the_last_request(tiny_models, new_tiny_generator, step_rounds):
    """Rows that the drafter keeps over a shared prefix, with and without plain text in between."""
    model, drafter, tree = tiny.FAMILIES["llama3"], DRAFTERS["two_layers"], (3, 3, 12)
    _, reference = tiny_models.drafter(model, drafter)
    generator = new_tiny_generator(model, drafter=drafter, tree=tree)
    comparison = Comparison(step_rounds, reference)
    prompt = prompt_of(model, 20)
    comparison.run(generator, prompt, tree, max_new_tokens=8)
    text = generator.generate(prompt, max_new_tokens=8, temperature=0.0).token_ids
    comparison.run(generator, [*prompt, *text, 3, 4, 5], tree, max_new_tokens=5)
    comparison.run(generator, [*prompt, *text, 3, 4, 5], tree, max_new_tokens=5)
    comparison.run(generator, [*prompt[:10], 6], tree, max_new_tokens=5)
    comparison.run(generator, prompt, tree, max_new_tokens=5)
    assert comparison.compared > 4 * comparison.near_ties


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights(tiny_models, new_tiny_generator, step_rounds, instruction_set, dtype):
    """On fp32 activations: where they are rounded to bf16, too many candidates are near-ties."""
    instruction_set("portable")
    model = tiny.FAMILIES["llama3"].with_(dtype=dtype)
    drafter, tree = tiny.TinyDrafter(dtype=dtype), (4, 4, 24)
    _, reference = tiny_models.drafter(model, drafter)
    generator = new_tiny_generator(model, drafter=drafter, tree=tree)
    comparison = Comparison(step_rounds, reference, margin=10 * MARGIN)
    for seed in range(4):
        comparison.run(generator, prompt_of(model, 10, seed), tree, max_new_tokens=16)
    assert comparison.compared >= 10
