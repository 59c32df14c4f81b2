"""Contract: speculative text is the text the target writes alone, bit for bit, whatever drafts.

The contract holds at every temperature with the same seed, for every drafter, sub-vocabulary,
tree shape and thread count, at the end of the context and where a text stops.
"""

from __future__ import annotations

import numpy as np
import pytest

from reference import tiny

DRAFTER = tiny.TinyDrafter(fc_bias=True)
TREES = [(1, 1, 1), (1, 4, 5), (3, 1, 4), (4, 3, 16), (6, 10, 60), (5, 8, 65), (5, 10, 256)]
TREES += [(4, 4, 6, 0.08), (6, 10, 60, 0.01)]


def prompt_of(model: tiny.TinyModel, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([7, seed, length]).integers(0, model.vocab, length).tolist()


def check_accept_lengths(result, depth: int) -> None:
    """The first token comes from the prompt; each round then emits one to depth + 1."""
    assert sum(result.accept_lengths) == len(result.token_ids) - 1
    assert all(1 <= length <= depth + 1 for length in result.accept_lengths)


@pytest.mark.parametrize("size", [None, 5, 64], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: "x".join(map(str, tree)))
def test_same_text(new_tiny_generator, tree, size):
    model = tiny.FAMILIES["smollm2"].with_(dtype="bfloat16")
    plain = new_tiny_generator(model)
    fast = new_tiny_generator(model, drafter=DRAFTER, vocab_size=size, tree=tree)
    for seed, length in enumerate([1, 2, 9, 33, 100]):
        prompt = prompt_of(model, length)
        for sampling in (
            {"temperature": 0.0},
            {"temperature": 1.0, "seed": seed},
            {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**33 + seed},
        ):
            alone = plain.generate(prompt, max_new_tokens=40, **sampling)
            drafted = fast.generate(prompt, max_new_tokens=40, method="eagle2", **sampling)
            assert drafted.token_ids == alone.token_ids
            assert drafted.finish_reason == alone.finish_reason == "length"
            assert alone.accept_lengths == [1] * 39
            check_accept_lengths(drafted, tree[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_same_text_in_every_family(tiny_models, new_tiny_generator, name, dtype):
    model = tiny.FAMILIES[name].with_(dtype=dtype)
    drafter = tiny.TinyDrafter(dtype=dtype)
    fast = new_tiny_generator(model, drafter=drafter, vocab_size=80, tree=(5, 4, 30))
    prompt = prompt_of(model, 21)
    longest = 0
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 4}):
        alone = fast.generate(prompt, max_new_tokens=64, method="plain", **sampling)
        drafted = fast.generate(prompt, max_new_tokens=64, method="eagle2", **sampling)
        assert drafted.token_ids == alone.token_ids
        longest = max(longest, *drafted.accept_lengths)
    assert longest > 1, "the drafter should be right now and then"


def test_a_sub_vocabulary_of_all_tokens_takes_no_copy_of_the_head(new_tiny_generator):
    model, drafter = tiny.FAMILIES["llama3"], tiny.TinyDrafter()
    full = new_tiny_generator(model, drafter)
    every = new_tiny_generator(model, drafter, model.vocab)
    assert every.memory_plan == full.memory_plan
    one, other = (each.generate([3, 1, 4], max_new_tokens=12) for each in (full, every))
    assert one.token_ids == other.token_ids and one.accept_lengths == other.accept_lengths


def test_threads_change_nothing(new_tiny_generator, step_rounds):
    model = tiny.FAMILIES["qwen2.5"].with_(dtype="bfloat16")
    prompt = prompt_of(model, 50)
    runs = []
    for threads in (1, 2, 3):
        fast = new_tiny_generator(model, drafter=DRAFTER, tree=(4, 4, 24), threads=threads)
        options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 8}
        runs.append(list(step_rounds(fast, prompt, method="eagle2", **options)))
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for ours, theirs in zip(runs[0], other, strict=True):
            assert ours.emitted == theirs.emitted
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.logits, theirs.logits)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "tree", [(4, 3, 16), (6, 10, 60), (6, 10, 65), (5, 10, 200), (6, 10, 60, 0.01)], ids=str
)
def test_rows_are_bit_identical_in_any_tree(
    new_tiny_generator, step_rounds, instruction_set, tree, dtype, isa
):
    """Row invariance: logits of accepted nodes equal those of plain decoding, bit for bit."""
    instruction_set(isa)
    model = tiny.FAMILIES["llama3.1"].with_(dtype=dtype)
    fast = new_tiny_generator(model, drafter=DRAFTER, tree=tree)
    for length in (3, 62, 130):
        prompt = prompt_of(model, length)
        alone = {
            len(each.before): each.logits[0]
            for each in step_rounds(fast, prompt, method="plain", max_new_tokens=40)
        }
        accepted = 0
        for each in step_rounds(fast, prompt, method="eagle2", max_new_tokens=40):
            node = 0
            for step, token in enumerate(each.emitted):
                expected = alone[len(each.before) + step]
                np.testing.assert_array_equal(each.logits[node], expected)
                accepted += step > 0
                children = np.flatnonzero((each.parents == node) & (each.tokens == token))
                node = children[0] if len(children) else None
                assert (node is not None) or step == len(each.emitted) - 1
        assert accepted > 0


