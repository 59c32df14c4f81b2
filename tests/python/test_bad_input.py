"""Bad input, each kind: one line on stderr that names expected and found, and exit code 2."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from command_line import FRSPEC, environment, run_frspec, write_talking_model
from conftest import write_ranking
from frspec import FrspecError, Generator, RequestError, cli
from reference import tiny
from reference.storage import encode, read_safetensors, write_safetensors

MODEL = tiny.FAMILIES["llama2"].with_(name="talking", tokenizer=True)
PROMPT = ("--prompt", "w7", "--max-new-tokens", 4)


@dataclass(frozen=True)
class Files:
    """Good ones. A test that breaks something breaks a copy."""

    model: Path
    drafter: Path
    ranking: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    root = tmp_path_factory.mktemp("good")
    model = write_talking_model(root / "model", MODEL)
    drafter = tiny.write_drafter(root / "drafter", MODEL, model, tiny.TinyDrafter())
    ranking = root / "ranking.safetensors"
    write_ranking(ranking, np.arange(MODEL.vocab), tiny.tokenizer_fingerprint(MODEL))
    return Files(model, drafter, ranking)


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """Runs a command line that must be refused; returns what the one line says."""

    def run(*args: object, expect: tuple[object, ...] = ()) -> str:
        code = cli.main([str(arg) for arg in args])
        captured = capfd.readouterr()
        assert code == 2
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        assert line.startswith("frspec: error: ")
        for part in expect:
            assert str(part) in line
        return line

    return run


@pytest.fixture
def broken(files, tmp_path) -> Path:
    """A copy of the model to break."""
    return Path(shutil.copytree(files.model, tmp_path / "broken"))


def test_the_good_files_are_good(files, capfd) -> None:
    args = ["generate", "--model", files.model, "--drafter", files.drafter]
    args += ["--ranking", files.ranking, "--vocab-size", 64, *PROMPT]
    assert cli.main([str(arg) for arg in args]) == 0
    assert len(capfd.readouterr().out.split()) == 4


# ==== Files and folders


def test_missing_model(refused, tmp_path) -> None:
    refused("generate", "--model", tmp_path / "absent", *PROMPT, expect=("absent", "no such"))
    refused("info", "--model", tmp_path / "absent", expect=("absent", "no such"))
    refused("chat", "--model", tmp_path / "absent", expect=("absent", "no such"))


def test_model_is_a_file(refused, files) -> None:
    refused("info", "--model", files.ranking, expect=(files.ranking, "folder", "found a file"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_file_of_a_model(refused, broken, name) -> None:
    (broken / name).unlink()
    refused("generate", "--model", broken, *PROMPT, expect=(name,))


def test_missing_drafter_ranking_or_prompt(refused, files, tmp_path) -> None:
    absent = tmp_path / "absent"
    common = ["generate", "--model", files.model]
    refused(*common, "--drafter", absent, *PROMPT, expect=(absent,))
    drafting = ["--drafter", files.drafter, "--vocab-size", 64]
    refused(*common, *drafting, "--ranking", absent, *PROMPT, expect=(absent,))
    refused(*common, "--prompt-file", absent, expect=(absent, "No such file"))
    refused(*common, "--token-ids", absent, expect=(absent, "No such file"))
    refused(*common, "--prompt-file", tmp_path, expect=(tmp_path, "Is a directory"))


def test_config_that_is_no_json(refused, broken) -> None:
    (broken / "config.json").write_text('{"hidden_size": ')
    refused("info", "--model", broken, expect=("config.json",))


# ==== Safetensors headers


def rewrite_header(path: Path, change: Callable[[dict], None]) -> None:
    blob = path.read_bytes()
    (length,) = struct.unpack_from("<Q", blob)
    header = json.loads(blob[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + length :])


def offsets_outside_the_file(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"] = [2**40, 2**40 + 4 * MODEL.hidden]


def overlapping_offsets(header: dict) -> None:
    other = header["model.layers.0.input_layernorm.weight"]
    header["model.norm.weight"]["data_offsets"] = other["data_offsets"]


def wrong_byte_count(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"][1] -= 4


def absurd_shape(header: dict) -> None:
    header["model.norm.weight"]["shape"] = [2**62, 2**62]


def negative_offset(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"][0] = -4


def reversed_offsets(header: dict) -> None:
    header["model.norm.weight"]["data_offsets"].reverse()


def unknown_dtype(header: dict) -> None:
    header["model.norm.weight"]["dtype"] = "Q4_9"


@pytest.mark.parametrize(
    "change",
    [
        offsets_outside_the_file, overlapping_offsets, wrong_byte_count, absurd_shape,
        negative_offset, reversed_offsets, unknown_dtype,
    ],
)  # fmt: skip
def test_lying_header(refused, broken, change) -> None:
    rewrite_header(broken / "model.safetensors", change)
    line = refused("generate", "--model", broken, *PROMPT, expect=("model.safetensors",))
    assert "expected" in line and "found" in line and "norm.weight" in line


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\x00",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b"{\xff\xfe\x00\x00\x00\x00}",
        b"PK\x03\x04 this is another format altogether",
    ],
    ids=["empty", "cut", "2^63", "10^12", "no object", "no UTF-8", "zip"],
)
def test_no_safetensors_file(refused, broken, content) -> None:
    (broken / "model.safetensors").write_bytes(content)
    line = refused("generate", "--model", broken, *PROMPT, expect=("model.safetensors",))
    assert "expected" in line and "found" in line


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated_file(refused, broken, kept) -> None:
    path = broken / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * kept))
    refused("generate", "--model", broken, *PROMPT, expect=("model.safetensors",))


# ==== Tensors and configs


def rewrite_tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = read_safetensors(path)
    change(tensors)
    stored = {
        name: ("I32", values.astype(np.int32)) if values.dtype.kind == "i" else
        encode(values, "float32")
        for name, values in tensors.items()
    }  # fmt: skip
    write_safetensors(path, stored, {"format": "pt"})


def test_missing_tensor(refused, broken) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite_tensors(broken, lambda tensors: tensors.pop(name))
    refused("generate", "--model", broken, *PROMPT, expect=(name,))


def test_layers_that_the_config_does_not_have(refused, broken) -> None:
    config = json.loads((broken / "config.json").read_text()) | {"num_hidden_layers": 1}
    (broken / "config.json").write_text(json.dumps(config))
    expect = ('"model.layers.1.', "is no part of the model that config.json describes")
    refused("generate", "--model", broken, *PROMPT, expect=expect)


@pytest.mark.parametrize(
    "name",
    ["layers.0.input_layernorm.weight", "layers.1.mlp.up_proj.weight", "input_norm1.weight"],
)
def test_tensors_that_the_drafter_does_not_have(refused, files, tmp_path, name) -> None:
    drafter = tmp_path / "drafter"
    shutil.copytree(files.drafter, drafter)
    rewrite_tensors(drafter, lambda tensors: tensors.setdefault(name, np.ones(8, "float32")))
    expect = (f'"{name}"', "is no part of an EAGLE v1 or v2 drafter of num_hidden_layers 1")
    refused("generate", "--model", files.model, "--drafter", drafter, *PROMPT, expect=expect)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_norm_that_is_no_number(refused, broken, value) -> None:
    rewrite_tensors(broken, lambda tensors: tensors["model.norm.weight"].__setitem__(3, value))
    expect = ('"model.norm.weight"', "expected finite numbers")
    refused("generate", "--model", broken, *PROMPT, expect=expect)


def test_weights_that_are_no_numbers(refused, broken) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite_tensors(broken, lambda tensors: tensors[name].fill(np.nan))
    refused("generate", "--model", broken, *PROMPT, expect=("logits are no numbers",))


def test_tensor_of_another_shape(refused, broken) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"

    def widen(tensors):
        tensors[name] = np.zeros((MODEL.hidden, MODEL.hidden + 8))

    rewrite_tensors(broken, widen)
    line = refused("generate", "--model", broken, *PROMPT, expect=(name, "expected", "found"))
    assert f"{MODEL.hidden + 8}" in line


def test_tensor_with_a_dimension_too_many(refused, broken) -> None:
    name = "model.norm.weight"

    def stack(tensors):
        tensors[name] = tensors[name][None, None]

    rewrite_tensors(broken, stack)
    refused("generate", "--model", broken, *PROMPT, expect=(name, "expected", "found"))


def test_tensor_of_integers(refused, broken) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"

    def round_off(tensors):
        tensors[name] = tensors[name].astype(np.int64)

    rewrite_tensors(broken, round_off)
    refused("generate", "--model", broken, *PROMPT, expect=(name,))


@pytest.mark.parametrize(
    ("changes", "expect"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ("MambaForCausalLM", "LlamaForCausalLM")),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ("yarn", "llama3")),
        ({"hidden_act": "gelu"}, ("gelu", "silu")),
        ({"hidden_size": -96}, ("hidden_size", "-96")),
        ({"hidden_size": "96"}, ("hidden_size", "expected")),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers", 10**9)),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
        ({"vocab_size": MODEL.vocab + 1}, (MODEL.vocab + 1, MODEL.vocab)),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config",)),
        ({"eos_token_id": "</s>"}, ("eos_token_id",)),
    ],
)
def test_unsupported_or_wrong_config(refused, broken, changes, expect) -> None:
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused("generate", "--model", broken, *PROMPT, expect=expect)


def test_drafter_of_another_model(refused, files, tmp_path) -> None:
    for name, other in {
        "hidden_size": MODEL.with_(hidden=128, heads=4, kv_heads=4),
        "vocab_size": MODEL.with_(vocab=400),
    }.items():
        target = tiny.write_model(tmp_path / f"target-{name}", other)
        drafter = tmp_path / f"drafter-{name}"
        tiny.write_drafter(drafter, other, target, tiny.TinyDrafter())
        expected = {"hidden_size": (96, 128), "vocab_size": (509, 400)}[name]
        refused(
            "generate", "--model", files.model, "--drafter", drafter, *PROMPT,
            expect=(drafter, f"expected {expected[0]}", f"found {expected[1]}"),
        )  # fmt: skip


# ==== Rankings


@pytest.mark.parametrize(
    ("order", "expect"),
    [
        (np.zeros(MODEL.vocab, np.int32), ("once",)),
        (np.arange(MODEL.vocab) + 1, (MODEL.vocab,)),
        (np.arange(MODEL.vocab) - 1, ("-1",)),
        (np.arange(32), ("32", "64")),
    ],
    ids=["duplicates", "too large", "negative", "too short"],
)
def test_wrong_ranking(refused, files, tmp_path, order, expect) -> None:
    path = tmp_path / "wrong.safetensors"
    write_ranking(path, order, tiny.tokenizer_fingerprint(MODEL))
    args = ["--model", files.model, "--drafter", files.drafter, "--vocab-size", 64]
    refused("generate", *args, "--ranking", path, *PROMPT, expect=(path, *expect))


def test_ranking_for_another_tokenizer(refused, files, tmp_path) -> None:
    path = tmp_path / "other.safetensors"
    write_ranking(path, np.arange(MODEL.vocab), "0" * 64)
    args = ["--model", files.model, "--drafter", files.drafter, "--vocab-size", 64]
    expect = (path, tiny.tokenizer_fingerprint(MODEL), "0" * 64)
    refused("generate", *args, "--ranking", path, *PROMPT, expect=expect)


def test_model_as_a_ranking(refused, files) -> None:
    args = ["--model", files.model, "--drafter", files.drafter, "--vocab-size", 64]
    path = files.model / "model.safetensors"
    refused("generate", *args, "--ranking", path, *PROMPT, expect=(path, "frspec-ranking"))


@pytest.mark.parametrize("size", ["0", "-5", "1.5", "all", "100000"])
def test_vocab_size(refused, files, size) -> None:
    args = ["--model", files.model, "--drafter", files.drafter, "--ranking", files.ranking]
    refused("generate", *args, f"--vocab-size={size}", *PROMPT, expect=(size,))


def test_model_and_drafter_in_each_others_place(refused, files) -> None:
    args = ["generate", "--model", files.drafter, "--drafter", files.model, *PROMPT]
    refused(*args, expect=(files.drafter, "a whole model", "an EAGLE drafter"))
    args[2] = files.model
    refused(*args, expect=(files.model, "EAGLE or Medusa drafter", "a whole model"))


def test_a_model_that_is_to_be_converted_first(refused, tmp_path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    refused("generate", "--model", path, *PROMPT, expect=(f"frspec convert {path} OUT",))


def test_ranking_without_a_size(refused, files) -> None:
    common = ["generate", "--model", files.model, "--ranking", files.ranking, *PROMPT]
    refused(*common, expect=("a ranking needs vocab_size", "found none"))
    refused(*common, "--drafter", files.drafter, expect=("a ranking needs vocab_size",))


@pytest.mark.parametrize(
    ("typo", "expect"),
    [
        (["--promt", "x"], ("unrecognized argument --promt; did you mean --prompt?",)),
        (["--prompt", "x", "--max-tokens=5"], ("--max-tokens; did you mean --max-new-tokens?",)),
        (["--prompt", "--zzz"], ("argument --prompt: expected one argument",)),
        (["--prompt", "x", "--zzz"], ("unrecognized argument --zzz (see frspec generate --help)",)),
    ],
)
def test_options_that_do_not_exist(refused, files, typo, expect) -> None:
    refused("generate", "--model", files.model, *typo, expect=expect)


def test_vocab_size_alone(refused, files) -> None:
    common = ["generate", "--model", files.model, "--vocab-size", 64, *PROMPT]
    refused(*common, expect=("drafter",))
    refused(*common, "--drafter", files.drafter, expect=("ranking",))
    refused("generate", "--model", files.model, "--method", "eagle2", *PROMPT, expect=("drafter",))


# ==== Requests


def test_empty_prompt(refused, files, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    common = ["generate", "--model", files.model]
    refused(*common, "--prompt", "", expect=("prompt is empty",))
    refused(*common, "--prompt", "", "--raw", expect=("prompt is empty",))
    refused(*common, "--prompt", " ", "--raw", expect=("prompt is empty",))  # of no token
    refused(*common, "--prompt-file", empty, expect=("prompt is empty",))
    refused(*common, "--token-ids", empty, expect=("prompt is empty",))
    empty.write_text("[]")
    refused(*common, "--token-ids", empty, expect=("prompt is empty",))


@pytest.mark.parametrize(
    ("content", "expect"),
    [
        ("1 2 509", (509,)),
        ("1 -1", (-1,)),
        ("[1, 99999999999999999999]", (99999999999999999999,)),
        ("1 2 x", ("x", "position 2")),
        ("[1, 2.5]", (2.5, "position 1")),
        ("[1, true]", ("True", "position 1")),
        ("[1, [2]]", ("[2]", "position 1")),
        ("[1, 2", ("JSON",)),
        ("[" * 100_000, ("JSON",)),
        ("9" * 5000, ("whole numbers", "position 0")),
        ("\xff", ()),
    ],
)
def test_token_ids(refused, files, tmp_path, content, expect) -> None:
    path = tmp_path / "ids"
    path.write_bytes(content.encode("latin-1"))
    refused("generate", "--model", files.model, "--token-ids", path, expect=expect)


def test_prompt_that_is_no_text(refused, files, tmp_path) -> None:
    path = tmp_path / "prompt"
    path.write_bytes(b"caf\xe9")
    expect = (path, "UTF-8", "0xe9 at offset 3")
    refused("generate", "--model", files.model, "--prompt-file", path, expect=expect)


def test_prompt_longer_than_the_context(refused, files, tmp_path) -> None:
    path = tmp_path / "ids"
    path.write_text("5 " * 40)
    args = ["--model", files.model, "--max-context", 32, "--token-ids", path]
    refused("generate", *args, expect=("40 tokens", "max_context 32", "at most 31"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--temperature", "-0.5"), ("--temperature", "nan"), ("--temperature", "inf"),
        ("--temperature", "warm"), ("--top-k", "-1"), ("--top-k", "1.5"), ("--top-k", str(2**70)),
        ("--top-p", "0"), ("--top-p", "1.5"), ("--top-p", "nan"), ("--min-p", "-0.1"),
        ("--min-p", "2"), ("--max-new-tokens", "0"), ("--max-new-tokens", "-3"),
        ("--seed", "x"), ("--seed", str(2**70)), ("--stop", ""), ("--threads", "0"),
        ("--threads", "-2"), ("--threads", str(10**9)), ("--tree-depth", "0"),
        ("--tree-topk", "-1"), ("--tree-tokens", "257"), ("--tree-tokens", "0"),
        ("--tree-min-probability", "1"), ("--tree-min-probability", "-0.1"),
        ("--tree-min-probability", "nan"), ("--tree-min-probability", "often"),
        ("--max-context", "1"), ("--max-context", "-7"), ("--max-context", str(2**40)),
        ("--memory-limit", "lots"), ("--memory-limit", "0"), ("--memory-limit", "-1GB"),
        ("--memory-limit", "9" * 400),
        ("--device", "tpu"), ("--dtype", "int4"), ("--method", "magic"),
    ],
)  # fmt: skip
def test_nonsense_values(refused, files, option, value) -> None:
    line = refused("generate", "--model", files.model, *PROMPT, f"{option}={value}")
    # The engine's own words are those of Python: max_context for --max-context.
    assert re.search("[-_ ]".join(option[2:].split("-")), line), line


def test_tokenizer_config_that_is_too_deep(refused, broken) -> None:
    (broken / "tokenizer_config.json").write_text("[" * 100_000)
    refused("generate", "--model", broken, *PROMPT, expect=("tokenizer_config.json", "JSON"))


def test_options_of_a_model_without_one(refused) -> None:
    refused("info", "--drafter", "somewhere", expect=("--drafter needs a --model",))


@pytest.mark.parametrize(
    "options",
    [
        {"device": None}, {"dtype": np.float32}, {"ranking": b"ranking"}, {"ranking": "a\0"},
        {"tree": (1, 3, 4)}, {"vocab_size": np.array([1, 2])}, {"drafter": ""},
        {"model": "m" * 5000}, {"model": ""}, {"model": 3},
    ],
    ids=lambda options: "".join(options),
)  # fmt: skip
def test_python_arguments_of_another_type(files, options) -> None:
    (name,) = options
    with pytest.raises(FrspecError) as caught:
        Generator(**{"model": files.model} | options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize("request_", [{"method": 3}, {"stop": None}, {"stop": 5}])
def test_python_requests_of_another_type(files, request_) -> None:
    with pytest.raises(RequestError, match=next(iter(request_))):
        Generator(files.model).generate("w7", **request_)


@pytest.mark.parametrize(("closed", "code"), [("<&-", 0), (">&-", 2), ("2>&-", 0)])
def test_closed_streams(files, closed, code) -> None:
    command = shlex.join([*FRSPEC, "generate", "--model", str(files.model), *map(str, PROMPT)])
    done = subprocess.run(
        ["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, env=environment()
    )
    assert done.returncode == code and "Traceback" not in done.stderr


def test_device_that_is_not_there(refused, files) -> None:
    devices = {device["name"]: device for device in cli.info._core.devices()}
    if devices["cuda"]["available"]:
        pytest.skip("this machine has a CUDA device")
    line = refused("generate", "--model", files.model, *PROMPT, "--device", "cuda")
    assert "CUDA" in line or "NVIDIA" in line


def test_no_memory_for_the_plan(refused, files, capfd) -> None:
    args = ["--model", files.model, *PROMPT]
    line = refused("generate", *args, "--memory-limit", "5MB", expect=("5000000",))
    assert "max_context of" in line and "would fit" in line
    fitting = int(line.split("max_context of ")[1].split()[0])
    args += ["--memory-limit", "5MB", "--max-context", fitting]
    assert cli.main(["generate", *map(str, args)]) == 0
    capfd.readouterr()
    refused("generate", "--model", files.model, *PROMPT, "--memory-limit", 1000, expect=(1000,))


def test_model_without_a_chat_template(refused, broken) -> None:
    (broken / "tokenizer_config.json").unlink()
    refused("generate", "--model", broken, *PROMPT, expect=("chat template", "--raw"))
    refused("chat", "--model", broken, expect=("chat template", "--raw"))


# ==== The command line


@pytest.mark.parametrize(
    "args",
    [
        [], ["fly"], ["generate"], ["generate", "--model", "x"],
        ["generate", "--model", "x", "--prompt", "a", "--prompt-file", "b"],
        ["generate", "--model", "x", "--prompt", "a", "--temprature", "1"],
        ["generate", "--model", "x", "--prompt", "a", "--temp", "1"],
        ["chat"], ["convert"], ["rank-tokens"], ["demo", "--prompts", "0"],
        ["demo", "--max-new-tokens", "0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_usage(refused, args) -> None:
    refused(*args)


def test_hub_id_without_a_network(tmp_path) -> None:
    # A process of its own: the library reads these variables when it is imported.
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = run_frspec("generate", "--model", "nobody/nothing", *PROMPT, env=env)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("frspec: error: nobody/nothing: ")
    assert "127.0.0.1:9" in line


# ==== Conversion


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle(refused, files, tmp_path, zipped) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(files.model / "config.json", source)
    marker, out = tmp_path / "marker", tmp_path / "out"
    program = pickle.dumps({"model.norm.weight": Evil(marker)}, protocol=2)
    path = source / "pytorch_model.bin"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", program)
    else:
        path.write_bytes(program)
    before = set(tmp_path.iterdir())
    refused("convert", source, out, expect=(path,))
    assert set(tmp_path.iterdir()) == before
    assert not marker.exists()


def test_refused_conversions_leave_nothing(refused, files, tmp_path) -> None:
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 64)
    before = set(tmp_path.iterdir())
    refused("convert", damaged, tmp_path / "out", expect=(damaged,))
    refused("convert", tmp_path / "absent", tmp_path / "out", expect=("absent",))
    assert set(tmp_path.iterdir()) == before
    refused("convert", damaged, damaged, expect=(damaged,))
    assert damaged.stat().st_size == 72


def test_refused_ranking_leaves_nothing(refused, files, tmp_path) -> None:
    out = tmp_path / "out.safetensors"
    args = ["rank-tokens", "--tokenizer", files.model, "--out", out]
    refused(*args, "--input", tmp_path / "absent", expect=("absent",))
    (tmp_path / "empty.txt").write_text("")
    refused(*args, "--input", tmp_path / "empty.txt", expect=("no text",))
    assert not out.exists()
