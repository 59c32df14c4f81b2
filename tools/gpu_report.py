"""The written part of tools/gpu_report.sh: what the machine is, how the pieces ended, the report.

    gpu_report.py machine OUT                      what the machine is -> OUT/pieces/machine.json
    gpu_report.py record OUT PIECE CODE SECONDS    how a piece ended -> OUT/pieces/PIECE.json
    gpu_report.py write OUT                        all of OUT/pieces -> OUT/report.json, report.md

A piece's results are OUT/pieces/PIECE.*, as its tools wrote them. Needs nothing but Python.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_report_tables import markdown, targets

PIECES = ("build", "tests", "exactness", "bench", "shapes", "sanitizer", "resources",
          "transformers")  # fmt: skip
SKIPPED = 77
TIMED_OUT = (124, 137)
# Of those that nvidia-smi may not know, one spoils the query of all.
GPU_FIELDS_AT_LEAST = ("name", "driver_version", "compute_cap")
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "power.limit",
              "clocks.max.sm", "clocks.max.mem", "clocks.sm", "clocks.mem", "temperature.gpu",
              "mig.mode.current")  # fmt: skip


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    gpu = gpu_properties(GPU_FIELDS) or gpu_properties(GPU_FIELDS_AT_LEAST)
    nvcc = re.search(r"release ([\d.]+)", output_of("nvcc", "--version") or "")
    cpu = re.search(r"model name\s*: (.*)", output_of("cat", "/proc/cpuinfo") or "")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": os.environ.get("FRSPEC_COMMIT")
        or output_of("git", "describe", "--always", "--dirty"),
        "gpu": gpu,
        "cuda_toolkit": nvcc[1] if nvcc else None,
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
    }


def gpu_properties(fields: tuple[str, ...]) -> dict[str, str] | None:
    """Of the first GPU; None when nvidia-smi does not tell."""
    found = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    return dict(zip(fields, found.splitlines()[0].split(", "), strict=False)) if found else None


def record(out: Path, piece: str, code: int, seconds: int) -> str:
    """Writes how a piece ended and returns it in words."""
    log = (out / "logs" / f"{piece}.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if code in TIMED_OUT:
        status = "timed out"
    else:
        status = {0: "passed", SKIPPED: "skipped"}.get(code, "failed")
    outcome = {"status": status, "exit_code": code, "seconds": seconds}
    if code != 0 and lines:
        outcome["last_line"] = lines[-1]
    write_json(out / "pieces" / f"{piece}.json", outcome)
    if status == "skipped":
        return f"skipped: {outcome.get('last_line', '')}"
    return f"{status} in {seconds} s"


def tests_summary(log: str) -> dict[str, int] | None:
    """What doctest counted, in all processes."""
    found = re.findall(r"test cases:\s*(\d+) \|\s*(\d+) passed \|\s*(\d+) failed", log)
    if not found:
        return None
    sums = (sum(map(int, column)) for column in zip(*found, strict=True))
    return dict(zip(("run", "passed", "failed"), sums, strict=True))


def sanitizer_summary(log: str) -> str | None:
    found = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", log)
    return found[-1] if found else None


def read_log(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {"unreadable": str(error)}  # a piece that was cut off while it wrote


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def collect(out: Path) -> dict[str, Any]:
    """Everything that the pieces left, by piece, with the targets it is measured by."""
    report: dict[str, Any] = {"machine": read_json(out / "pieces" / "machine.json"), "pieces": {}}
    for piece in PIECES:
        path = out / "pieces" / f"{piece}.json"
        outcome = read_json(path) if path.exists() else {"status": "not run"}
        results: dict[str, Any] = {}
        for path in sorted((out / "pieces").glob(f"{piece}.*.*")):
            if path.suffix == ".new":  # being written when its piece was ended
                continue
            name = path.stem.removeprefix(f"{piece}.")
            results[name] = read_json(path) if path.suffix == ".json" else read_log(path)
        if piece == "tests":
            results = {"cuda_tests": tests_summary(read_log(out / "logs" / "tests.log"))}
        if piece == "sanitizer":
            results = {
                tool: sanitizer_summary(read_log(out / "logs" / f"sanitizer.{tool}.log"))
                for tool in ("memcheck", "racecheck")
            }
        outcome["results"] = {name: value for name, value in results.items() if value is not None}
        report["pieces"][piece] = outcome
    report["targets"] = targets(report["pieces"])
    return report


def main(arguments: list[str]) -> int:
    command, out = arguments[0], Path(arguments[1])
    if command == "machine":
        write_json(out / "pieces" / "machine.json", machine())
    elif command == "record":
        print(record(out, arguments[2], int(arguments[3]), int(arguments[4])))
    else:
        report = collect(out)
        write_json(out / "report.json", report)
        (out / "report.md").write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
