"""Converting GGUF files: every quantisation, layouts, rope, refusals, and the real models."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize

from checkpoint_files import read_safetensors
from frspec.convert import convert
from frspec.convert.gguf_file import GgufFile
from frspec.convert.gguf_model import llama3_divisors
from frspec.convert.tensors import round_to_bf16
from frspec.errors import ConversionError

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 4, 2, 16, 2
TOKENS = ["<s>", "</s>", *(chr(i) for i in range(ord("a"), ord("z") + 1)), "ab", "\u0120"]
VOCAB = len(TOKENS) + 2  # rows without a token


def model_tensors(architecture: str = "llama", hidden: int = HIDDEN, ffn: int = FFN) -> dict:
    """A model's tensors under Hugging Face names, in float32."""
    rng = np.random.default_rng(0)
    head_dim = hidden // HEADS
    rows = {"q": hidden, "k": KV_HEADS * head_dim, "v": KV_HEADS * head_dim, "o": hidden}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        for letter, count in rows.items():
            shapes[f"{prefix}self_attn.{letter}_proj.weight"] = (count, hidden)
            if architecture == "qwen2" and letter != "o":
                shapes[f"{prefix}self_attn.{letter}_proj.bias"] = (count,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
        shapes[prefix + "mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.up_proj.weight"] = (ffn, hidden)
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, ffn)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (VOCAB, hidden)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in GGUF_NAMES:
        return f"{GGUF_NAMES[stem]}.{kind}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"