@pytest.mark.parametrize("tree", [(1, 4, 5), (4, 4, 6, 0.08), (6, 10, 60), (5, 10, 256)], ids=str)
@pytest.mark.parametrize("left", [1, 2, 3, 7, 20])
def test_end_of_the_context(new_tiny_generator, tree, left):
    """The text runs to the last position of the context and not beyond."""
    model, context = tiny.FAMILIES["llama3"], 48
    plain = new_tiny_generator(model, max_context=context)
    fast = new_tiny_generator(model, drafter=DRAFTER, tree=tree, max_context=context)
    prompt = prompt_of(model, context - left)
    for sampling in ({"temperature": 0.0}, {"temperature": 1.0, "seed": left}):
        alone = plain.generate(prompt, max_new_tokens=500, **sampling)
        drafted = fast.generate(prompt, max_new_tokens=500, method="eagle2", **sampling)
        assert drafted.token_ids == alone.token_ids
        assert len(alone.token_ids) == left
        assert drafted.finish_reason == alone.finish_reason == "length"


@pytest.mark.parametrize("count", range(1, 12))
def test_length_limit_inside_a_run(new_tiny_generator, count):
    """max_new_tokens cuts an accepted run; tokens behind it are never returned."""
    model = tiny.FAMILIES["llama3.1"]
    fast = new_tiny_generator(model, drafter=tiny.TinyDrafter(), tree=(5, 4, 24))
    prompt = [3, 5, 7]
    whole = fast.generate(prompt, max_new_tokens=12, method="plain", temperature=0.0).token_ids
    cut = fast.generate(prompt, max_new_tokens=count, method="eagle2", temperature=0.0)
    assert cut.token_ids == whole[:count]
    assert cut.finish_reason == "length"
    assert sum(cut.accept_lengths) == count - 1


def test_end_token_inside_a_run(new_tiny_generator, step_rounds):
    """An end token in the middle of an accepted run ends the text there."""
    model = tiny.FAMILIES["llama3.1"]
    drafter, tree, prompt = tiny.TinyDrafter(), (5, 4, 24), [3, 5, 7]
    fast = new_tiny_generator(model, drafter=drafter, tree=tree)
    seen: list[int] = []
    ends = []
    for each in step_rounds(fast, prompt, method="eagle2", max_new_tokens=60):
        for place, token in enumerate(each.emitted):
            if token not in seen and 0 < place < len(each.emitted) - 1:
                ends.append((token, len(seen)))
            seen.append(token)
    assert ends, "some accepted run should bring a new token in its middle"
    for token, place in ends[:3]:
        # Two end tokens, as instruction models have; the other one never appears.
        other = next(t for t in range(model.vocab) if t not in seen)
        ending = model.with_(eos=[other, token])
        fast = new_tiny_generator(ending, drafter=drafter, tree=tree, vocab_size=90)
        plain = fast.generate(prompt, max_new_tokens=60, temperature=0.0, method="plain")
        drafted = fast.generate(prompt, max_new_tokens=60, temperature=0.0, method="eagle2")
        assert plain.token_ids == seen[: place + 1]
        assert drafted.token_ids == plain.token_ids
        assert drafted.finish_reason == plain.finish_reason == "stop"
        check_accept_lengths(drafted, tree[0])


def test_requests_in_a_row(new_tiny_generator, step_rounds):
    """Kept prefixes change nothing: plain, speculative and mixed requests in a row, each against
    a generator that has seen nothing before."""
    model = tiny.FAMILIES["qwen2"].with_(dtype="bfloat16")
    first = prompt_of(model, 30)
    fresh = new_tiny_generator(model)
    text = fresh.generate(first, max_new_tokens=20, temperature=1.0, seed=1).token_ids
    prompts = [
        first,
        [*first, *text],  # extends the whole text
        [*first, *text, 5, 6, 7],
        [*first, *text[:4], 9],  # leaves it inside the text
        first[:12],  # a prefix of it
        [8, *first],  # shares nothing
        first,
        first,
    ]

    def run(generator, prompt, method):
        options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "method": method}
        rounds = list(step_rounds(generator, prompt, **options))
        return [token for each in rounds for token in each.emitted], rounds[0].logits[0]

    expected = [run(new_tiny_generator(model), prompt, "plain") for prompt in prompts]
    for methods in (["plain"], ["eagle2"], ["plain", "eagle2"], ["eagle2", "eagle2", "plain"]):
        generator = new_tiny_generator(model, drafter=DRAFTER, tree=(5, 5, 32))
        for index, (prompt, (tokens, logits)) in enumerate(zip(prompts, expected, strict=True)):
            found, found_logits = run(generator, prompt, methods[index % len(methods)])
            assert found == tokens
            np.testing.assert_array_equal(found_logits, logits)
