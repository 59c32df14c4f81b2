"""Medusa: its trees against the double-precision reference, and its text against the target's."""

from __future__ import annotations

import json

import numpy as np
import pytest

from frspec import RequestError, cli
from reference import tiny

HEADS = tiny.TinyMedusa()
# Sums of log-probabilities in fp32, through a few tiny layers.
MARGIN = 2e-4
TREES = {
    "one": [[0]],
    "chain": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]],
    "wide": [[rank] for rank in range(12)],
    "shuffled": [[1, 0], [0], [0, 0, 4], [1], [0, 2], [0, 0], [1, 0, 3], [0, 0, 4, 1]],
    "full": [[a, *rest] for a in range(5) for rest in ([], *([b] for b in range(5)))],
}
SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 2**33},
]


def prompt_of(model: tiny.TinyModel, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([5, seed, length]).integers(0, model.vocab, length).tolist()


def compare(step_rounds, generator, reference, prompt, paths, sub_vocab=None, least=0.0, **options):
    """Compares the tree of every round; returns how many had no near-tie in them."""
    compared = 0
    for each in step_rounds(generator, prompt, method="medusa", **options):
        if each.is_prompt:
            continue
        _, features = reference.target.forward(each.before[:-1])
        expected = reference.draft(
            each.before, features, paths=paths, min_probability=least, sub_vocab=sub_vocab
        )
        if not least or expected.margin >= MARGIN:
            np.testing.assert_array_equal(each.parents, expected.parents)
        if expected.margin >= MARGIN:
            np.testing.assert_array_equal(each.tokens, expected.tokens)
            compared += 1
    return compared


@pytest.mark.parametrize("size", [None, 33], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("name", TREES)
def test_trees(tiny_models, new_tiny_generator, step_rounds, name, size):
    model, paths = tiny.FAMILIES["llama3"], TREES[name]
    _, reference = tiny_models.medusa(model, HEADS)
    generator = new_tiny_generator(model, HEADS, size, medusa_choices=paths)
    sub_vocab = tiny_models.ranking(model).sub_vocab(size) if size else None
    compared = sum(
        compare(step_rounds, generator, reference, prompt_of(model, 5 + 9 * seed, seed), paths,
                sub_vocab, max_new_tokens=8, **SAMPLINGS[seed])
        for seed in range(3)
    )  # fmt: skip
    assert compared >= 8


@pytest.mark.parametrize("size", [None, 33], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize("least", [1e-3, 0.02, 0.06, 0.3])
def test_unlikely_nodes_are_left_out(tiny_models, new_tiny_generator, step_rounds, least, size):
    model = tiny.FAMILIES["llama3"]
    _, reference = tiny_models.medusa(model, HEADS)
    generator = new_tiny_generator(model, HEADS, size, tree=(3, 10, 8, least))
    paths = [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0]]  # the first of mc_sim_7b_63
    sub_vocab = tiny_models.ranking(model).sub_vocab(size) if size else None
    sizes = set()

    def steps(*args, **options):
        for each in step_rounds(*args, **options):
            if not each.is_prompt:
                sizes.add(len(each.tokens))
            yield each

    compared = sum(
        compare(steps, generator, reference, prompt_of(model, 5 + 9 * seed, seed), paths,
                sub_vocab, least, max_new_tokens=12, **SAMPLINGS[seed])
        for seed in range(3)
    )  # fmt: skip
    assert compared >= 8
    assert len(sizes) > 1, "trees of one size prove nothing"


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("name", ["llama2", "llama3.2", "qwen2", "wide_heads"])
def test_families_and_layers(tiny_models, new_tiny_generator, step_rounds, name, layers):
    model, heads = tiny.FAMILIES[name], tiny.TinyMedusa(heads=3, layers=layers)
    paths = [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]
    _, reference = tiny_models.medusa(model, heads)
    generator = new_tiny_generator(model, heads, medusa_choices=paths)
    assert (
        compare(step_rounds, generator, reference, prompt_of(model, 11), paths, max_new_tokens=20)
        >= 5
    )
    # A prompt that extends the last one: its beginning is not computed again.
    assert (
        compare(
            step_rounds,
            generator,
            reference,
            prompt_of(model, 11) + [3, 4],
            paths,
            max_new_tokens=20,
        )
        >= 5
    )


@pytest.mark.parametrize(
    ("choices", "tree", "paths"),
    [
        (None, (6, 10, 4), [[0], [0, 0], [1]]),
        (None, (6, 10, 8), [[0], [0, 0], [1], [0, 1], [2], [0, 0, 0], [1, 0]]),
        (None, (1, 10, 4), [[0], [1], [2]]),
        (None, (2, 2, 60), [[0], [0, 0], [1], [0, 1], [1, 0], [1, 1]]),
        ("vicuna_7b_stage1", (6, 10, 6), [[0], [0, 0], [1], [2], [0, 1]]),
        ({"accuracies": [[0.5, 0.3], [0.9, 0.05]]}, (6, 10, 5), [[0], [0, 0], [1], [1, 0]]),
    ],
    ids=str,
)  # fmt: skip
def test_published_and_made_trees(
    tiny_models, new_tiny_generator, step_rounds, choices, tree, paths
):
    model = tiny.FAMILIES["llama3"]
    _, reference = tiny_models.medusa(model, HEADS)
    generator = new_tiny_generator(model, HEADS, tree=tree, medusa_choices=choices)
    assert (
        compare(step_rounds, generator, reference, prompt_of(model, 9), paths, max_new_tokens=12)
        >= 3
    )


@pytest.mark.parametrize("size", [None, 5, 64], ids=lambda size: f"vocab_{size or 'full'}")
@pytest.mark.parametrize(
    "tree", [(1, 1, 1), (1, 3, 4), (4, 4, 8, 0.06), (6, 10, 60), (4, 10, 64)], ids=str
)
def test_same_text(new_tiny_generator, tree, size):
    model = tiny.FAMILIES["smollm2"].with_(dtype="bfloat16")
    fast = new_tiny_generator(model, HEADS, size, tree)
    longest = 0
    for seed, length in enumerate([1, 2, 9, 33, 100]):
        prompt = prompt_of(model, length, seed)
        for sampling in SAMPLINGS:
            alone = fast.generate(prompt, max_new_tokens=40, method="plain", **sampling)
            drafted = fast.generate(prompt, max_new_tokens=40, **sampling)
            assert drafted.method == "medusa"
            assert drafted.token_ids == alone.token_ids
            assert sum(drafted.accept_lengths) == len(drafted.token_ids) - 1
            longest = max(longest, *drafted.accept_lengths)
    assert longest > 1 or tree[2] == 1 or size == 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_same_text_in_every_family(new_tiny_generator, name, dtype):
    model = tiny.FAMILIES[name].with_(dtype=dtype)
    fast = new_tiny_generator(model, tiny.TinyMedusa(dtype=dtype), 80, (4, 10, 30))
    prompt = prompt_of(model, 21)
    longest = 0
    for sampling in SAMPLINGS:
        alone = fast.generate(prompt, max_new_tokens=64, method="plain", **sampling)
        drafted = fast.generate(prompt, max_new_tokens=64, method="medusa", **sampling)
        assert drafted.token_ids == alone.token_ids
        longest = max(longest, *drafted.accept_lengths)
    assert longest > 1, "the heads should be right now and then"


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_rows_are_bit_identical_in_any_tree(new_tiny_generator, step_rounds, instruction_set, isa):
    instruction_set(isa)
    model = tiny.FAMILIES["llama3.1"].with_(dtype="bfloat16")
    fast = new_tiny_generator(model, HEADS, tree=(4, 10, 64))
    prompt = prompt_of(model, 62)
    alone = {
        len(each.before): each.logits[0]
        for each in step_rounds(fast, prompt, method="plain", max_new_tokens=40)
    }
    accepted = 0
    for each in step_rounds(fast, prompt, method="medusa", max_new_tokens=40):
        node = 0
        for step, token in enumerate(each.emitted):
            np.testing.assert_array_equal(each.logits[node], alone[len(each.before) + step])
            accepted += step > 0
            children = np.flatnonzero((each.parents == node) & (each.tokens == token))
            node = children[0] if len(children) else None
    assert accepted > 0


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[0], [1, 0]], r"path \[1, 0\]: expected its parent \[1\] among the paths"),
        ([[0], [0]], r"path \[0\]: expected every path once"),
        ([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]], "expected at most 4 ranks"),
        ([[0], [64]], r"path \[64\]: expected ranks from 0 to 63, found 64"),
        ([[0], [-1]], "expected ranks from 0, found -1"),
        ([[0], []], "expected paths of at least one rank"),
        ([], "expected at least one list of ranks, found none"),
        ([[0], "0"], "expected lists of ranks, found '0'"),
        ([[0], [0.5]], r"expected lists of ranks, found \[0.5\]"),
        (7, "expected a name, a list of lists of ranks, or accuracies, found 7"),
        ("nonesuch", "expected one of mc_sim_7b_63, .*found 'nonesuch'"),
        ({"accuracies": [[1.5]]}, "expected numbers from 0 to 1, found 1.5"),
        ({"accuracies": [[10**400]]}, "accuracies from 0 to 1, found an integer beyond any float"),
        ({"accuracies": []}, "expected at least one list of accuracies"),
        ({"accuracy": [[0.5]]}, 'expected the key "accuracies"'),
        ([[rank] for rank in range(64)] * 4, "at most 255 paths, found 256"),
    ],
)  # fmt: skip
def test_choices_that_are_no_tree(new_tiny_generator, choices, message):
    with pytest.raises(RequestError, match=message):
        new_tiny_generator(tiny.FAMILIES["llama3"], HEADS, medusa_choices=choices)


