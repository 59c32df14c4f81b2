"""tools/compare_peers with the runtime that is always there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation_files import EvaluationFiles, write_evaluation_files

TOOL = Path(__file__).parents[2] / "tools" / "compare_peers"


@pytest.fixture(scope="module")
def files(tmp_path_factory, ranking_writer) -> EvaluationFiles:
    return write_evaluation_files(tmp_path_factory.mktemp("files"), ranking_writer)


def compare(files: EvaluationFiles, *options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, "--model", files.model, "--spec-bench", files.spec_bench]
    return subprocess.run(
        [*map(str, command), *map(str, options)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_table_and_report(files, tmp_path) -> None:
    done = compare(
        files, "--drafter", files.drafter, "--medusa", files.heads, "--ranking", files.ranking,
        "--vocab-sizes", 256, 128, "--medusa-vocab-size", 128, "--tasks", "mt", "conv", "qa",
        "--max-new-tokens", 12, "--json", tmp_path / "report.json",
        "--tree", "1x1x2", "--medusa-tree", "2x3x6@0.01",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    settings, runtimes = report["settings"], report["runtimes"]
    assert (settings["tree"], settings["medusa_tree"]) == ("1x1x2", "2x3x6@0.01")
    frspec = {name: row for name, row in runtimes.items() if name.startswith("frspec, ")}
    assert [*frspec] == [
        "frspec, plain", "frspec, EAGLE-2", "frspec, EAGLE-2 + FR 256", "frspec, EAGLE-2 + FR 128",
        "frspec, Medusa", "frspec, Medusa + FR 128",
    ]  # fmt: skip
    for name, row in frspec.items():
        assert row["same_text"] == 1 and row["tokens_per_s"] > 0
        assert name in done.stdout
    assert frspec["frspec, plain"]["over_plain"] == 1
    assert 1 < frspec["frspec, EAGLE-2"]["accept_length"] <= 2  # of trees of one drafted token
    assert "5 questions" in done.stdout
    for row in frspec.values():
        assert sum(task["questions"] for task in row["tasks"].values()) == 5
    tasks = frspec["frspec, EAGLE-2"]["tasks"]
    assert [*tasks] == ["mt", "conv", "qa"]
    cells = " | ".join(f"{task['accept_length']:.2f}" for task in tasks.values())
    assert f"| frspec, EAGLE-2 | {cells} |" in done.stdout


def test_a_tree_that_is_none(files) -> None:
    done = compare(files, "--drafter", files.drafter, "--tree", "3x4")
    assert done.returncode == 2
    assert "argument --tree: expected DEPTHxTOPKxTOKENS" in done.stderr


def test_a_runtime_that_cannot_start(files) -> None:
    done = compare(files, "--drafter", files.model / "none", "--tasks", "mt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("compare_peers: error: Frspec: ModelError: ")
