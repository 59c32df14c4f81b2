"""Converting PyTorch checkpoints, and how output folders appear and do not appear."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from checkpoint_files import (
    HIDDEN,
    Archive,
    Raw,
    global_code,
    model_tensors,
    read_safetensors,
    save_checkpoint,
    write_model,
)
from frspec import cli
from frspec import convert as convert_package
from frspec.convert import add_arguments, convert
from frspec.convert import output as output_module
from frspec.convert.layout import with_classic_rope
from frspec.convert.tensors import LazyTensor, round_to_bf16, widen_bf16
from frspec.errors import ConversionError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", model_tensors())


# --- rounding -----------------------------------------------------------------------------------


def test_bf16_rounding_is_to_the_nearest_even() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 2000, dtype=np.uint64).astype(np.uint32)
    edges = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x80000001, 0x00008000, 0x00018000]
    values = np.concatenate([bits, np.array(edges, np.uint32)]).view(np.float32)
    values = values[np.isfinite(values)]
    for value, rounded in zip(values.tolist(), round_to_bf16(values).tolist(), strict=True):
        exact = Fraction(value)
        low = int(np.float32(value).view(np.uint32)) >> 16  # towards zero
        candidates = [(abs(_bf16_value(code) - exact), code & 1, code) for code in (low, low + 1)]
        assert rounded == min(candidates)[2], value


def _bf16_value(code: int) -> Fraction:
    """The exact value; the code after the largest finite one stands for 2^128."""
    if code & 0x7FFF == 0x7F80:
        return Fraction(2**128) * (-1 if code >> 15 else 1)
    return Fraction(float(widen_bf16(np.array([code], np.uint16))[0]))


def test_bf16_rounding_keeps_nan_and_infinity() -> None:
    bits = np.array([0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x7F800000, 0xFF800000], np.uint32)
    back = widen_bf16(round_to_bf16(bits.view(np.float32)))
    assert np.isnan(back[:3]).all()
    assert back[3:].tolist() == [np.inf, -np.inf]
    assert round_to_bf16(bits.view(np.float32))[1] >> 15 == 1


# --- PyTorch checkpoints ------------------------------------------------------------------------


def test_torch_folder(model: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    out = convert(model, tmp_path / "out", progress=lambda *call: calls.append(call))
    written = read_safetensors(out / "model.safetensors")
    expected = model_tensors()
    assert set(written) == set(expected)
    for name, tensor in expected.items():
        assert written[name][0] == "F32"
        np.testing.assert_array_equal(written[name][1], tensor)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 5e4
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert "rope_parameters" not in config and "dtype" not in config
    assert config["torch_dtype"] == "float32"
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (out / "tokenizer_config.json").exists()
    total = sum(tensor.nbytes for tensor in expected.values())
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1] == (total, total, "lm_head.weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize(("dtype", "code"), [("bf16", "BF16"), ("fp16", "F16"), ("fp32", "F32")])
def test_dtype_option(model: Path, tmp_path: Path, dtype: str, code: str) -> None:
    out = convert(model, tmp_path / "out", dtype=dtype)
    for name, (found, values) in read_safetensors(out / "model.safetensors").items():
        source = model_tensors()[name]
        assert found == code
        expected = round_to_bf16(source) if code == "BF16" else source.astype(values.dtype)
        np.testing.assert_array_equal(values, expected)


def test_bfloat16_checkpoint_keeps_its_bits(tmp_path: Path) -> None:
    tensors = {name: round_to_bf16(tensor) for name, tensor in model_tensors().items()}
    out = convert(write_model(tmp_path / "model", tensors), tmp_path / "out")
    for name, (code, values) in read_safetensors(out / "model.safetensors").items():
        assert code == "BF16"
        np.testing.assert_array_equal(values, tensors[name])


def test_double_precision_becomes_fp32(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", model_tensors(dtype="float64"))
    written = read_safetensors(convert(model, tmp_path / "out") / "model.safetensors")
    assert {code for code, _ in written.values()} == {"F32"}


def test_what_the_runtime_does_not_read_is_converted_though_it_is_safetensors(tmp_path) -> None:
    for name, dtype in (("double", "float64"), ("single", "float32")):
        model = write_model(tmp_path / name, {})
        (model / "pytorch_model.bin").unlink()
        save_file(model_tensors(dtype=dtype), model / "model.safetensors")
    assert convert(tmp_path / "single", tmp_path / "as it is") == tmp_path / "single"
    written = read_safetensors(convert(tmp_path / "double", tmp_path / "out") / "model.safetensors")
    assert {code for code, _ in written.values()} == {"F32"}
    # Nor a file among others, which its folder would not load.
    save_file(model_tensors(), tmp_path / "single" / "other.safetensors")
    single = tmp_path / "single"
    assert convert(single / "model.safetensors", tmp_path / "as it is") == single
    out = convert(single / "other.safetensors", tmp_path / "one of two")
    assert out == tmp_path / "one of two"
    # Nor a tokenizer of SentencePiece, of which conversion makes a tokenizer.json.
    (tmp_path / "single" / "tokenizer.json").rename(tmp_path / "single" / "tokenizer.model")
    with pytest.raises(ConversionError, match="not a SentencePiece BPE model"):
        convert(tmp_path / "single", tmp_path / "tokenized")


def test_a_single_file_goes_before_shards_as_it_does_in_the_runtime(tmp_path) -> None:
    model = write_model(tmp_path / "model", {})
    (model / "pytorch_model.bin").unlink()
    save_file(model_tensors(), model / "model.safetensors")
    others = {name: tensor + 1 for name, tensor in model_tensors().items()}
    save_file(others, model / "shard.safetensors")
    index = {"weight_map": dict.fromkeys(others, "shard.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(model, tmp_path / "out") == model
    written = read_safetensors(convert(model, tmp_path / "out", dtype="bf16") / "model.safetensors")
    for name, tensor in model_tensors().items():
        np.testing.assert_array_equal(written[name][1], round_to_bf16(tensor))


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10**9}, "4096"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type: .* found .yarn."),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "expected 1"),
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: .* found .*GPT2"),
    ],
)
def test_what_the_runtime_refuses_is_not_converted(tmp_path, kind, change, message) -> None:
    model = write_model(tmp_path / "model", model_tensors(), **change)
    if kind == "safetensors":
        (model / "pytorch_model.bin").unlink()
        save_file(model_tensors(), model / "model.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 5e4}, {"rope_theta": 5e4, "rope_scaling": None}),
        ({"type": "default"}, {"rope_scaling": None}),
        ({"type": "linear", "factor": 8.0}, {"rope_scaling": {"type": "linear", "factor": 8.0}}),
        (
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            {"rope_scaling": None, "partial_rotary_factor": 0.5},  # which the runtime refuses
        ),
        ({"full_attention": {"rope_theta": 1e6}}, None),  # which it refuses, too
    ],
)
def test_rope_parameters_keep_their_meaning(parameters, expected) -> None:
    config = {"hidden_size": 64, "rope_parameters": parameters}
    if expected is None:
        assert with_classic_rope(config) == config
    else:
        assert with_classic_rope(config) == {"hidden_size": 64, **expected}


def test_sharded_source_and_sharded_output(tmp_path: Path, monkeypatch) -> None:
    tensors = model_tensors()
    model = write_model(tmp_path / "model", tensors)
    (model / "pytorch_model.bin").unlink()
    names = list(tensors)
    parts = {"a.bin": names[:9], "b.bin": names[9:]}
    for file, part in parts.items():
        save_checkpoint(model / file, {name: tensors[name] for name in part})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = model / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    default = output_module.write_weights
    monkeypatch.setattr(
        "frspec.convert.huggingface.write_weights",
        lambda folder, tensors, progress: default(folder, tensors, progress, 30_000),
    )
    out = convert(model, tmp_path / "out")
    written = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(written["weight_map"].values()))
    assert len(files) == 3
    assert files[0] == "model-00001-of-00003.safetensors"
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    found = {}
    for file in files:
        part = read_safetensors(out / file)
        assert all(written["weight_map"][name] == file for name in part)
        found |= part
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name][1], tensor)
    # An index may not lead out of the folder.
    index.write_text(json.dumps({"weight_map": {"x": "../model/a.bin"}}))
    with pytest.raises(ConversionError, match="names of files beside it"):
        convert(model, tmp_path / "other")


def test_a_single_file_uses_the_config_beside_it(model: Path, tmp_path: Path) -> None:
    out = convert(model / "pytorch_model.bin", tmp_path / "out")
    assert (out / "tokenizer.json").exists()
    assert set(read_safetensors(out / "model.safetensors")) == set(model_tensors())


def test_tied_head_and_rotary_buffers_are_dropped(tmp_path: Path) -> None:
    tensors = model_tensors() | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)
    }
    model = write_model(tmp_path / "model", tensors, tie_word_embeddings=True)
    written = read_safetensors(convert(model, tmp_path / "out") / "model.safetensors")
    assert set(written) == set(model_tensors(tied=True))


def test_a_safetensors_folder_loads_as_it_is(model: Path, tmp_path: Path) -> None:
    folder = convert(model, tmp_path / "st")
    notes: list[str] = []
    assert convert(folder, tmp_path / "out", note=notes.append) == folder
    assert notes == [f"{folder} loads as it is: nothing to convert"]
    assert not (tmp_path / "out").exists()
    narrow = convert(folder, tmp_path / "out", dtype="bf16")  # but another dtype is written
    assert read_safetensors(narrow / "model.safetensors")["lm_head.weight"][0] == "BF16"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "mlp.up_proj.weight: expected"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight: expected, found none"),
        (lambda t: t.update(extra=np.ones(1, np.float32)), "tensor extra: not part"),
        (
            lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}),
            r"expected shape \[32\], found \[7\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(HIDDEN, np.int64)}),
            "expected a float dtype, found I64",
        ),
        (lambda t: t["model.norm.weight"].fill(1e6), "within fp16's 65504, found 1e"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path: Path, change, message: str) -> None:
    tensors = model_tensors()
    change(tensors)
    model = write_model(tmp_path / "model", tensors)
    with pytest.raises(ConversionError, match=message):
        convert(model, tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures: expected one of"),
        ({"hidden_size": "32"}, 'hidden_size: expected an integer .*, found the string "32"'),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected an integer, found none"),
        ({"quantization_config": {}}, "quantised weights are not supported"),
    ],
)
def test_wrong_configs_are_refused(tmp_path: Path, config: dict, message: str) -> None:
    model = write_model(tmp_path / "model", model_tensors(), **config)
    with pytest.raises(ConversionError, match=message):
        convert(model, tmp_path / "out")


def test_missing_and_misleading_sources(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for source, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path, "or one file of weights, found 0"),
        (model / "config.json", "found another format"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(source, out)
    with pytest.raises(ConversionError, match="expected one of bf16, fp16, fp32, found 'int8'"):
        convert(model, out, dtype="int8")
    with pytest.raises(ConversionError, match="expected an EAGLE checkpoint"):
        convert(model, out, target=model)
    (model / "config.json").unlink()
    with pytest.raises(ConversionError, match=r"config\.json: cannot read"):
        convert(model, out)
    assert not out.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:4],
        lambda data: data[:200],
        lambda data: data[:-1],
        lambda data: (2**60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
        lambda data: data.replace(b'"shape":[40', b'"shape":[41', 1),
        lambda data: data.replace(b"[0,", b"[9,", 1),
        lambda data: data.replace(b'"shape":[40', b'"shape":[-4', 1),
    ],
)
def test_damaged_safetensors_are_refused(model: Path, tmp_path: Path, damage) -> None:
    folder = convert(model, tmp_path / "st")
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConversionError, match="model.safetensors"):
        convert(folder, tmp_path / "out", dtype="bf16")
    assert not (tmp_path / "out").exists()


# --- the output folder --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
def test_an_interrupted_conversion_leaves_nothing(model: Path, tmp_path: Path, error) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        staged = [path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")]
        assert len(staged) == 1
        if done > total / 2:
            raise error

    for out, force in ((tmp_path / "out", False), (tmp_path / "new" / "deep" / "out", False)):
        with pytest.raises(error):
            convert(model, out, progress=interrupt, force=force)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    old = convert(model, tmp_path / "out", dtype="bf16")
    before = (old / "model.safetensors").read_bytes()
    with pytest.raises(error):
        convert(model, old, progress=interrupt, force=True)
    assert (old / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_ended_by_a_signal_leaves_nothing(
    model, tmp_path, monkeypatch, number
) -> None:
    real = convert_package.convert

    def terminated(*args, progress, **options):
        return real(*args, progress=lambda *_: os.kill(os.getpid(), number), **options)

    monkeypatch.setattr(convert_package, "convert", terminated)
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", str(model), str(tmp_path / "out"), "--dtype", "bf16"])
    assert ended.value.code == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert signal.getsignal(number) is before


def test_what_a_killed_conversion_left_goes_with_the_next(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill = (
        "import os, sys; from frspec.convert import convert\n"
        "convert(*sys.argv[1:], dtype='bf16', progress=lambda *_: os.kill(os.getpid(), 9))"
    )
    ended = subprocess.run([sys.executable, "-c", kill, str(model), str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    left = [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]
    assert len(left) == 1 and not out.exists()

    def another(*_) -> None:  # a conversion that runs is let alone
        convert(model, out, dtype="fp16", force=True)

    convert(model, out, dtype="bf16", progress=another, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_folder_that_a_killed_conversion_moved_away_comes_back(model, tmp_path) -> None:
    out = convert(model, tmp_path / "out", dtype="bf16")
    before = (out / "model.safetensors").read_bytes()
    kill = (
        "import os, sys; from frspec.convert import convert\n"
        "rename = os.rename\n"
        "os.rename = lambda *names: (rename(*names), os.kill(os.getpid(), 9))\n"
        "convert(*sys.argv[1:], dtype='fp16', force=True)"
    )
    ended = subprocess.run([sys.executable, "-c", kill, str(model), str(out)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (place,) = tmp_path.glob(".out.*.replaced")
    out.mkdir()  # what somebody has put there is let alone, and so is the folder moved away
    convert(model, out)
    assert (place / "out" / "model.safetensors").read_bytes() == before
    shutil.rmtree(out)
    convert(place / "out", out, dtype="fp32")  # the way out that a user may find by himself
    assert (place / "out" / "model.safetensors").read_bytes() == before
    shutil.rmtree(out)
    with pytest.raises(ConversionError, match="expected a new or empty folder"):
        convert(model, out)
    assert (out / "model.safetensors").read_bytes() == before
    convert(model, out, dtype="fp16", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_existing_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(model, out)  # an empty folder is filled
    with pytest.raises(ConversionError, match="expected a new or empty folder"):
        convert(model, out)
    convert(model, out, dtype="bf16", force=True)
    assert read_safetensors(out / "model.safetensors")["lm_head.weight"][0] == "BF16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    for place, message in (
        (precious, "without config.json"),
        (precious / "thesis.txt", "found a file"),
        (model, "apart from the source"),
        (tmp_path, "apart from the source"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(model, place, force=True)
    convert(model, tmp_path / "new" / "deep" / "out")
    assert (tmp_path / "new" / "deep" / "out" / "config.json").exists()


def test_too_little_space_is_refused_at_once(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(output_module.shutil, "disk_usage", lambda _: argparse.Namespace(free=1000))
    with pytest.raises(ConversionError, match="bytes needed, found 1000 bytes free"):
        convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tensors_are_written_in_blocks(tmp_path: Path) -> None:
    """A tensor larger than a block arrives whole, and is never held whole."""
    array = np.arange(3_000_000, dtype=np.float32).reshape(3000, 1000)
    blocks = list(LazyTensor.from_array("x", "F32", array).cast("BF16").blocks())
    assert len(blocks) > 5
    folder = tmp_path / "out"
    folder.mkdir()
    output_module.write_weights(folder, [LazyTensor.from_array("x", "F32", array)])
    np.testing.assert_array_equal(read_safetensors(folder / "model.safetensors")["x"][1], array)


# --- the command --------------------------------------------------------------------------------


def test_command(model: Path, tmp_path: Path, capsys) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = tmp_path / "out"
    assert convert_package.run(parser.parse_args([str(model), str(out), "--dtype", "bf16"])) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{model} converted: load it from {out}\n"
    assert convert_package.run(parser.parse_args([str(out), str(tmp_path / "other")])) == 0
    assert capsys.readouterr().err == f"{out} loads as it is: nothing to convert\n"


def test_malicious_checkpoint_is_refused(model: Path, tmp_path: Path) -> None:
    call = Raw(global_code("shutil", "rmtree") + b"(X\x01\x00\x00\x00.tR")
    Archive({"model.norm.weight": call}).save(model / "pytorch_model.bin")
    with pytest.raises(ConversionError, match="refused: the pickle names shutil.rmtree"):
        convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
