"""bench_cuda under the emulation: that its parts run and report what they should; not how fast."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from command_line import built_tool, write_synthetic_model

# A small device beside the reserve, so that copies which measure the bandwidth are small.
DEVICE = {"FRSPEC_EMULATION_DEVICE_BYTES": str(768 << 20)}
HIDDEN, FFN, VOCAB, SUB_VOCAB = 64, 136, 320, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB}
    folder = tmp_path_factory.mktemp("bench_cuda")
    return write_synthetic_model(folder, **sizes, max_position_embeddings=1024)


def run_bench(model: Path, *args: object) -> subprocess.CompletedProcess[str]:
    options = ["--model", model, "--drafter", model / "drafter",
               "--ranking", model / "ranking.safetensors"]  # fmt: skip
    return subprocess.run(
        [str(built_tool("bench_cuda")), *map(str, options), *map(str, args)],
        capture_output=True, text=True, timeout=300, env=os.environ | DEVICE,
    )  # fmt: skip


def test_every_part_reports(model, tmp_path) -> None:
    path = tmp_path / "report.json"
    done = run_bench(
        model, "--rows", 1, 9, "--contexts", 100, "--sub-vocab", SUB_VOCAB, "--tree", 2, 3, 6,
        "--repeats", 1, "--rotate-bytes", 4096, "--json", path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(path.read_text())
    sizes = {(row["op"], row["rows"]): row["bytes"] for row in report["linears"]}
    expected = {
        "qkv": 128 * HIDDEN, "o": HIDDEN * HIDDEN, "gate and up": 2 * FFN * HIDDEN,
        "down": FFN * HIDDEN, "fc": 2 * HIDDEN * HIDDEN, "head": VOCAB * HIDDEN,
        "sub-vocabulary head": SUB_VOCAB * HIDDEN,
    }  # fmt: skip
    assert sizes == {(op, n): 2 * count for op, count in expected.items() for n in (1, 9)}
    assert [row["rows"] for row in report["attention"]] == [1, 60]
    layer = (128 + HIDDEN + 3 * FFN) * HIDDEN
    assert [(row["vocab_size"], row["bytes"]) for row in report["drafting"]] == [
        (size, 2 * (2 * HIDDEN * HIDDEN + layer + size * HIDDEN)) for size in (SUB_VOCAB, VOCAB)
    ]
    for row in report["linears"] + report["attention"]:
        floor = row["bytes"] / report["bandwidth_bytes_per_s"] * 1e6
        assert row["floor_us"] == pytest.approx(floor)
        assert row["us"] > 0
    assert report["upload"]["loader_gb_per_s"] > 0
    memory = report["memory"]
    cublas = 69 << 20  # is in the plan, and the emulated one takes nothing
    assert memory["planned_bytes"] - cublas <= memory["taken_after_generation_bytes"]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--device", "cpu"], "--device"),
        (["--device", 7], "cuda:7"),
        (["--only", "nothing"], "nothing"),
        (["--only", "drafting", "--tree", 1, 3, 4], "depth of 2 or more"),
    ],
)
def test_nonsense_is_refused(model, args, named) -> None:
    done = run_bench(model, *args)
    assert done.returncode > 0  # not by a signal
    assert named in done.stderr
