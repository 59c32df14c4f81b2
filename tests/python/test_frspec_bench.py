"""frspec-bench over synthetic models: what it reports, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from command_line import built_tool, write_synthetic_model

VOCAB = 2048  # so that a stage of drafting takes longer than looking at the clock
SPREADS = ("first_token_ms", "round_ms", "verify_ms", "tokens_per_s")
STAGES = {"embedding", "layers", "head", "topk", "tree"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sizes = {"vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256}
    return write_synthetic_model(tmp_path_factory.mktemp("bench"), **sizes)


def drafting(model: Path, drafter: str = "drafter", new_tokens: int = 16) -> list[object]:
    """Options for a drafter of the model, and few, short texts."""
    return [
        *("--model", model, "--drafter", model / drafter),
        *("--ranking", model / "ranking.safetensors"),
        *("--new-tokens", new_tokens, "--repeats", 2),
    ]


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(built_tool("frspec-bench")), "--device", "cpu", *map(str, args)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def measure(path: Path, *args: object) -> tuple[dict[str, Any], str]:
    """What it wrote to `path` and what it printed."""
    done = bench(*args, "--json", path)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def check_spread(spread: dict[str, float]) -> None:
    assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]


def check_run(run: dict[str, Any]) -> None:
    """What every drafted run has."""
    plain, drafted = run["plain"], run["drafted"]
    for name in SPREADS:
        check_spread(plain[name])
        check_spread(drafted[name])
    for name in ("draft_ms", "over_plain", "verify_over_plain"):
        check_spread(drafted[name])
    assert plain["accept_length"] == 1 <= drafted["accept_length"]
    assert plain["share_of_floor"] > 0 and drafted["share_of_floor"] > 0
    assert run["floor_ms"] == pytest.approx(run["step_bytes"] / run["bandwidth_bytes_per_s"] * 1e3)
    assert run["memory_bytes"] > run["step_bytes"]
    assert drafted["same_text"]


def test_configurations_take_turns_over_every_prompt(model, tmp_path) -> None:
    report, text = measure(
        tmp_path / "report.json", *drafting(model),
        *("--vocab-sizes", "full", 128, "--trees", "1x3x4", "3x4x12", "--prompt-tokens", 5, 40),
    )  # fmt: skip
    assert report["together"] and not report["planted"]
    configurations = [(size, tree) for size in ("full", "128") for tree in ([1, 3, 4], [3, 4, 12])]
    runs = report["runs"]
    assert [(run["prompt_tokens"], (run["vocab_size"], run["tree"])) for run in runs] == [
        (length, configuration) for length in (5, 40) for configuration in configurations
    ]
    for number, run in enumerate(runs):
        check_run(run)
        assert run["plain"] == runs[number // 4 * 4]["plain"]  # one beside all four
        assert ("over_first" in run["drafted"]) == (number % 4 > 0)
        check_spread(run["drafted"].get("over_first", run["drafted"]["over_plain"]))
    assert len({run["memory_bytes"] for run in runs}) == 4
    for words in ("Prompt of 40 tokens (made up)", "first token ms", "EAGLE-2 128 3x4x12"):
        assert words in text
    widths = {len(line) for line in text.splitlines() if line.endswith(("same", "text"))}
    assert len(widths) == 1, text  # aligned


def test_drafters_beside_each_other(model, tmp_path) -> None:
    heads = tmp_path / "choices.json"
    heads.write_text("[[0], [1], [0, 0]]")
    report, text = measure(
        tmp_path / "report.json", *drafting(model), *("--prompt-tokens", 5),
        *("--drafter", model / "medusa", "--compare", "full", "128", "--medusa-choices", heads),
    )  # fmt: skip
    found = [(Path(run["drafter"]).name, run["vocab_size"]) for run in report["runs"]]
    assert found == [(d, size) for d in ("drafter", "medusa") for size in ("full", "128")]
    methods = [run["drafted"]["method"] for run in report["runs"]]
    assert methods == ["eagle2", "eagle2", "medusa", "medusa"]
    assert report["runs"][-1]["tree"][2] == 4  # the root and the three paths
    for run in report["runs"]:
        check_run(run)
    assert "Medusa 128 " in text
    heads.write_text("[[0], 1]")
    done = bench(*drafting(model, "medusa"), "--medusa-choices", heads)
    assert done.returncode == 2 and "expected a JSON list of paths" in done.stderr
    done = bench(*drafting(model), "--medusa-choices", "mc_sim_7b_63")
    assert done.returncode == 2 and "expected a Medusa drafter" in done.stderr


def test_configurations_one_by_one(model, tmp_path) -> None:
    (tmp_path / "prompt").write_text("1 2 3\n4 5")
    report, text = measure(
        tmp_path / "report.json", *drafting(model), "--no-breakdown",
        *("--compare", "full", "256", "128:2x3x6@0.25", "--token-ids", tmp_path / "prompt"),
    )  # fmt: skip
    assert [(run["vocab_size"], run["tree"]) for run in report["runs"]] == [
        ("full", [4, 4, 6]), ("256", [4, 4, 6]), ("128", [2, 3, 6])
    ]  # fmt: skip
    assert [run["tree_min_probability"] for run in report["runs"]] == [0.08, 0.08, 0.25]
    assert {run["prompt_file"] for run in report["runs"]} == {str(tmp_path / "prompt")}
    assert {run["prompt_tokens"] for run in report["runs"]} == {5}
    assert not any("breakdown" in run["drafted"] for run in report["runs"])
    assert "softmax, top-k" not in text


@pytest.mark.parametrize(("drafter", "method"), [("drafter", "EAGLE-2"), ("medusa", "Medusa")])
def test_the_stages_of_drafting_are_its_time(model, tmp_path, drafter, method) -> None:
    report, text = measure(
        tmp_path / "report.json", *drafting(model, drafter),
        *("--vocab-sizes", "full", 256, "--trees", "4x8x20", "--prompt-tokens", 20),
    )  # fmt: skip
    tree = "4x8x20" if drafter == "drafter" else "3x8x20"  # there are three heads
    assert "softmax, top-k" in text and f"{method} 256 {tree}" in text
    for run in report["runs"]:
        check_run(run)
        breakdown = run["drafted"]["breakdown"]
        check_spread(breakdown["draft_ms"])
        stages = breakdown["stages_ms"]
        assert stages.keys() == STAGES
        if drafter == "medusa":  # reads no embedding
            assert stages.pop("embedding")["p90"] == 0
        for stage in stages.values():
            check_spread(stage)
        # Each is the median of its own rounds, so that they may add up to a little more.
        assert 0.8 < sum(stage["share"] for stage in stages.values()) < 1.05


def test_planted_accept_lengths(model, tmp_path) -> None:
    report, text = measure(
        tmp_path / "report.json", *drafting(model, new_tokens=120),
        *("--vocab-sizes", "full", 128, "--trees", "6x4x20@0.3", "--plant-accept-length", 3.5, 2.5),
        *("--prompt-tokens", 20),
    )  # fmt: skip
    assert "Accept lengths are planted" in text
    assert report["planted"]
    for run, accept_length in zip(report["runs"], [3.5, 2.5], strict=True):
        check_run(run)
        assert run["drafted"]["planted_accept_length"] == accept_length
        assert run["tree_min_probability"] == 0  # what is planted needs whole trees
        assert run["drafted"]["accept_length"] == pytest.approx(accept_length, abs=0.35)


def test_the_first_token_is_that_of_a_whole_prompt(model, tmp_path) -> None:
    """No text keeps the prompt of the one before. Without a drafter there is plain decoding."""
    report, text = measure(
        tmp_path / "report.json", "--model", model, "--prompt-tokens", 8, 480, "--new-tokens", 4
    )
    short, long = (run["plain"]["first_token_ms"] for run in report["runs"])
    assert long["p10"] > 4 * short["p10"]  # 60 times the tokens
    assert not any("drafted" in run for run in report["runs"])
    assert "drafting" in text and "EAGLE" not in text


def test_where_memory_does_not_hold_all_each_is_alone(model, tmp_path) -> None:
    options = [*drafting(model), "--vocab-sizes", "full", 128, "--prompt-tokens", 20]
    report, _ = measure(tmp_path / "report.json", *options)
    limit = sum(run["memory_bytes"] for run in report["runs"]) - 1
    report, text = measure(tmp_path / "report.json", *options, "--memory-limit", limit)
    assert "Memory does not hold all configurations" in text
    assert not report["together"]
    for run in report["runs"]:
        check_run(run)
        assert "over_first" not in run["drafted"]
    assert report["runs"][0]["plain"] != report["runs"][1]["plain"]
    done = bench(*options, "--memory-limit", "1MB")
    assert done.returncode == 2 and "the memory plan needs" in done.stderr


def test_prompts_from_files(model, tmp_path) -> None:
    words, text = tmp_path / "words", tmp_path / "list.json"
    words.write_text("5 6\n7\n")
    text.write_text("[5, 6,7]\n")
    report, _ = measure(
        tmp_path / "report.json", "--model", model, "--token-ids", words, text, "--new-tokens", 4
    )
    assert [run["prompt_tokens"] for run in report["runs"]] == [3, 3]


def test_a_report_that_nobody_gets_is_an_error(model) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [built_tool("frspec-bench"), "--model", model, "--prompt-tokens", "3"]
            + ["--new-tokens", "2", "--repeats", "1"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "frspec-bench: error: stdout: cannot be written\n")


def test_refusals(model, tmp_path) -> None:
    (tmp_path / "words").write_text("1 2 x")
    (tmp_path / "large").write_text("1 2 99999999999")
    (tmp_path / "none").write_text("[]\n")
    (tmp_path / "outside").write_text(f"1 {VOCAB}")
    report = tmp_path / "report.json"
    report.write_text("kept")
    for options, message in [
        ([], "--model"),
        (["--model", tmp_path / "nothing"], "nothing"),
        (["--model", model, "--trees", "1x3x4"], "--drafter"),
        (["--model", model, "--token-ids", tmp_path / "words"], "expected token ids"),
        (["--model", model, "--token-ids", tmp_path / "large"], "expected token ids"),
        (["--model", model, "--token-ids", tmp_path / "none"], "expected token ids"),
        (["--model", model, "--token-ids", tmp_path / "outside"], "of [0, 2048), found 2048"),
        (["--model", model], "max_context 641 is beyond"),
        (["--model", model, "--max-context", 100], "expected at least 641"),
        (
            [*drafting(model), "--prompt-tokens", 20, "--plant-accept-length", 1, 2],
            "each of the 1 conf",
        ),
        ([*drafting(model), "--plant-accept-length", 0], "from 1 on, found 0"),
        ([*drafting(model), "--plant-accept-length", "-1"], "from 1 on, found -1"),
        ([*drafting(model), "--plant-accept-length", "nan"], "from 1 on, found nan"),
        (
            [*drafting(model), "--prompt-tokens", 20]
            + ["--trees", "2x3x8", "--plant-accept-length", 3.5],
            "accept_length must be 1 to 3 for a tree of depth 2, found 3.5",
        ),
        ([*drafting(model), "--vocab-sizes", "many"], "expected a number or full, found 'many'"),
        ([*drafting(model), "--vocab-sizes", "0"], "expected a number or full, found '0'"),
        ([*drafting(model), "--trees", "6x10"], "--trees: expected DEPTHxTOPKxTOKENS"),
        ([*drafting(model), "--trees", "6x10x60x2"], "found '6x10x60x2'"),
        ([*drafting(model), "--trees", "6x10x60@"], "found '6x10x60@'"),
        ([*drafting(model), "--trees", "6@0.1x10x60"], "found '6@0.1x10x60'"),
        ([*drafting(model), "--trees", "1x3x4@1.5"], "must be in [0, 1), found 1.5"),
        ([*drafting(model), "--trees", "1x999x4"], "tree topk must be 1 to 64, found 999"),
        ([*drafting(model), "--compare", "full:"], "--compare: expected DEPTHxTOPKxTOKENS"),
        ([*drafting(model), "--compare", "full", "--trees", "1x3x4"], "--trees"),
        ([*drafting(model), "--json", tmp_path / "no" / "folder"], "cannot be written"),
    ]:
        done = bench("--json", report, *options) if "--json" not in options else bench(*options)
        assert done.returncode == 2 and message in done.stderr, (options, done.stderr)
        assert done.stderr.startswith("frspec-bench: error: ") and done.stderr.count("\n") == 1
        assert report.read_text() == "kept"
    done = bench("--model", model, "--json", tmp_path / "new.json")
    assert done.returncode == 2 and not (tmp_path / "new.json").exists()
