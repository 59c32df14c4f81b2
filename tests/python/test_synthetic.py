"""`frspec make-synthetic`: models of true shape with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import run_frspec, write_synthetic_model
from frspec import Generator
from frspec.cli.make_synthetic import SHAPES
from frspec.ranking import Ranking

VOCAB = 300


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory) -> Path:
    return write_synthetic_model(tmp_path_factory.mktemp("synthetic"), vocab_size=VOCAB)


def generate(model: Path, **options) -> list[int]:
    generator = Generator(model, device="cpu", max_context=128, threads=1, **options)
    return generator.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True).token_ids


def test_the_weights_come_from_the_seed(synthetic, tmp_path) -> None:
    text = generate(synthetic)
    assert text == generate(synthetic)
    assert len(set(text)) > 1  # not the same token over and over
    for drafter in ("drafter", "medusa"):
        assert generate(synthetic, drafter=synthetic / drafter) == text
    config = synthetic / "config.json"
    done = run_frspec("make-synthetic", "--config", config, "--seed", 2, tmp_path / "other")
    assert done.returncode == 0
    assert generate(tmp_path / "other") != text


def test_folder(synthetic) -> None:
    assert sorted(path.name for path in synthetic.rglob("*.*")) == [
        "config.json",
        "config.json",
        "config.json",
        "ranking.safetensors",
    ]
    assert json.loads((synthetic / "drafter" / "config.json").read_text())["num_hidden_layers"] == 1
    assert len(Ranking.load(synthetic / "ranking.safetensors").token_ids) == VOCAB


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes(name, tmp_path) -> None:
    """The bytes that a step reads are those of the published models' parameters."""
    parameters = {
        "llama-3-8b": 8.03e9 - 128256 * 4096,  # without the embedding, of which a step reads a row
        "llama-3.2-1b": 1.236e9,  # whose embedding is its head
        "llama-2-7b": 6.74e9 - 32000 * 4096,
        "qwen2-7b": 7.62e9 - 152064 * 3584,
    }
    out = tmp_path / "model"
    assert run_frspec("make-synthetic", "--config", name, out).returncode == 0
    done = run_frspec(
        "info", "--model", out, "--drafter", out / "drafter", "--max-context", 1024, "--json"
    )
    step_bytes = json.loads(done.stdout)["model"]["step_bytes"]
    assert step_bytes == pytest.approx(2 * parameters[name], rel=0.002)


def test_a_plan_beyond_all_memory(tmp_path) -> None:
    sizes = {"num_hidden_layers": 4096, "num_attention_heads": 4096, "num_key_value_heads": 4096}
    sizes |= {"head_dim": 256, "max_position_embeddings": 2**30}
    model = write_synthetic_model(tmp_path, **sizes)
    done = run_frspec("info", "--model", model, "--max-context", 2**30 - 1)
    assert done.returncode == 2 and done.stdout == ""
    assert "memory plan: 'target KV cache' brings it beyond the" in done.stderr


def test_refusals(tmp_path, synthetic) -> None:
    (tmp_path / "list.json").write_text("[1]")
    config = json.loads((synthetic / "config.json").read_text())
    for name, changes in [
        ("architecture", {"architectures": ["MixtralForCausalLM"]}),
        ("scaling", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
        ("vocabulary", {"vocab_size": 300_000_000}),
        ("head", {"head_dim": 20}),
    ]:
        (tmp_path / f"{name}.json").write_text(json.dumps(config | changes))
    (tmp_path / "sizes.json").write_text('{"vocab_size": 100, "hidden_size": 64}')
    for config, out, message in [
        (tmp_path / "architecture.json", "out", "architecture.json: architectures: expected Llama"),
        (tmp_path / "scaling.json", "out", "rope_scaling"),
        (tmp_path / "vocabulary.json", "out", "vocab_size: expected an integer"),
        (tmp_path / "head.json", "out", "head_dim"),
        (tmp_path / "sizes.json", "out", "sizes.json"),
        ("llama-4", "out", "expected llama-3-8b, llama-3.2-1b"),
        (tmp_path / "list.json", "out", "expected an object, found list"),
        ("llama-3-8b", synthetic, "expected a new or empty folder"),
    ]:
        done = run_frspec("make-synthetic", "--config", config, tmp_path / out)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    for seed in (-1, 2**31):
        done = run_frspec(
            "make-synthetic", "--config", "llama-3.2-1b", "--seed", seed, tmp_path / "out"
        )
        assert done.returncode == 2 and f"found {seed}" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()
