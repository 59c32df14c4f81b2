"""Sampled tokens against the distribution that the reference says they come from.

The filters apply in Hugging Face's order: temperature, top-k, top-p, min-p, each to the
renormalised rest of the one before.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from reference import tiny
from reference.llama import log_softmax

MODEL = tiny.FAMILIES["wide_heads"]
PROMPT = [11, 4, 200, 31]
DRAWS = 3000


def distribution(
    logits: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Probabilities [v] that temperature and filters leave, in double precision."""
    p = np.exp(log_softmax(logits / temperature))
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
        p /= p.sum()
    if top_p < 1.0:
        before = np.cumsum(p[order]) - p[order]  # mass of the likelier tokens
        assert np.abs(before - top_p).min() > 1e-5, "top-p cuts too close to a token to test"
        p[order[before >= top_p]] = 0.0
        p /= p.sum()
    if min_p > 0.0:
        ratio = p / p.max()
        assert np.abs(ratio - min_p).min() > 1e-5, "min-p cuts too close to a token to test"
        p[ratio < min_p] = 0.0
    return p / p.sum()


def chi_square_p_value(tokens: np.ndarray, p: np.ndarray) -> float:
    """Of the counts against p; tokens expected fewer than five times are counted together."""
    counts = np.bincount(tokens, minlength=len(p)).astype(float)
    assert counts[p == 0.0].sum() == 0, "a token was sampled that the filters remove"
    expected = p * len(tokens)
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    if keep.sum() < 2:
        return 1.0
    return float(stats.chisquare(counts[keep], expected[keep]).pvalue)


@pytest.fixture(scope="module")
def setting(tiny_models, new_generator):
    folder, target = tiny_models.target(MODEL)
    return new_generator(folder), target.forward(PROMPT)[0][-1]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 1.0},
        {"temperature": 1.5},
        {"temperature": 1.5, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.5, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.85},
        {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.08},
        {"temperature": 2.5, "top_k": 60, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=lambda sampling: "-".join(f"{name}_{value}" for name, value in sampling.items()),
)
def test_first_tokens_follow_the_softmax(setting, sampling):
    generator, logits = setting
    p = distribution(logits, **sampling)
    assert (p > 5 / DRAWS).sum() >= 5, "the distribution should have something to test"
    tokens = np.array(
        [
            generator.generate(PROMPT, max_new_tokens=1, seed=seed, **sampling).token_ids[0]
            for seed in range(DRAWS)
        ]
    )
    # A right sampler fails one of the nine once in a thousand choices of seeds; these are fixed.
    assert chi_square_p_value(tokens, p) > 1e-4


def test_the_statistic_notices_a_wrong_temperature(setting):
    """The test above has teeth: draws at temperature 1.1 are told from those at 1.0."""
    _, logits = setting
    wrong = np.random.default_rng(0).choice(MODEL.vocab, DRAWS, p=distribution(logits, 1.15))
    assert chi_square_p_value(wrong, distribution(logits, 1.0)) < 1e-4
    right = np.random.default_rng(0).choice(MODEL.vocab, DRAWS, p=distribution(logits, 1.0))
    assert chi_square_p_value(right, distribution(logits, 1.0)) > 1e-4


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
def test_positions_draw_independently(tiny_models, new_generator, seed):
    """One seed, many positions: each token placed at random inside its share of [0, 1) by its
    row's cumulative distribution is a uniform draw, and successive ones are uncorrelated."""
    folder, target = tiny_models.target(MODEL)
    generator = new_generator(folder)
    text = generator.generate(PROMPT, max_new_tokens=600, temperature=1.0, seed=seed).token_ids
    logits = target.forward(PROMPT + text)[0][len(PROMPT) - 1 : -1]
    rng = np.random.default_rng(seed)
    draws = np.empty(len(text))
    for row, token in enumerate(text):
        p = distribution(logits[row], 1.0)
        draws[row] = p[:token].sum() + p[token] * rng.random()
    assert len(draws) == 600
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(len(draws))


def test_seeds_decide(setting):
    generator, _ = setting
    options = {"max_new_tokens": 24, "temperature": 1.0}
    texts = [generator.generate(PROMPT, seed=seed, **options).token_ids for seed in range(6)]
    again = [generator.generate(PROMPT, seed=seed, **options).token_ids for seed in range(6)]
    assert texts == again
    assert len({tuple(text) for text in texts}) == 6


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6},
     {"temperature": 1.0, "min_p": 1.0}, {"temperature": 1e-4}],
    ids=["top_k_1", "tiny_top_p", "min_p_1", "tiny_temperature"],
)  # fmt: skip
def test_narrow_sampling_is_greedy(setting, sampling):
    generator, _ = setting
    greedy = generator.generate(PROMPT, max_new_tokens=16, temperature=0.0).token_ids
    assert generator.generate(PROMPT, max_new_tokens=16, seed=3, **sampling).token_ids == greedy
