"""tools/kernel_resources.py over what ptxas says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "kernel_resources.py"

BEAM = "_ZN6frspec4cuda12_GLOBAL__N_18expand_beam_kernelENS_9DraftPoolE"
LINEAR = "_ZN6frspec4cuda12_GLOBAL__N_113linear_kernelI13__nv_bfloat16fLi8ELb0EEEvNS_6ParamsE"


def ptxas(mangled: str, arch: str, registers: int, spilled: int = 0, shared: int = 0) -> str:
    smem = f", {shared} bytes smem" if shared else ""
    return f"""\
ptxas info    : Compiling entry function '{mangled}' for '{arch}'
ptxas info    : Function properties for {mangled}
    {spilled} bytes stack frame, {spilled} bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{smem}, 400 bytes cmem[0]
ptxas info    : Compile time = 4.701 ms
"""


# A function that was not inlined has properties of its own, which are not a kernel's.
CALLED = """\
ptxas info    : Function properties for _Z6calledi
    64 bytes stack frame, 64 bytes spill stores, 64 bytes spill loads
"""


def run_tool(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, args)], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def build(tmp_path) -> Path:
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "linear.ptxas").write_text(
        "ptxas info    : 0 bytes gmem\n"
        + ptxas(LINEAR, "sm_100", 134, shared=1024) + CALLED
        + ptxas(LINEAR, "sm_90", 96, shared=1024)
    )  # fmt: skip
    return tmp_path


def test_every_kernel_and_architecture_is_listed(build, tmp_path) -> None:
    done = run_tool(build, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        "2 kernels for sm_90, sm_100; 0 of them spill registers"
    )
    kernels = json.loads((tmp_path / "out.json").read_text())
    assert [(k["arch"], k["registers"], k["stack"], k["shared"]) for k in kernels] == [
        ("sm_100", 134, 0, 1024), ("sm_90", 96, 0, 1024)
    ]  # fmt: skip
    assert {k["file"] for k in kernels} == {"linear"}
    if shutil.which("c++filt"):
        assert {k["name"] for k in kernels} == {"linear_kernel<bf16, float, 8, false>"}


def test_a_spill_fails_and_is_named(build) -> None:
    (build / "cuda" / "draft_tree.ptxas").write_text(ptxas(BEAM, "sm_90", 40, spilled=8))
    done = run_tool(build)
    assert done.returncode == 1
    assert "expand_beam_kernel" in done.stderr
    assert done.stderr.endswith("spills 16 bytes on sm_90\n")


@pytest.mark.parametrize("content", [None, "ptxas info    : 0 bytes gmem\n", "cut"])
def test_nothing_to_read_is_an_error(tmp_path, content) -> None:
    path = tmp_path / "linear.ptxas"
    if content == "cut":
        content = "\n".join(ptxas(LINEAR, "sm_90", 96).splitlines()[:2])
    if content is not None:
        path.write_text(content)
    done = run_tool(path)
    assert done.returncode == 2
    assert done.stderr.startswith("kernel_resources: error: ")


def test_a_list_that_cannot_be_written_is_an_error(build, tmp_path) -> None:
    done = run_tool(build, "--json", tmp_path / "no" / "folder")
    assert done.returncode == 2
    assert done.stderr.startswith("kernel_resources: error: ") and done.stderr.count("\n") == 1