def test_choices_without_their_drafter(new_tiny_generator):
    model = tiny.FAMILIES["llama3"]
    with pytest.raises(RequestError, match="expected a Medusa drafter, found an EAGLE drafter"):
        new_tiny_generator(model, tiny.TinyDrafter(), medusa_choices=[[0]])
    with pytest.raises(RequestError, match="they need a Medusa drafter, found none"):
        new_tiny_generator(model, medusa_choices="mc_sim_7b_63")
    with pytest.raises(RequestError, match="a list of paths is a whole tree; give it or tree"):
        new_tiny_generator(model, HEADS, medusa_choices=[[0]], tree=(1, 1, 2))
    fast = new_tiny_generator(model, HEADS)
    with pytest.raises(RequestError, match="'eagle2' needs a drafter of its kind, found one for"):
        fast.generate([1, 2], method="eagle2")
    assert fast.generate([1, 2], max_new_tokens=3).method == "medusa"


def test_heads_that_the_tree_does_not_use_take_no_memory(new_tiny_generator):
    model = tiny.FAMILIES["llama3"]
    sizes = {
        depth: new_tiny_generator(model, HEADS, tree=(depth, 10, 64)).memory_plan["draft head"]
        for depth in (1, 4)
    }
    assert sizes[4] == 4 * sizes[1]
    quarter = new_tiny_generator(model, HEADS, 128, (4, 10, 64)).memory_plan["draft head"]
    assert quarter == pytest.approx(sizes[4] / 4, rel=0.02)


