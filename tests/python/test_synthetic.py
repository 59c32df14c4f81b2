"""`frspec make-synthetic`: models of true shape with random weights; and frspec-bench over them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from command_line import built_tool, run_frspec, write_synthetic_model
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


def test_refusals(tmp_path, synthetic) -> None:
    (tmp_path / "list.json").write_text("[1]")
    for config, out, message in [
        ("llama-4", "out", "expected llama-3-8b, llama-3.2-1b"),
        (tmp_path / "list.json", "out", "expected an object, found list"),
        ("llama-3-8b", synthetic, "expected a new or empty folder"),
    ]:
        done = run_frspec("make-synthetic", "--config", config, tmp_path / out)
        assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


# ==== frspec-bench


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(built_tool("frspec-bench")), "--device", "cpu", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_bench_plants_accept_lengths(synthetic, tmp_path) -> None:
    report = tmp_path / "report.json"
    done = bench(
        *("--model", synthetic, "--drafter", synthetic / "drafter"),
        *("--ranking", synthetic / "ranking.safetensors", "--vocab-sizes", "full", 128),
        *("--tree", 6, 4, 20, "--plant-accept-length", 3.5, 2.5, "--prompt-tokens", 20),
        *("--new-tokens", 120, "--repeats", 2, "--json", report),
    )
    assert done.returncode == 0, done.stderr
    assert "Accept lengths are planted" in done.stdout
    facts = json.loads(report.read_text())
    assert facts["planted"] and [run["vocab_size"] for run in facts["runs"]] == ["full", "128"]
    for run, accept_length in zip(facts["runs"], [3.5, 2.5], strict=True):
        assert run["plain"]["accept_length"] == 1
        assert 0 < run["plain"]["share_of_floor"]
        drafted = run["drafted"]
        assert drafted["same_text"]
        assert drafted["planted_accept_length"] == accept_length
        assert drafted["accept_length"] == pytest.approx(accept_length, abs=0.35)
        for part in ("round_ms", "draft_ms", "verify_ms", "prefill_ms"):
            assert 0 < drafted[part]["p10"] <= drafted[part]["median"] <= drafted[part]["p90"]


def test_bench_runs_medusa(synthetic, tmp_path) -> None:
    report = tmp_path / "report.json"
    done = bench(
        *("--model", synthetic, "--drafter", synthetic / "medusa", "--tree", 4, 5, 20),
        *("--ranking", synthetic / "ranking.safetensors", "--vocab-sizes", "full", 128),
        *("--prompt-tokens", 20, "--new-tokens", 20, "--repeats", 1, "--json", report),
    )
    assert done.returncode == 0, done.stderr
    assert "Medusa, 128 tokens" in done.stdout
    assert all(run["drafted"]["same_text"] for run in json.loads(report.read_text())["runs"])


def test_bench_refusals(synthetic, tmp_path) -> None:
    (tmp_path / "prompt").write_text("1 2 x")
    for options, message in [
        (["--model", tmp_path / "nothing"], "nothing"),
        (["--model", synthetic, "--token-ids", tmp_path / "prompt"], "expected token ids"),
        (["--model", synthetic], "max_context 768 is beyond"),
        (["--model", synthetic, "--plant-accept-length", 1, 2], "a length for each of the 1"),
        (
            ["--prompt-tokens", 20, "--model", synthetic, "--drafter", synthetic / "drafter"]
            + ["--vocab-sizes", "many"],
            "expected a number or full, found 'many'",
        ),
    ]:
        done = bench(*options)
        assert done.returncode == 2 and message in done.stderr, (options, done.stderr)
