"""Converting Medusa checkpoints into drafter folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import (
    HIDDEN,
    VOCAB,
    model_tensors,
    read_safetensors,
    save_checkpoint,
    write_model,
)
from frspec import Generator, ModelError
from frspec.convert import convert
from frspec.errors import ConversionError


def medusa_tensors(heads: int = 3, layers: int = 1, prefix: str = "") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            name = f"{prefix}{head}.{layer}.linear"
            tensors[f"{name}.weight"] = rng.standard_normal((HIDDEN, HIDDEN)).astype(np.float16)
            tensors[f"{name}.bias"] = rng.standard_normal(HIDDEN).astype(np.float16)
        lm_head = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
        tensors[f"{prefix}{head}.{layers}.weight"] = lm_head
    return tensors


def write_heads(folder: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    """As they are published: medusa_lm_head.pt beside a short config.json."""
    folder.mkdir()
    published = {
        "base_model_name_or_path": "somebody/model",
        "medusa_num_heads": 2,
        "medusa_num_layers": 1,
        "transformers_version": "4.31.0",
    }
    (folder / "config.json").write_text(json.dumps(published | config))
    save_checkpoint(folder / "medusa_lm_head.pt", tensors)
    return folder


def convert_model(source: Path, out: Path, **options: object) -> Path:
    """The model without its made-up tokenizer, which no Generator reads."""
    convert(source, out, **options)
    (out / "tokenizer.json").unlink()
    return out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return convert_model(write_model(tmp_path / "source", model_tensors()), tmp_path / "model")


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_published_heads(model: Path, tmp_path: Path, layers: int) -> None:
    tensors = medusa_tensors(layers=layers)
    source = write_heads(tmp_path / "heads", tensors, medusa_num_layers=layers)
    notes: list[str] = []
    out = convert(source, tmp_path / "out", target=model, note=notes.append)
    assert notes == ["the config claims 2 heads; all 3 of the checkpoint are kept"]
    written = read_safetensors(out / "model.safetensors")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert written[name][0] == "F16"
        np.testing.assert_array_equal(written[name][1], tensor)
    assert json.loads((out / "config.json").read_text()) == {
        "architectures": ["MedusaModel"],
        "medusa_num_heads": 3,
        "medusa_num_layers": layers,
        "hidden_size": HIDDEN,
        "vocab_size": VOCAB,
        "torch_dtype": "float16",
        "base_model_name_or_path": "somebody/model",
    }
    assert convert(out, tmp_path / "again", note=notes.append) == out
    assert notes[-1].endswith("loads as it is: nothing to convert")
    fast = Generator(model, out, device="cpu", max_context=64, medusa_choices=[[0], [0, 0], [1]])
    alone = fast.generate([1, 2, 3], max_new_tokens=20, method="plain", ignore_eos=True)
    drafted = fast.generate([1, 2, 3], max_new_tokens=20, ignore_eos=True)
    assert drafted.method == "medusa"
    assert drafted.token_ids == alone.token_ids


def test_heads_as_safetensors_load_as_they_are(model: Path, tmp_path: Path) -> None:
    source = write_heads(tmp_path / "heads", medusa_tensors())
    out = convert(source, tmp_path / "out", note=lambda _: None)
    (out / "model.safetensors").rename(source / "medusa_lm_head.safetensors")
    # Both files, and the published config that claims two heads.
    assert convert(source, tmp_path / "again", note=lambda _: None) == source
    Generator(model, source, device="cpu", max_context=64)
    double = write_heads(tmp_path / "double", {})
    save_file(
        {name: tensor.astype(np.float64) for name, tensor in medusa_tensors().items()},
        double / "medusa_lm_head.safetensors",
    )
    (double / "medusa_lm_head.pt").unlink()
    single = convert(double, tmp_path / "single", note=lambda _: None)
    assert single == tmp_path / "single"
    Generator(model, single, device="cpu", max_context=64)
    words = json.loads((source / "config.json").read_text()) | {"medusa_num_heads": 9}
    (source / "config.json").write_text(json.dumps(words))
    with pytest.raises(ConversionError, match="medusa_num_heads heads, 9, found 3"):
        convert(source, tmp_path / "again")
    with pytest.raises(ModelError, match="expected medusa_num_heads heads, 9, found 3"):
        Generator(model, source, device="cpu", max_context=64)


def test_a_whole_model_gives_the_model_and_its_heads(tmp_path: Path) -> None:
    heads = medusa_tensors(prefix="medusa_head.")
    source = write_model(
        tmp_path / "whole", model_tensors() | heads, medusa_num_heads=3, medusa_num_layers=1
    )
    notes: list[str] = []
    model = convert_model(source, tmp_path / "model", note=notes.append)
    assert notes[0].startswith("the Medusa heads are left out")
    assert set(read_safetensors(model / "model.safetensors")) == set(model_tensors())
    out = convert(source, tmp_path / "heads", target=model)
    written = read_safetensors(out / "model.safetensors")
    assert set(written) == set(medusa_tensors())
    for name, tensor in heads.items():
        np.testing.assert_array_equal(written[name.removeprefix("medusa_head.")][1], tensor)
    Generator(model, out, device="cpu", max_context=64)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({"3.0.linear.weight": np.ones((HIDDEN, HIDDEN))}, {}, "3.0.linear.weight: not part"),
        ({"1.1.weight": None}, {}, "expected medusa_num_heads heads, 2, found 1: there is no"),
        ({"2.0.linear.weight": None}, {}, "2.0.linear.weight: expected, found none"),
        ({"0.1.weight": None}, {}, "0.1.weight: expected the LM head of the first head"),
        ({"0.1.weight": np.ones(VOCAB)}, {}, "0.1.weight: expected two dimensions, found"),
        ({"1.1.weight": np.ones((VOCAB, 33))}, {}, r"1.1.weight: expected shape \[40, 32\]"),
        ({"1.0.linear.bias": np.ones(3)}, {}, r"1.0.linear.bias: expected shape \[32\]"),
        ({}, {"medusa_num_layers": 2}, "residual blocks in a head, 2, found 1"),
        ({}, {"medusa_num_heads": "2"}, "medusa_num_heads: expected a positive integer"),
    ],
)  # fmt: skip
def test_wrong_heads(tmp_path: Path, change: dict, config: dict, message: str) -> None:
    tensors = medusa_tensors()
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.astype(np.float16)
    source = write_heads(tmp_path / "heads", tensors, **config)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", note=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_heads_of_another_model(tmp_path: Path) -> None:
    source = write_heads(tmp_path / "heads", medusa_tensors())
    other = write_model(tmp_path / "other", model_tensors(), vocab_size=41)
    with pytest.raises(ConversionError, match="vocab_size: expected the target's 41"):
        convert(source, tmp_path / "out", target=other, note=lambda _: None)