# ==== The command line


@pytest.fixture
def run_cli(tiny_models, tmp_path, capfd):
    """run(content of the choices' file or a name, *args): (exit code, stdout, stderr)."""
    model = tiny.FAMILIES["llama3"]
    folders = [tiny_models.target(model)[0], tiny_models.medusa(model, HEADS)[0]]

    def run(choices, *args):
        path = tmp_path / "choices.json"
        if not isinstance(choices, str):
            path.write_bytes(choices)
            choices = str(path)
        prompt = tmp_path / "prompt"
        prompt.write_text("1 2 3")
        code = cli.main(
            ["generate", "--model", str(folders[0]), "--drafter", str(folders[1]), "--json",
             "--device", "cpu", "--token-ids", str(prompt), "--max-new-tokens", "12",
             "--medusa-choices", choices, *args]
        )  # fmt: skip
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def test_choices_on_the_command_line(run_cli):
    plain = json.loads(run_cli("mc_sim_7b_63", "--method", "plain")[1])
    for choices, args in (
        (b"[[0], [0, 0], [0, 0, 0]]", ()),
        (b'{"accuracies": [[0.5, 0.2], [0.5]]}', ("--tree-depth", "2", "--tree-tokens", "4")),
        ("zephyr_stage2", ("--tree-depth", "6", "--tree-topk", "10", "--tree-tokens", "60")),
    ):
        code, out, _ = run_cli(choices, *args)
        result = json.loads(out)
        assert (code, result["method"]) == (0, "medusa")
        assert result["token_ids"] == plain["token_ids"]


@pytest.mark.parametrize(
    ("choices", "expect"),
    [
        ("/nowhere.json", "--medusa-choices /nowhere.json: no such file, and none of mc_sim_7b_63"),
        ("/", "--medusa-choices /: cannot be read: Is a directory"),
        (b"[[0], [0,", "choices.json: cannot be read as JSON: Expecting value"),
        (b"\xff\xfe", "choices.json: cannot be read as JSON: 'utf-8' codec"),
        (b"[[0], [1, 1]]", "path [1, 1]: expected its parent [1] among the paths, found none"),
        (b"[[0], null]", "expected lists of ranks, found None"),
        (b"[[0], [true]]", "expected lists of ranks, found [True]"),
        (b'{"accuracies": [[NaN]]}', "expected numbers from 0 to 1, found nan"),
        (b"[" * 5000, "choices.json: cannot be read as JSON"),
    ],
)
def test_wrong_choices_on_the_command_line(run_cli, choices, expect):
    code, out, error = run_cli(choices)
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert line.startswith("frspec: error: ")
    assert expect in line
