"""The references against slower, more literal computations of the same things."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy

from reference import eagle, storage, tiny
from reference.llama import (
    Llama,
    inverse_frequencies,
    log_softmax,
    relative_margin,
    rotate,
)


def test_bf16_rounds_to_nearest_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.140625, 1e-40, 65280.0], dtype=np.float32)
    # 1 + 2^-8 and 1 + 3 2^-8 are halfway cases: to the even neighbours 1 and 1 + 2^-6.
    expected = np.array([1.0, 1.0, 1.015625, -3.140625, 9.18355e-41, 65280.0])
    decoded = storage.decode("BF16", storage.bf16_bits(values))
    np.testing.assert_allclose(decoded, expected, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_written_files_are_safetensors(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(3, 5))
    path = tmp_path / "model.safetensors"
    storage.write_safetensors(path, {"x": storage.encode(values, dtype)}, {"format": "pt"})
    loaded = safetensors.numpy.load_file(path)["x"]
    assert loaded.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(storage.read_safetensors(path)["x"], loaded.astype(np.float64))
    np.testing.assert_array_equal(loaded, values.astype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_folders_keep_values(tmp_path, dtype):
    model = tiny.FAMILIES["llama3"].with_(dtype=dtype)
    folder = tiny.write_model(tmp_path / dtype, model)
    exact = tiny.write_model(tmp_path / "exact", model.with_(dtype="float32", shards=1))
    config, weights = storage.read_folder(folder)
    _, exact_weights = storage.read_folder(exact)
    assert config["torch_dtype"] == dtype
    assert len(list(folder.glob("*.safetensors"))) == model.shards
    epsilon = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 0.0}[dtype]
    assert weights.keys() == exact_weights.keys()
    for name, values in weights.items():
        # fp16 has no exponents below -14: an absolute term for its subnormals.
        np.testing.assert_allclose(values, exact_weights[name], rtol=epsilon, atol=epsilon * 2**-13)


def test_rotation_turns_each_pair():
    rng = np.random.default_rng(1)
    x, positions = rng.normal(size=(5, 2, 8)), np.array([0, 1, 7, 7, 300])
    frequencies = np.array([1.0, 0.1, 0.01, 0.001])
    turned = rotate(x, positions, frequencies)
    pairs = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * positions[:, None, None] * frequencies)
    np.testing.assert_allclose(turned[..., :4], pairs.real, atol=1e-12)
    np.testing.assert_allclose(turned[..., 4:], pairs.imag, atol=1e-12)


def test_llama3_scaling_keeps_short_and_stretches_long_wavelengths():
    model = tiny.FAMILIES["llama3.1"]
    config = tiny.model_config(model)
    scaled = inverse_frequencies(config)
    plain = inverse_frequencies(config | {"rope_scaling": None})
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 64 / 4, wavelengths > 64
    assert short.any() and long.any() and not (short | long).all()
    np.testing.assert_array_equal(scaled[short], plain[short])
    np.testing.assert_allclose(scaled[long], plain[long] / 8)
    between = scaled[~short & ~long] / plain[~short & ~long]
    assert ((between > 1 / 8) & (between < 1)).all()


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tree_rows_equal_their_paths(tiny_models, name):
    """Every row of a random tree has the logits of the plain sequence that it stands for."""
    model = tiny.FAMILIES[name]
    _, target = tiny_models.target(model)
    rng = np.random.default_rng(2)
    committed = rng.integers(0, model.vocab, 9)
    parents = np.array([-1, *(rng.integers(0, node) for node in range(1, 12))])
    tree = eagle.DraftTree(rng.integers(0, model.vocab, 12), parents, np.zeros(12), 0.0)
    visible = np.tri(21, dtype=bool)
    visible[9:, 9:] = tree.ancestors()
    logits, features = target.forward(
        np.concatenate([committed, tree.tokens]),
        np.concatenate([np.arange(9), 9 + tree.depths()]),
        visible,
    )
    for node in range(12):
        path = np.flatnonzero(tree.ancestors()[node])
        alone = target.forward(np.concatenate([committed, tree.tokens[path]]))
        np.testing.assert_allclose(logits[9 + node], alone[0][-1], atol=1e-10)
        np.testing.assert_allclose(features[9 + node], alone[1][-1], atol=1e-10)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_tiny_models_are_worth_decoding(tiny_models, name):
    """Logits depend on the context, differ over positions, and are mostly clear of ties."""
    model = tiny.FAMILIES[name]
    _, target = tiny_models.target(model)
    tokens = np.random.default_rng(3).integers(0, model.vocab, 48)
    logits, _ = target.forward(tokens)
    changed, _ = target.forward(np.concatenate([[tokens[0] ^ 1], tokens[1:]]))
    assert np.abs(changed[-1] - logits[-1]).max() > 1e-4
    assert len(set(logits.argmax(1))) > 10
    margins = [relative_margin(row) for row in logits]
    assert np.median(margins) > 0.2


def draft_by_definition(drafter, tokens, features, *, depth, topk, tree_tokens, sub_vocab=None):
    """EAGLE-2 by paths: each path's log-probabilities come from a plain causal sequence of its own.

    Returns [(path, score)] of the kept nodes in tree order, without the root.
    """
    target = drafter.target
    vocab = list(range(len(target.head))) if sub_vocab is None else sorted(sub_vocab)
    topk = min(topk, len(vocab))

    def logprobs(path: tuple[int, ...]) -> np.ndarray:
        row_tokens, row_inputs = list(tokens[1:]), list(features)
        for token in (*path, None):
            rows = np.arange(len(row_tokens))
            hidden = drafter.rows(
                np.array(row_tokens), np.array(row_inputs), rows, np.tri(len(rows), dtype=bool)
            )[-1]
            if token is not None:
                row_tokens.append(token)
                row_inputs.append(hidden)
        return log_softmax(target.head[vocab] @ hidden)

    pool: list[tuple[tuple[int, ...], float]] = []
    beam = [((), 0.0)]
    for _ in range(depth):
        level = []
        for path, score in beam:
            row = logprobs(path)
            best = sorted(range(len(vocab)), key=lambda column: (-row[column], column))[:topk]
            level += [((*path, vocab[column]), score + row[column]) for column in best]
        pool += level
        beam = sorted(level, key=lambda candidate: -candidate[1])[:topk]
    best = sorted(range(len(pool)), key=lambda index: (-pool[index][1], index))
    return [pool[index] for index in sorted(best[: tree_tokens - 1])]


@pytest.mark.parametrize(
    "drafter",
    [
        tiny.TinyDrafter(),
        tiny.TinyDrafter(layers=2, fc_bias=True, seed=8),
        tiny.TinyDrafter(attention_bias=True, own_embedding=True, seed=9),
    ],
    ids=["plain", "two_layers", "attention_bias"],
)
@pytest.mark.parametrize(
    ("depth", "topk", "tree_tokens", "sub_size"),
    [(1, 3, 1, None), (1, 3, 4, None), (2, 2, 9, None), (3, 3, 8, 40), (4, 2, 12, None),
     (3, 6, 30, 4), (4, 4, 64, 25), (2, 3, 100, None)],
)  # fmt: skip
def test_draft_equals_its_definition(tiny_models, drafter, depth, topk, tree_tokens, sub_size):
    model = tiny.FAMILIES["wide_heads"]
    _, reference = tiny_models.drafter(model, drafter)
    sub_vocab = tiny_models.ranking(model).order[:sub_size] if sub_size else None
    tokens = np.random.default_rng([4, depth, topk]).integers(0, model.vocab, 8).tolist()
    _, features = reference.target.forward(tokens[:-1])
    options = dict(depth=depth, topk=topk, tree_tokens=tree_tokens, sub_vocab=sub_vocab)
    tree = reference.draft(tokens, features, **options)
    expected = draft_by_definition(reference, tokens, features, **options)

    paths = [()]
    for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
        paths.append((*paths[parent], int(token)))
    assert tree.tokens[0] == tokens[-1]
    assert paths[1:] == [path for path, _ in expected]
    np.testing.assert_allclose(tree.scores[1:], [score for _, score in expected], atol=1e-9)
    assert all(path[:-1] in paths for path in paths[1:])


@pytest.mark.parametrize("sub_size", [None, 60])
@pytest.mark.parametrize("name", ["llama3", "llama3.1", "smollm2", "qwen2"])
def test_speculation_writes_the_greedy_text(tiny_models, name, sub_size):
    model = tiny.FAMILIES[name]
    _, reference = tiny_models.drafter(model, tiny.TinyDrafter())
    sub_vocab = tiny_models.ranking(model).order[:sub_size] if sub_size else None
    prompt = [3, 5, 7]
    rounds = eagle.speculate(
        reference, prompt, 40, depth=5, topk=4, tree_tokens=24, sub_vocab=sub_vocab
    )
    text = (rounds[-1].tokens + rounds[-1].emitted)[len(prompt) :]
    assert text == reference.target.greedy(prompt, len(text))
    lengths = [len(each.emitted) for each in rounds]
    assert max(lengths) >= 3 and min(lengths) == 1, "the tiny drafter should be right now and then"


def test_configs_are_plain_json(tiny_models):
    folder, target = tiny_models.target(tiny.FAMILIES["qwen2"])
    assert isinstance(target, Llama)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen2"