def pairs_interleaved(rows: np.ndarray, head_dim: int = HEAD_DIM) -> np.ndarray:
    """The llama GGUF layout, row by row: rotary partners i, i + head_dim / 2 become neighbours."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, inside = divmod(row, head_dim)
        half, pair = divmod(inside, head_dim // 2)
        out[head * head_dim + 2 * pair + half] = rows[row]
    return out


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    kinds: dict[str, Kind] | None = None,
    metadata: dict[str, Any] | None = None,
    tokenizer: bool = True,
    hidden: int = HIDDEN,
    ffn: int = FFN,
) -> Path:
    """`tensors` under GGUF names. `metadata` adds and replaces keys; None removes one."""
    values: dict[str, Any] = {
        f"{architecture}.block_count": LAYERS,
        f"{architecture}.context_length": 512,
        f"{architecture}.embedding_length": hidden,
        f"{architecture}.feed_forward_length": ffn,
        f"{architecture}.attention.head_count": HEADS,
        f"{architecture}.attention.head_count_kv": KV_HEADS,
        f"{architecture}.rope.freq_base": 10000.0,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    if tokenizer:
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": TOKENS,
            "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.chat_template": "{{ messages }}",
        }
    values |= metadata or {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, tensor if kind is None else tensor, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(tensors: dict, architecture: str = "llama") -> dict[str, np.ndarray]:
    """Hugging Face tensors under GGUF names, q and k of a llama permuted."""
    out = {}
    for name, tensor in tensors.items():
        permuted = architecture == "llama" and (".q_proj." in name or ".k_proj." in name)
        out[gguf_name(name)] = pairs_interleaved(tensor) if permuted else tensor
    return out


def write_model(path: Path, architecture: str = "llama", **options: Any) -> Path:
    tensors = gguf_tensors(model_tensors(architecture), architecture)
    drop = options.pop("drop", ())
    tensors = {name: tensor for name, tensor in tensors.items() if name not in drop}
    tensors |= options.pop("extra", {})
    return write_gguf(path, tensors, architecture, **options)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_tensors_and_config(tmp_path: Path, architecture: str) -> None:
    out = convert(write_model(tmp_path / "m.gguf", architecture), tmp_path / "out")
    expected = model_tensors(architecture)
    written = read_safetensors(out / "model.safetensors")
    assert set(written) == set(expected)
    for name, (code, values) in written.items():
        assert code == "F32"  # the file's own
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    config = json.loads((out / "config.json").read_text())
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    assert (
        config
        | {
            "architectures": [names[architecture]],
            "model_type": architecture,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,  # not 9.999999747378752e-06
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": VOCAB,
            "torch_dtype": "float32",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        == config
    )


def test_tied_head(tmp_path: Path) -> None:
    out = convert(write_model(tmp_path / "m.gguf", drop=("output.weight",)), tmp_path / "out")
    assert "lm_head.weight" not in read_safetensors(out / "model.safetensors")
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True


def test_llama_with_qkv_biases_is_written_as_qwen2(tmp_path: Path) -> None:
    biases = {
        name: tensor for name, tensor in model_tensors("qwen2").items() if name.endswith(".bias")
    }
    path = write_model(tmp_path / "m.gguf", extra=gguf_tensors(biases))
    out = convert(path, tmp_path / "out")
    written = read_safetensors(out / "model.safetensors")
    for name, bias in biases.items():
        np.testing.assert_array_equal(written[name][1], bias)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]


UNQUANTISED = {Kind.F32, Kind.F16, Kind.BF16}
ENCODERS = [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
BLOCKS_ONLY = [
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ1_0, Kind.TQ2_0),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S),
    *(Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL, Kind.IQ4_XS),
]


@pytest.mark.parametrize("kind", [*ENCODERS, *BLOCKS_ONLY], ids=lambda kind: kind.name)
def test_quantisations(tmp_path: Path, kind: Kind) -> None:
    """The package's dequantisation of each tensor at once is what every block comes to."""
    rng = np.random.default_rng(1)
    hidden, ffn = 256, 512
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    expected, stored, kinds = {}, {}, {}
    for name, tensor in model_tensors(hidden=hidden, ffn=ffn).items():
        if tensor.ndim == 1:
            expected[name], stored[gguf_name(name)] = tensor, tensor
            continue
        if kind in ENCODERS:
            raw = quantize(tensor, kind)
        else:  # nothing encodes these; any bytes are a tensor, with small scales for finite values
            shape = (len(tensor), tensor.shape[1] // block * nbytes)
            raw = rng.integers(0, 32, shape, dtype=np.uint8)
        values = dequantize(raw, kind)
        if "q_proj" in name or "k_proj" in name:
            head_dim = hidden // HEADS
            order = pairs_interleaved(np.arange(len(values)), head_dim)
            values = values[np.argsort(order)]
        expected[name] = values
        stored[gguf_name(name)], kinds[gguf_name(name)] = raw, kind
    path = write_gguf(tmp_path / "m.gguf", stored, kinds=kinds, hidden=hidden, ffn=ffn)
    out = convert(path, tmp_path / "out", dtype="fp32")
    for name, (_, values) in read_safetensors(out / "model.safetensors").items():
        assert np.isfinite(expected[name]).all()
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    out = convert(path, tmp_path / "own")
    code = {Kind.F16: "F16"}.get(kind, "BF16")
    for name, (found, values) in read_safetensors(out / "model.safetensors").items():
        assert found == code
        if code == "BF16":
            np.testing.assert_array_equal(values, round_to_bf16(expected[name]), err_msg=name)


# --- rope ---------------------------------------------------------------------------------------


def rope(tmp_path: Path, metadata: dict, freqs: np.ndarray | None = None) -> Any:
    extra = {} if freqs is None else {"rope_freqs.weight": freqs.astype(np.float32)}
    out = convert(write_model(tmp_path / "m.gguf", metadata=metadata, extra=extra), tmp_path / "o")
    return json.loads((out / "config.json").read_text())["rope_scaling"]


def test_linear_rope(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert rope(tmp_path, metadata) == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope(tmp_path: Path, factor: float) -> None:
    """rope_freqs.weight as published conversions compute it (in its own words here)."""
    divisors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * np.pi * 500000.0 ** (2 * pair / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    assert len(set(divisors)) == 3
    found = rope(tmp_path, {"llama.rope.freq_base": 500000.0}, np.array(divisors))
    assert found == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(llama3_divisors(500000.0, HEAD_DIM, factor, 8192), divisors)


@pytest.mark.parametrize(
    ("metadata", "freqs", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, None, "found yarn"),
        ({}, np.linspace(1, 8, HEAD_DIM // 2), "found other values"),
        ({}, np.full(3, 8.0), "found other values"),
        ({"llama.rope.dimension_count": 8}, None, "expected the head size 16, found 8"),
    ],
)
def test_other_ropes_are_refused(tmp_path: Path, metadata: dict, freqs, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        rope(tmp_path, metadata, freqs)
    assert not (tmp_path / "o").exists()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metadata": {"llama.block_count": None}}, "expected metadata llama.block_count"),
        ({"metadata": {"llama.block_count": 3}}, r"layers\.2\.input_layernorm.weight: expected"),
        ({"metadata": {"llama.block_count": 1}}, r"layers\.1\..*not part of the model"),
        ({"metadata": {"llama.feed_forward_length": 95}}, r"expected shape \[95, 64\], found"),
        ({"metadata": {"llama.expert_count": 8}}, "mixture-of-experts"),
        ({"metadata": {"llama.attention.head_count": 0}}, "must not be 0"),
        ({"metadata": {"llama.context_length": "many"}}, "expected one int, found 'many'"),
        ({"metadata": {"split.count": 3}}, "found one of 3 parts"),
        ({"drop": ("blk.1.ffn_up.weight",)}, "mlp.up_proj.weight: expected, found none"),
        ({"drop": ("token_embd.weight",)}, "token_embd.weight"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}}, "attn_q_norm.*not part"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(64, np.float32)}}, "found 1 of q, k, v"),
        ({"architecture": "qwen2", "drop": ("blk.0.attn_q.bias",)}, "found 2 of q, k, v"),
        ({"metadata": {"tokenizer.ggml.model": "bert"}}, "expected gpt2 or llama, found 'bert'"),
        ({"metadata": {"tokenizer.ggml.pre": "new"}}, "expected one of .*found 'new'"),
        ({"metadata": {"tokenizer.ggml.merges": None}}, "expected tokenizer.ggml.merges"),
        ({"metadata": {"tokenizer.ggml.merges": ["ab"]}}, "expected two pieces, found 'ab'"),
        ({"metadata": {"tokenizer.ggml.merges": ["a no"]}}, "tokenizer: "),
        ({"metadata": {"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}}, "are both 'a'"),
        ({"metadata": {"tokenizer.ggml.token_type": [1]}}, r"expected \d+ numbers, found 1"),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 999}}, "expected a token below"),
        ({"tokenizer": False}, "expected tokenizer.ggml.tokens, found none"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    path = write_model(tmp_path / "m.gguf", **options)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {}, "gemma2")
    with pytest.raises(ConversionError, match="architecture llama or qwen2, found 'gemma2'"):
        convert(path, tmp_path / "out")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = write_model(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, 3000, 41), *range(3000, len(data), 9973), len(data) - 1]
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(ConversionError, match="cut.gguf"):
            GgufFile(path)


