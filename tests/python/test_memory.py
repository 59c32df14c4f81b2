"""The memory plan against what the process really takes (contract 3)."""

import subprocess
import sys

import pytest

from reference import tiny

# Runs in a process of its own: the peak of a process never falls again.
PROBE = """
import re, sys
import numpy as np
from frspec._core import Engine

def peak_bytes():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

model, drafter, context = sys.argv[1:]
engine = Engine(model, drafter=drafter, device="cpu", threads=2, max_context=int(context),
                tree=(3, 4, 12, 0.0))
before = peak_bytes()
engine.load()
prompt = np.arange(1, int(context) - 40, dtype=np.int32) % 500
for method in ("plain", "eagle2"):
    engine.start(prompt, method=method, max_new_tokens=30, ignore_eos=True)
    while engine.finish_reason is None:
        engine.step()
print(sum(size for _, size in engine.plan), peak_bytes() - before)
"""


def test_peak_memory_is_within_five_percent_of_the_plan(tmp_path):
    if sys.platform != "linux":
        pytest.skip("reads /proc/self/status")
    # As of real models, the embedding is the largest tensor and a good part of the whole.
    sizes = {"hidden": 512, "heads": 8, "kv_heads": 4, "ffn": 1408, "vocab": 40000, "layers": 8}
    model = tiny.TinyModel(name="memory", dtype="bfloat16", **sizes)
    target = tiny.write_model(tmp_path / "target", model)
    drafter = tiny.write_drafter(tmp_path / "drafter", model, target, tiny.TinyDrafter())
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(target), str(drafter), "1000"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    planned, peak = map(int, done.stdout.split())
    assert abs(peak - planned) < 0.05 * planned, f"planned {planned}, peak {peak}"
