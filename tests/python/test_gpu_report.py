"""tools/gpu_report.sh: the report out of what pieces left, and a machine without a GPU."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def drafted(
    vocab_size: str, speed_up: float, verify: float, same: bool = True, **ratios: float
) -> dict:
    spread = {"median": 1.0, "p10": 0.9, "p90": 1.1}
    shared = {"first_token_ms": spread, "round_ms": spread, "verify_ms": spread}
    stages = {
        "embedding": 0.02, "layers": 0.28, "head": 0.6, "topk": 0.08, "tree": 0.01
    }  # fmt: skip
    return {
        "prompt_tokens": 512,
        "vocab_size": vocab_size,
        "bandwidth_bytes_per_s": 3e12,
        "step_bytes": 15e9,
        "floor_ms": 5.0,
        "plain": shared | {"tokens_per_s": {"median": 200.0}, "share_of_floor": 0.93},
        "drafted": {
            **shared,
            "tokens_per_s": {"median": 200.0 * speed_up},
            **{name: {"median": ratio} for name, ratio in ratios.items()},
            "over_plain": {"median": speed_up, "p10": speed_up - 0.1, "p90": speed_up + 0.1},
            "accept_length": 3.7,
            "draft_ms": spread,
            "verify_over_plain": {"median": verify},
            "share_of_floor": 0.88,
            "same_text": same,
            "breakdown": {
                "draft_ms": spread,
                "stages_ms": {
                    name: {"median": share, "share": share} for name, share in stages.items()
                },
            },
        },
    }


def bench(*runs: dict, temperature: float = 0) -> dict:
    return {"temperature": temperature, "planted": True, "together": True, "runs": list(runs)}


def linears(us: float, free_us: float) -> list[dict]:
    return [
        {"op": op, "rows": rows, "us": us, "free_us": free_us, "cublas_us": 20.0, "share": 0.9}
        for op in ("qkv", "o", "gate and up", "down", "head")
        for rows in (1, 60)
    ]


SHAPES = {
    "bandwidth_bytes_per_s": 3e12,
    "linears": linears(us=10.3, free_us=10.0),
    "drafting": [{"vocab_size": 32768, "us": 330.0, "floor_us": 250.0}],
}
PIECES: dict[str, object] = {
    "machine.json": {"gpu": {"name": "NVIDIA Test"}, "commit": "abc", "date": "today", "cores": 16},
    "build.json": {"status": "passed", "exit_code": 0, "seconds": 80},
    "tests.json": {"status": "passed", "exit_code": 0, "seconds": 9},
    "exactness.json": {"status": "failed", "exit_code": 1, "seconds": 40},
    "exactness.llama-3-8b.T1.json": bench(drafted("full", 2, 1, same=False), temperature=1),
    "exactness.smollm.txt": "vocabulary tree\n      full 6x10x60\n",
    "bench.json": {"status": "passed", "exit_code": 0, "seconds": 50},
    "bench.llama-3-8b.json": bench(
        drafted("full", 2.30, 1.05), drafted("32768", 2.65, 1.12, over_first=1.16)
    ),
    "shapes.json": {"status": "timed out", "exit_code": 124, "seconds": 60},
    "shapes.llama-3-8b.json": SHAPES,
    "shapes.llama-3.2-1b.memory.json": {
        "memory": {
            "planned_bytes": int(4e9), "taken_by_load_bytes": int(3.96e9),
            "taken_after_generation_bytes": int(4.2e9),
        }
    },
    "sanitizer.json": {"status": "failed", "exit_code": 1, "seconds": 60},
    "transformers.json": {"status": "passed", "exit_code": 0, "seconds": 60},
    "transformers.llama-3-8b.json": {
        "torch": "2", "transformers": "5", "eager": {"tokens_per_s": 50.0}
    },
}  # fmt: skip
LOGS = {
    "tests": "[doctest] test cases: 30 | 30 passed | 0 failed | 0 skipped\n"
    "[doctest] test cases: 8 | 7 passed | 1 failed | 0 skipped\n",
    "sanitizer.memcheck": "========= ERROR SUMMARY: 2 errors\n",
}


@pytest.fixture
def write_report(tmp_path) -> Callable[[dict[str, object]], tuple[dict, str]]:
    """Writes the report out of hand-written pieces: what is in report.json, and report.md."""

    def write(pieces: dict[str, object]) -> tuple[dict, str]:
        for folder in ("pieces", "logs"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for name, content in pieces.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / "pieces" / name).write_text(text)
        for name, text in LOGS.items():
            (tmp_path / "logs" / f"{name}.log").write_text(text)
        tool = [sys.executable, str(TOOLS / "gpu_report.py"), "write", str(tmp_path)]
        done = subprocess.run(tool, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / "report.json").read_text())
        return report, (tmp_path / "report.md").read_text()

    return write


def test_targets_stand_beside_what_was_measured(write_report) -> None:
    report, text = write_report(PIECES)
    measured = {row["target"]: (row["measured"], row["met"]) for row in report["targets"]}
    share = "plain decoding, share of the copy bandwidth"
    verification = "verification of 60 nodes over one token"
    assert measured[f"Llama-3-8B: {share}"] == (0.93, True)
    assert measured[f"Llama-3.2-1B: {share}"] == (None, None)
    assert measured[f"Llama-3-8B: {verification}"] == (1.12, False)  # of the worst run
    assert measured["Llama-3-8B: FR-Spec over plain decoding"] == (2.65, True)
    assert measured["Llama-3-8B: FR-Spec over EAGLE-2"] == (1.16, True)
    assert measured["Llama-3-8B: a draft level over 32,768 tokens, over its byte floor"] == (
        pytest.approx(1.32), False,
    )  # fmt: skip
    cost = measured["Llama-3-8B: cost of invariance, products of a step, 60 rows"]
    assert cost == (pytest.approx(0.03), True)
    assert measured["Llama-3.2-1B: memory beside the plan"] == (pytest.approx(0.01), True)
    assert "Llama-3.2-1B: the memory plan says 4.000 GB; loading takes 3.960 GB (-1.00 %)" in text
    assert f"| Llama-3-8B: {share} | >= 92.0 % | 93.0 % | met |" in text
    assert f"| Llama-3.2-1B: {share} | >= 80.0 % | not measured |  |" in text
    assert f"| Llama-3-8B: {verification} | <= 1.100x | 1.120x | **missed** |" in text


def test_planted_accept_lengths_count_as_they_were_asked_for(write_report) -> None:
    """What a text of a few rounds happened to accept is not what is compared."""
    planted = bench(drafted("full", 2.30, 1.05), drafted("32768", 2.65, 1.12, over_first=1.16))
    for run, (asked, round_ms) in zip(planted["runs"], ((3.9, 6.0), (3.6, 5.0)), strict=True):
        run["plain"]["round_ms"] = {"median": 3.0}
        run["drafted"] |= {"planted_accept_length": asked, "round_ms": {"median": round_ms}}
    report, _ = write_report(PIECES | {"bench.llama-3-8b.json": planted})
    measured = {row["target"]: row["measured"] for row in report["targets"]}
    assert measured["Llama-3-8B: FR-Spec over plain decoding"] == pytest.approx(3.6 * 3 / 5)
    assert measured["Llama-3-8B: FR-Spec over EAGLE-2"] == pytest.approx((3.6 / 5) / (3.9 / 6))


def test_the_benchmark_has_its_breakdown(write_report) -> None:
    _, text = write_report(PIECES)
    assert "## Llama-3-8B, prompt of 512 tokens" in text
    assert "| draft head: 32768 | 530.0 | 2.65x (2.55 to 2.75) | 3.70 | 1.0 | 1.000 |" in text
    parts = "0.020 (2 %) | 0.280 (28 %) | 0.600 (60 %) | 0.080 (8 %) | 0.010 (1 %)"
    assert f"| draft head: full | 1.000 | {parts} |" in text
    assert "Memory did not hold" not in text

    alone = bench(drafted("full", 2, 1), drafted("32768", 3, 1)) | {"together": False}
    report, text = write_report(PIECES | {"bench.llama-3-8b.json": alone})
    measured = {row["target"]: row["measured"] for row in report["targets"]}
    assert measured["Llama-3-8B: FR-Spec over EAGLE-2"] == 1.5
    assert "Memory did not hold both drafters at once" in text


def test_failures_and_missing_pieces_are_named(write_report) -> None:
    report, text = write_report(PIECES)
    assert text.startswith("# GPU report: NVIDIA Test\n")
    assert "| tests | passed | 9 | 37 of 38 tests passed |" in text
    assert "| exactness | **failed** | 40 |" in text
    assert "| shapes | **timed out** | 60 |" in text
    assert "| sanitizer | **failed** | 60 | memcheck: ERROR SUMMARY: 2 errors |" in text
    assert "| resources | not run |" in text
    assert "| llama-3-8b | 1 | full | yes | 3.70 | **different** |" in text
    assert "full 6x10x60" in text  # of real weights
    assert "accept lengths are planted" in text
    assert "| static cache, eager (torch 2, 5) | 50.0 | 200.0 | 4.00x |" in text
    assert "compiled (torch 2, 5) | not measured |" in text
    assert set(report["pieces"]["sanitizer"]["results"]) == {"memcheck"}


def test_results_cut_off_while_they_were_written(write_report) -> None:
    no_level = SHAPES | {"drafting": [], "linears": []}
    cut = PIECES | {
        "shapes.llama-3.2-1b.memory.json": "{",
        "bench.llama-3-8b.json": '{"runs": [{',
        "shapes.llama-3-8b.json": no_level,
        "shapes.llama-3.2-1b.json": {},
    }
    report, text = write_report(cut)
    assert "The results of `bench.llama-3-8b` are incomplete" in text
    assert "The results of `shapes.llama-3.2-1b` are incomplete" in text
    assert "## Parts of Llama-3-8B" in text
    assert all(row["measured"] is None for row in report["targets"])


def run_script(
    script: str, *args: object, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(TOOLS / script), *map(str, args)], cwd=cwd,
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip


def gpu_report(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_script("gpu_report.sh", *args, **environment)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_a_machine_without_a_gpu_gets_a_report_that_says_so(tmp_path) -> None:
    done = gpu_report(tmp_path / "out", "tests", "bench", FRSPEC_BUILD=str(tmp_path / "build"))
    assert done.returncode == 3, done.stderr
    assert "tests: skipped: no GPU" in done.stdout
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.startswith("# GPU report: no GPU\n")
    assert "nothing ran on a device" in text
    assert "| tests | skipped |" in text
    assert "| shapes | not run |" in text


@pytest.mark.parametrize(
    ("args", "limit", "named"),
    [
        (["out", "benches"], "9", "'benches'"),
        (["out", ""], "9", "found ''"),
        ([], "9", "a folder"),
        ([""], "9", "a folder"),
        (["--out"], "9", "found '--out'"),
        (["out", "tests"], "abc", "FRSPEC_REPORT_LIMIT: expected seconds, found 'abc'"),
        (["out", "tests"], "0", "expected seconds, found '0'"),
        (["out", "tests"], "1.5", "expected seconds, found '1.5'"),
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path, args, limit, named) -> None:
    done = run_script("gpu_report.sh", *args, cwd=tmp_path, FRSPEC_REPORT_LIMIT=limit)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_report: error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args", [[], [""], ["-x"], ["deps", "wheels"], ["deps", "headers", ""]])
def test_a_wrong_command_line_collects_nothing(tmp_path, args) -> None:
    done = run_script("gpu_report_deps.sh", *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_report_deps: error: ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("script", ["gpu_report.sh", "gpu_report_deps.sh", "setup.sh"])
def test_scripts_have_help(tmp_path, script, option) -> None:
    done = run_script(script, option, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert f"usage: tools/{script} " in done.stdout and "#" not in done.stdout
    assert not list(tmp_path.iterdir())


def pretend_programs(tmp_path: Path, tests: str) -> dict[str, str]:
    """A GPU that only nvidia-smi sees, and cuda_tests that does what `tests` says."""
    programs, build = tmp_path / "bin", tmp_path / "build"
    for path, script in (
        (programs / "nvidia-smi", 'echo "GPU 0: Pretend"'),
        (build / "cuda_tests", tests),
        (build / "bench_cuda", "exit 1"),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    return {"FRSPEC_BUILD": str(build), "PATH": f"{programs}:{os.environ['PATH']}"}


def pretend(tmp_path: Path, tests: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    environment = pretend_programs(tmp_path, tests)
    done = gpu_report(tmp_path / "out", "tests", "bench", "shapes", **environment)
    return done, json.loads((tmp_path / "out" / "report.json").read_text())["pieces"]


FILES = len(list((TOOLS.parent / "tests" / "cuda").glob("test_*.cpp")))


def test_a_failing_piece_is_reported_and_the_next_one_runs(tmp_path) -> None:
    done, pieces = pretend(
        tmp_path,
        """case $* in *linear*) echo '[doctest] test cases: 3 | 2 passed | 1 failed'; exit 1;; esac
        echo '[doctest] test cases: 2 | 2 passed | 0 failed'""",
    )
    assert done.returncode == 1
    assert "tests: failed" in done.stdout
    assert "test_cuda_linear.cpp fails with FRSPEC_PDL=0 too" in done.stdout
    assert "bench: skipped: frspec-bench is not built" in done.stdout
    assert pieces["tests"]["status"] == "failed"
    assert pieces["tests"]["results"]["cuda_tests"] == {
        "run": 2 * FILES + 1, "passed": 2 * FILES, "failed": 1
    }  # fmt: skip


def test_what_only_early_launches_break_is_told(tmp_path) -> None:
    done, pieces = pretend(
        tmp_path,
        """[ "$FRSPEC_PDL" = 0 ] || case $* in *engine*) exit 139;; esac
        echo '[doctest] test cases: 2 | 2 passed | 0 failed'""",
    )
    assert done.returncode == 1
    told = "test_cuda_engine.cpp failed; with FRSPEC_PDL=0 all pass, and what follows ran so"
    assert pieces["tests"]["last_line"] == told
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{2 * FILES - 2} of {2 * FILES - 2} tests passed; {told} |" in text


def test_tests_that_do_not_end_cost_no_other_piece_its_time(tmp_path) -> None:
    done, pieces = pretend(
        tmp_path,
        """case $* in *linear*) exit 124;; *row_ops*) exit 1;; esac
        echo '[doctest] test cases: 2 | 2 passed | 0 failed'""",
    )
    assert done.returncode == 1
    assert pieces["shapes"]["status"] == "skipped"
    assert pieces["shapes"]["last_line"] == "the tests of test_cuda_linear.cpp did not end"


@pytest.mark.parametrize("ignored", ["", "trap '' INT TERM;"])
@pytest.mark.parametrize(("key", "status"), [(b"\x03", 130), (None, 143)])
def test_an_interrupt_ends_the_running_piece_and_keeps_the_report(
    tmp_path, key, status, ignored
) -> None:
    environment = pretend_programs(
        tmp_path, f"{ignored} echo >/dev/fd/$HELD; sleep 600 & sleep 600"
    )
    terminal, its_end = pty.openpty()
    held, held_by_pieces = os.pipe()

    def in_its_foreground() -> None:
        fcntl.ioctl(its_end, termios.TIOCSCTTY, 0)
        # Who started these tests may ignore it.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    running = subprocess.Popen(
        ["bash", str(TOOLS / "gpu_report.sh"), str(tmp_path / "out"), "tests", "bench"],
        env=os.environ | environment | {"HELD": str(held_by_pieces)}, pass_fds=[held_by_pieces],
        stdin=its_end, stdout=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=in_its_foreground,
    )  # fmt: skip
    os.close(its_end)
    os.close(held_by_pieces)
    try:
        assert os.read(held, 1) == b"\n"
        if key is None:
            running.terminate()
        else:
            os.write(terminal, key)
        said, _ = running.communicate(timeout=60)
        assert running.returncode == status
        assert said.endswith("interrupted\n") and "bench" not in said
        assert (tmp_path / "out" / "report.md").exists()
        # The pipe ends with the last process that has it.
        assert select.select([held], [], [], 60)[0] and os.read(held, 1) == b""
    finally:
        os.close(terminal)
        os.close(held)


def test_resources_need_every_kernel_file(tmp_path) -> None:
    environment = pretend_programs(tmp_path, "exit 1")
    kernels = tmp_path / "build" / "cuda"
    kernels.mkdir()
    for source in (TOOLS.parent / "cuda").glob("*.cu"):
        (kernels / f"{source.stem}.ptxas").write_text(
            "ptxas info    : Compiling entry function 'kernel' for 'sm_90'\n"
            "ptxas info    : Function properties for kernel\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 40 registers\n"
        )
    done = gpu_report(tmp_path / "out", "resources", **environment)
    assert done.returncode == 0 and "resources: passed" in done.stdout

    (kernels / "attention.ptxas").unlink()
    done = gpu_report(tmp_path / "out", "resources", **environment)
    assert done.returncode == 1
    assert "resources: failed" in done.stdout and "attention.cu is not built" in done.stdout