def test_damaged_headers_are_refused_or_harmless(tmp_path: Path) -> None:
    """No flipped byte gives another exception, or takes forever over a false count."""
    data = write_model(tmp_path / "m.gguf", tokenizer=False).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    refused = 0
    for position in rng.integers(0, 1500, 400):
        changed = bytearray(data)
        changed[position] = rng.integers(256)
        path.write_bytes(changed)
        try:
            GgufFile(path)
        except ConversionError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"GGML" + bytes(20), "another magic number"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "expected GGUF version 2 or 3, found 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "counts 1152921504606846976 items"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61),
            "k counts 2305843009213693952 items",
        ),
    ],
)
def test_lying_headers(tmp_path: Path, header: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header)
    with pytest.raises(ConversionError, match=message):
        convert(path, tmp_path / "out")


def test_a_folder_with_one_gguf(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_model(folder / "m.gguf")
    assert (convert(folder, tmp_path / "out") / "tokenizer.json").exists()
    write_model(folder / "n.gguf")
    with pytest.raises(ConversionError, match="expected one GGUF file, found 2"):
        convert(folder, tmp_path / "other")


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")

    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(path, tmp_path / "out", progress=interrupt)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_a_chat_template_that_does_not_compile_is_left_out(tmp_path: Path) -> None:
    notes: list[str] = []
    source = write_model(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": "{% if %}"})
    out = convert(source, tmp_path / "out", note=notes.append)
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    assert any("chat template does not compile" in note for note in notes)


def test_absurd_layers_are_refused_at_once(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf", metadata={"llama.block_count": 2**31})
    with pytest.raises(
        ConversionError, match="num_hidden_layers: .* from 1 to 4096, found .* 2147483648"
    ):
        convert(source, tmp_path / "out")


def test_the_written_tokenizer(tmp_path: Path) -> None:
    out = convert(write_model(tmp_path / "m.gguf"), tmp_path / "out")
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("cab b</s>").tokens == ["c", "ab", "\u0120", "b", "</s>"]
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == "{{ messages }}"
    assert (settings["bos_token"], settings["eos_token"]) == ("<s>", "</s>")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}
