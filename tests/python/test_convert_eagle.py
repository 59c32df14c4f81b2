"""Converting EAGLE checkpoints into drafter folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoint_files import (
    HIDDEN,
    VOCAB,
    layer_tensors,
    model_tensors,
    read_safetensors,
    save_checkpoint,
    write_model,
)
from frspec.convert import convert
from frspec.convert.tensors import round_to_bf16
from frspec.errors import ConversionError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", model_tensors())


def eagle_tensors(embedding: np.ndarray, bias: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    tensors = layer_tensors(rng, "layers.0.")
    del tensors["layers.0.input_layernorm.weight"]
    tensors["fc.weight"] = rng.standard_normal((HIDDEN, 2 * HIDDEN)).astype(np.float32)
    if bias:
        tensors["fc.bias"] = rng.standard_normal(HIDDEN).astype(np.float32)
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    return {**tensors, "embed_tokens.weight": embedding}


def runtime_names(bias: bool = True) -> set[str]:
    names = set(eagle_tensors(np.zeros(0), bias))
    return names - {"embed_tokens.weight", "layers.0.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize("bias", [True, False])
def test_eagle_drops_the_target_embedding(model: Path, tmp_path: Path, bias: bool) -> None:
    embedding = model_tensors()["model.embed_tokens.weight"]
    source = write_model(tmp_path / "eagle", eagle_tensors(embedding, bias), num_hidden_layers=1)
    notes: list[str] = []
    out = convert(source, tmp_path / "out", target=model, note=notes.append)
    written = read_safetensors(out / "model.safetensors")
    assert set(written) == runtime_names(bias)
    assert notes == []
    for name, tensor in eagle_tensors(embedding, bias).items():
        if name in written:
            np.testing.assert_array_equal(written[name][1], tensor)
    config = json.loads((out / "config.json").read_text())
    assert config["bias"] is bias
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["attention_bias"]) == (1, False)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert convert(out, tmp_path / "again", note=notes.append) == out
    assert convert(out, tmp_path / "again", target=model, note=notes.append) == out
    other = write_model(tmp_path / "other", model_tensors(), hidden_size=HIDDEN // 2)
    with pytest.raises(ConversionError, match="hidden_size: expected the target's"):
        convert(out, tmp_path / "again", target=other)


@pytest.mark.parametrize("drafter", ["float16", "bf16", "float32"])
@pytest.mark.parametrize("target", ["fp16", "bf16", "fp32"])
def test_embeddings_are_compared_in_either_dtype(
    model: Path, tmp_path: Path, drafter: str, target: str
) -> None:
    """Both were rounded from the same float32 values, so the less exact one decides."""
    folder = convert(model, tmp_path / "target", dtype=target)
    embedding = model_tensors()["model.embed_tokens.weight"]
    values = round_to_bf16(embedding) if drafter == "bf16" else embedding.astype(drafter)
    source = write_model(tmp_path / "eagle", eagle_tensors(values))
    notes: list[str] = []
    out = convert(source, tmp_path / "out", target=folder, note=notes.append)
    written = read_safetensors(out / "model.safetensors")
    # fp16 has more mantissa bits than bf16, but rounding twice may end elsewhere than once.
    twice = {drafter, target} in ({"float16", "bf16"}, {"bf16", "fp16"})
    assert ("embed_tokens.weight" in written) == bool(notes)
    assert twice or notes == []


def test_eagle_keeps_an_embedding_of_its_own(model: Path, tmp_path: Path) -> None:
    embedding = model_tensors()["model.embed_tokens.weight"].copy()
    embedding[-1, -1] += 1
    source = write_model(tmp_path / "eagle", eagle_tensors(embedding))
    for number, target in enumerate((model, None)):
        notes: list[str] = []
        out = convert(source, tmp_path / str(number), target=target, note=notes.append)
        written = read_safetensors(out / "model.safetensors")
        np.testing.assert_array_equal(written["embed_tokens.weight"][1], embedding)
        assert len(notes) == 1 and notes[0].startswith("the drafter's embedding is kept")


def test_eagle_with_attention_bias(model: Path, tmp_path: Path) -> None:
    tensors = eagle_tensors(model_tensors()["model.embed_tokens.weight"])
    for letter, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
        tensors[f"layers.0.self_attn.{letter}_proj.bias"] = np.ones(rows, np.float32)
    source = write_model(tmp_path / "eagle", tensors)
    config = json.loads((convert(source, tmp_path / "a", target=model) / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]  # biases on q, k and v alone
    tensors["layers.0.self_attn.o_proj.bias"] = np.ones(HIDDEN, np.float32)
    save_checkpoint(source / "pytorch_model.bin", tensors)
    config = json.loads((convert(source, tmp_path / "b", target=model) / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    del tensors["layers.0.self_attn.k_proj.bias"]
    save_checkpoint(source / "pytorch_model.bin", tensors)
    with pytest.raises(ConversionError, match="found 2 of q, k, v"):
        convert(source, tmp_path / "c", target=model)


@pytest.mark.parametrize(
    ("extra", "config", "message"),
    [
        ({"d2t": np.ones(3, np.int64)}, {}, "found EAGLE-3"),
        ({"layers.0.input_layernorm.weight": np.ones(HIDDEN)}, {}, "input_layernorm.*not part"),
        ({"lm_head.weight": np.ones((VOCAB, HIDDEN))}, {}, "drafting uses the target's head"),
        ({"fc.weight": np.ones((HIDDEN, HIDDEN))}, {}, r"fc.weight: expected shape \[32, 64\]"),
        ({}, {"hidden_size": 64}, "hidden_size: expected the target's 32, found 64"),
        ({}, {"vocab_size": 41}, "vocab_size: expected the target's 40, found 41"),
        ({}, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one RoPE .* found"),
        ({}, {"partial_rotary_factor": 0.5}, "one RoPE over whole heads .* found 0.5"),
    ],
)
def test_wrong_eagle_checkpoints(
    model: Path, tmp_path: Path, extra: dict, config: dict, message: str
) -> None:
    tensors = eagle_tensors(model_tensors()["model.embed_tokens.weight"])
    tensors |= {k: v.astype(np.float32) if v.dtype == float else v for k, v in extra.items()}
    source = write_model(tmp_path / "eagle", tensors, **config)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", target=model)
    assert not (tmp_path / "out").exists()


def test_shipped_drafters_load_as_they_are(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[3] / "shared" / "drafters"
    drafters = sorted(folder.iterdir()) if folder.is_dir() else []
    if not drafters:
        pytest.skip("no ../shared/drafters")
    for drafter in drafters:
        assert convert(drafter, tmp_path / "out", note=lambda _: None) == drafter
