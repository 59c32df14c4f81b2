"""`frspec eval` as a user runs it: results, going on after a kill, bad input, report."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest

from command_line import FRSPEC, environment, run_frspec
from evaluation_files import (
    SPEC_BENCH,
    EvaluationFiles,
    read_json_lines,
    skip_without_isolation,
    write_evaluation_files,
    write_json_lines,
)

METHODS = ["plain", "eagle2", "eagle2-128"]
# What differs from run to run. The first question of a run finds no system message in the cache.
PASSING = ("prefill_s", "decode_s", "draft_s", "verify_s", "rest_s", "reused_tokens", "worker")


@pytest.fixture(scope="module")
def files(tmp_path_factory, ranking_writer) -> EvaluationFiles:
    return write_evaluation_files(tmp_path_factory.mktemp("evaluation"), ranking_writer)


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """The folder of a whole run over mt and conv, and the process that made it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, run_frspec(*files.arguments(out, "mt", "conv"))


def records(out) -> list[dict]:
    return read_json_lines(out / "results.jsonl")[1:]


def timeless(records: list[dict]) -> list[dict]:
    """Records without what differs from run to run, in an order of their own."""
    kept = [{k: v for k, v in r.items() if k not in PASSING} for r in records]
    return sorted(kept, key=lambda r: (r["task"], r["question_id"], r["method"], r["turn"]))


def error_line(done) -> str:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("frspec: error: ")
    return last


def test_every_question_method_and_turn_once(finished) -> None:
    out, done = finished
    assert done.returncode == 0, done.stderr
    found = [(r["task"], r["question_id"], r["turn"], r["method"]) for r in records(out)]
    expected = [("mt", "161", 1), ("mt", "162", 1)]
    expected += [("conv", q, turn) for q in ("81", "82") for turn in (1, 2)]
    assert sorted(found) == sorted((*key, method) for key in expected for method in METHODS)
    assert len(found) == len(set(found))


def test_records_say_what_was_measured(finished) -> None:
    out, _ = finished
    header = read_json_lines(out / "results.jsonl")[0]
    assert header["methods"] == METHODS
    assert header["device"] == "cpu"
    assert header["request"]["max_new_tokens"] == 12
    for record in records(out):
        assert record["tokens"] == 12 == 1 + sum(record["accept_lengths"])
        assert len(record["text"].split()) == 12
        assert record["same_as_plain"] is True
        assert record["finish_reason"] == "length"
        assert record["prefill_s"] > 0 and record["decode_s"] > 0
        if record["method"] == "plain":
            assert set(record["accept_lengths"]) == {1}
        assert record["decode_s"] == pytest.approx(
            record["draft_s"] + record["verify_s"] + record["rest_s"]
        )
    for method in METHODS[1:]:
        lengths = [n for r in records(out) if r["method"] == method for n in r["accept_lengths"]]
        assert max(lengths) > 1


def test_second_turn_sees_the_first_answer(finished, files) -> None:
    from frspec import Generator
    from frspec.evaluation.prompts import SPEC_BENCH_SYSTEM

    out, _ = finished
    first, second = (
        next(r for r in records(out) if (r["question_id"], r["turn"], r["method"]) == key)
        for key in (("81", 1, "eagle2"), ("81", 2, "eagle2"))
    )
    messages = [
        {"role": "system", "content": SPEC_BENCH_SYSTEM},
        {"role": "user", "content": "w7 w8"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "w9"},
    ]
    expected = Generator(files.model).generate(messages, max_new_tokens=12)
    assert second["text"] == expected.text
    assert second["prompt_tokens"] == expected.prompt_tokens > first["prompt_tokens"]


def test_report_has_the_tables(finished) -> None:
    out, done = finished
    report = (out / "report.md").read_text()
    assert report == done.stdout
    rows = [line for line in report.splitlines() if line.startswith("| EAGLE-2 + FR 128 ")]
    # accept length, tokens/s, speed-up, decoding alone
    assert len(rows) == 4
    assert "%)" in rows[0] and "x |" in rows[2] and "all 6" in rows[3]
    assert "|  | MT. | Conv. | Average |" in report
    accept = [
        n for r in records(out) if r["method"] == "eagle2" and r["task"] == "mt"
        for n in r["accept_lengths"]
    ]  # fmt: skip
    assert (
        "tree of depth 4, top 4, 6 tokens at most, of paths of probability 0.08" in report
        and "12 new tokens at most" in report
    )
    row = next(line for line in report.splitlines() if line.startswith("| EAGLE-2 |"))
    assert row.split("|")[2].strip() == f"{sum(accept) / len(accept):.2f}"


def test_medusa_beside_eagle(files, tmp_path) -> None:
    command = files.arguments(tmp_path, "mt")
    done = run_frspec(*command, "--drafter", files.heads, "--medusa-choices", "vicuna_7b_stage1")
    assert done.returncode == 0, done.stderr
    assert "- Medusa drafter:" in done.stdout and "of vicuna_7b_stage1" in done.stdout
    methods = ["plain", "eagle2", "eagle2-128", "medusa", "medusa-128"]
    assert [record["method"] for record in records(tmp_path)][:5] == methods
    assert all(record["same_as_plain"] for record in records(tmp_path))
    assert "| Medusa + FR 128 |" in done.stdout
    done = run_frspec(*command, "--drafter", files.heads)
    assert "medusa_choices" in error_line(done)


def test_a_run_that_was_refused_does_not_bind_the_folder(files, tmp_path) -> None:
    command = files.arguments(tmp_path, "mt")
    assert "temperature" in error_line(run_frspec(*command, "--temperature", -1))
    done = run_frspec(*command, "--temperature", 1)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", ["in the header", "in a record", "between records", "at a line"])
def test_a_killed_run_goes_on(finished, files, tmp_path, where) -> None:
    out, _ = finished
    lines = (out / "results.jsonl").read_bytes().splitlines(keepends=True)
    # mt 161 and 162 are three records each, one a method; conv 81 is six.
    cut = {
        "in the header": lines[0][:50],
        "in a record": b"".join(lines[:5]) + lines[5][:30],
        "between records": b"".join(lines[:9]),
        "at a line": b"".join(lines[:7]),
    }[where]
    own = tmp_path / "out"
    own.mkdir()
    (own / "results.jsonl").write_bytes(cut)
    done = run_frspec(*files.arguments(own, "mt", "conv"))
    assert done.returncode == 0, done.stderr
    assert timeless(records(own)) == timeless(records(out))
    whole = {"in the header": 0, "in a record": 4, "between records": 7, "at a line": 7}[where]
    assert (own / "results.jsonl").read_bytes().startswith(b"".join(lines[:whole]))
    if where == "in a record":
        assert "2 records of an unfinished question dropped" in done.stderr


def test_a_run_killed_by_a_signal_goes_on(files, tmp_path) -> None:
    questions = [
        {"question_id": n, "category": "qa", "turns": [f"w{n} w{n + 1}"]} for n in range(40)
    ]
    source = write_json_lines(tmp_path / "questions.jsonl", questions)
    out = tmp_path / "out"
    command = [*files.arguments(out, "qa"), "--max-new-tokens", 200]
    command[command.index("--spec-bench") + 1] = source
    process = subprocess.Popen([*FRSPEC, *map(str, command)], env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "results.jsonl").exists() or len(read_lines(out)) < 8:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = read_lines(out)
    assert len(before) < 1 + 40 * 3
    done = run_frspec(*command)
    assert done.returncode == 0, done.stderr
    found = [(r["question_id"], r["method"]) for r in records(out)]
    assert len(found) == len(set(found)) == 40 * 3
    assert "jobs were done before" in done.stderr


def read_lines(out) -> list[bytes]:
    return (out / "results.jsonl").read_bytes().splitlines()


def test_a_finished_run_does_nothing_more(finished, files) -> None:
    out, _ = finished
    before = (out / "results.jsonl").read_bytes()
    done = run_frspec(*files.arguments(out, "mt", "conv"))
    assert done.returncode == 0
    assert (out / "results.jsonl").read_bytes() == before


def test_rounding_of_another_instruction_set_is_another_configuration(finished, files) -> None:
    out, _ = finished
    header = read_json_lines(out / "results.jsonl")[0]
    if header["device"] != "cpu" or "portable" in header["device_name"]:
        pytest.skip("this machine's default is another device, or no other instruction set")
    done = run_frspec(*files.arguments(out, "mt", "conv"), env={"FRSPEC_CPU_ISA": "portable"})
    assert "device_name was" in error_line(done) and "portable" in error_line(done)


def test_two_drafters_of_one_method_are_refused(files, tmp_path) -> None:
    copy = shutil.copytree(files.drafter, tmp_path / "copy")
    done = run_frspec(*files.arguments(tmp_path / "out", "mt"), "--drafter", copy)
    assert "--drafter: expected one for each method" in error_line(done)


def test_sub_vocabularies_without_a_drafter_are_refused(files, tmp_path) -> None:
    args = ["eval", "--model", files.model, "--spec-bench", files.spec_bench, "--out", tmp_path]
    for more in (["--ranking", files.ranking], ["--vocab-sizes", 64]):
        done = run_frspec(*args, *more)
        assert "they need a --drafter" in error_line(done)


def test_record_without_its_figures(finished, tmp_path) -> None:
    out, _ = finished
    header, first, *_ = read_json_lines(out / "results.jsonl")
    del first["decode_s"]
    write_json_lines(tmp_path / "results.jsonl", [header, first | {"parts": first["part"]}])
    done = run_frspec("eval", "--report-only", tmp_path, "--no-plots")
    assert "results.jsonl:2: expected a field decode_s" in error_line(done)


def test_a_run_can_be_extended(files, tmp_path) -> None:
    out = tmp_path / "out"
    assert run_frspec(*files.arguments(out, "mt"), "--limit", 1).returncode == 0
    assert {r["question_id"] for r in records(out)} == {"161"}
    assert run_frspec(*files.arguments(out, "mt", "rag")).returncode == 0
    assert {r["question_id"] for r in records(out)} == {"161", "162", "481"}


@pytest.mark.parametrize(
    ("change", "expect"),
    [
        (["--temperature", 1], "request.temperature was 0.0, now 1.0"),
        (["--seed", 3], "request.seed was 0, now 3"),
        (["--max-new-tokens", 13], "request.max_new_tokens was 12, now 13"),
        (["--vocab-sizes", 64], "methods was ['plain', 'eagle2', 'eagle2-128']"),
        (["--tree-depth", 2], "trees.eagle2.depth was 4, now 2"),
        (["--tree-min-probability", 0.2], "trees.eagle2.min_probability was 0.08, now 0.2"),
        (["--threads", 1], "threads was None, now 1"),
        (["--workers", 2], "workers was '1', now '2'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_results_of_another_configuration(finished, files, change, expect) -> None:
    out, _ = finished
    before = (out / "results.jsonl").read_bytes()
    line = error_line(run_frspec(*files.arguments(out, "mt", "conv"), *change))
    assert expect in line and "use another --out" in line
    assert (out / "results.jsonl").read_bytes() == before


def test_results_of_another_model(finished, files, tmp_path) -> None:
    import shutil

    out, _ = finished
    other = shutil.copytree(files.model, tmp_path / "model")
    same = run_frspec(*files.arguments(out, "mt", "conv"), "--model", other)
    assert same.returncode == 0, same.stderr  # another path, the same model
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-4}
    (other / "config.json").write_text(json.dumps(config))
    line = error_line(run_frspec(*files.arguments(out, "mt", "conv"), "--model", other))
    assert "model_fingerprint was" in line


def test_questions_of_another_file(finished, files, tmp_path) -> None:
    out, _ = finished
    changed = [dict(q, turns=["w1"]) if q["question_id"] == 161 else q for q in SPEC_BENCH]
    source = write_json_lines(tmp_path / "other.jsonl", changed)
    line = error_line(run_frspec(*files.arguments(out, "mt"), "--spec-bench", source))
    assert "mt 161 was asked in other words" in line


def test_a_damaged_results_file(finished, files, tmp_path) -> None:
    out, _ = finished
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    lines[2] = lines[2][:40] + "\n"
    (tmp_path / "results.jsonl").write_text("".join(lines))
    line = error_line(run_frspec(*files.arguments(tmp_path, "mt", "conv")))
    assert "results.jsonl:3: expected a JSON object" in line
    assert (tmp_path / "results.jsonl").read_text() == "".join(lines)


def test_two_runs_on_one_file(files, tmp_path) -> None:
    from frspec.evaluation.results import ResultsFile

    with ResultsFile(tmp_path / "results.jsonl", {"device": "cpu"}):
        line = error_line(run_frspec(*files.arguments(tmp_path, "mt")))
    assert "another run is writing to it" in line


def test_a_full_disk_loses_nothing(files, tmp_path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "frspec.cli", *map(str, files.arguments(out, "mt", "conv"))]

    def limit() -> None:  # the write fails as on a full disk, halfway through
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))

    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), preexec_fn=limit, timeout=120
    )
    line = error_line(done)
    assert "results.jsonl: cannot be written: File too large" in line
    assert "records are safe" in line
    safe = records(out)
    assert 0 < len(safe) < 18
    done = run_frspec(*files.arguments(out, "mt", "conv"))
    assert done.returncode == 0, done.stderr
    assert records(out)[: len(safe)] == safe
    assert len(records(out)) == 18


@pytest.mark.parametrize(
    ("record", "expect"),
    [
        ({"category": "qa", "turns": ["w1"]}, "expected a field question_id, found category"),
        ({"question_id": 1, "turns": ["w1"]}, "expected a field category"),
        ({"question_id": 1, "category": "qa"}, "expected a field turns"),
        ({"question_id": 1, "category": "qa", "turns": "w1"}, "turns: expected a list of texts"),
        ({"question_id": 1, "category": "qa", "turns": []}, "turns: expected a list of texts"),
        ({"question_id": 1, "category": "poems", "turns": ["w1"]}, "found 'poems'"),
        (["w1"], "expected a JSON object, found list"),
    ],
)
def test_a_spec_bench_file_with_missing_fields(files, tmp_path, record, expect) -> None:
    source = write_json_lines(tmp_path / "bad.jsonl", [SPEC_BENCH[5], record])
    line = error_line(run_frspec(*files.arguments(tmp_path, "qa"), "--spec-bench", source))
    assert f"{source}:2: " in line and expect in line
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "expect"),
    [
        (["--tasks", "poems"], "unknown task 'poems': expected mt, conv"),
        (["--methods", "lookahead"], "unknown method 'lookahead': expected plain, eagle2, medusa"),
        (["--drafter", "lookahead=somewhere"], "unknown method 'lookahead'"),
        (["--temperature", -1], "temperature"),
        (["--max-new-tokens", 0], "--max-new-tokens: expected at least 1, found 0"),
        (["--limit", 0], "--limit: expected at least 1, found 0"),
        (["--workers", "many"], "--workers: expected a number, ray or ray:N, found 'many'"),
        (["--spec-bench", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--vocab-sizes", 100000], "100000"),
        (["--gsm8k", "{spec_bench}", "--tasks", "gsm8k"], "expected a field answer"),
        (["--spec-bench", "{gsm8k}"], "expected a field category"),
        (["--human-eval", "{gsm8k}", "--tasks", "code"], "expected a field test"),
    ],
)
def test_bad_arguments(files, tmp_path, arguments, expect) -> None:
    names = {"{spec_bench}": files.spec_bench, "{gsm8k}": files.gsm8k}
    arguments = [names.get(argument, argument) for argument in arguments]
    assert expect in error_line(run_frspec(*files.arguments(tmp_path, "mt"), *arguments))


def test_a_model_without_a_chat_template(files, tmp_path) -> None:
    import shutil

    model = shutil.copytree(files.model, tmp_path / "model")
    (model / "tokenizer_config.json").unlink()
    command = files.arguments(tmp_path / "out", "mt")
    assert "no chat template" in error_line(run_frspec(*command, "--model", model))
    command = files.arguments(tmp_path / "out", "gsm8k")  # takes none
    assert run_frspec(*command, "--model", model).returncode == 0


def test_without_plain_decoding(files, tmp_path) -> None:
    done = run_frspec(*files.arguments(tmp_path, "mt"), "--methods", "eagle2")
    assert done.returncode == 0, done.stderr
    assert {r["method"] for r in records(tmp_path)} == {"eagle2", "eagle2-128"}
    assert {r["same_as_plain"] for r in records(tmp_path)} == {None}
    assert "Plain decoding was not run" in done.stdout
    assert "| not compared |" in done.stdout
    assert "## Speed-up" not in done.stdout


def test_workers_in_processes(finished, files, tmp_path) -> None:
    out, _ = finished
    done = run_frspec(*files.arguments(tmp_path, "mt", "conv"), "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert timeless(records(tmp_path)) == timeless(records(out))
    # All methods of a question in one process, so that their times can be compared.
    by_question: dict[str, set[str]] = {}
    for record in records(tmp_path):
        by_question.setdefault(record["question_id"], set()).add(record["worker"])
    assert all(len(workers) == 1 for workers in by_question.values())


def test_model_and_out_are_needed(files) -> None:
    assert "--model is needed" in error_line(run_frspec("eval", "--out", "x"))
    assert "--out is needed" in error_line(run_frspec("eval", "--model", files.model))


def test_a_prompt_that_is_too_long_is_reported(files, tmp_path) -> None:
    questions = [SPEC_BENCH[5], dict(SPEC_BENCH[5], question_id=7, turns=["w1 " * 300])]
    source = write_json_lines(tmp_path / "long.jsonl", questions)
    command = [*files.arguments(tmp_path, "qa"), "--spec-bench", source, "--max-context", 200]
    done = run_frspec(*command)
    assert done.returncode == 0, done.stderr
    assert "Questions left out" in done.stdout
    assert "- qa 7: " in done.stdout
    errors = [record for record in records(tmp_path) if "error" in record]
    assert [record["question_id"] for record in errors] == ["7"] * 3


def test_sampling_writes_the_same_texts(files, tmp_path) -> None:
    options = ["--temperature", 1, "--seed", 5, "--limit", 1]
    done = run_frspec(*files.arguments(tmp_path, "conv", "rag"), *options)
    assert done.returncode == 0, done.stderr
    assert all(record["same_as_plain"] for record in records(tmp_path))
    assert "temperature 1, seed 5" in done.stdout


def test_a_text_that_differs_is_told(finished, tmp_path) -> None:
    out, _ = finished
    lines = read_json_lines(out / "results.jsonl")
    lines[2]["same_as_plain"] = False
    assert lines[2]["method"] == "eagle2"
    write_json_lines(tmp_path / "results.jsonl", lines)
    done = run_frspec("eval", "--report-only", tmp_path, "--no-plots")
    assert done.returncode == 1
    assert "EAGLE-2: 5 of 6 texts are those of plain decoding" in done.stderr
    assert "| 5 of 6 |" in done.stdout


def test_gsm8k_and_human_eval_are_scored(files, tmp_path) -> None:
    done = run_frspec(*files.arguments(tmp_path, "humaneval", "gsm8k"))
    assert done.returncode == 0, done.stderr
    assert "takes `--run-generated-code`" in done.stdout
    lines = read_json_lines(tmp_path / "results.jsonl")
    for record in lines[1:]:
        if record["task"] == "gsm8k":
            assert record["prompt_tokens"] > 400  # eight examples and no chat template
            good = record["question_id"] == "1"
            record["text"] = "So the answer is 1234. Q: 7" if good else "The answer is 5."
        else:
            plus_one = record["question_id"] == "Test/1"
            record["text"] = "return x + 1" if plus_one else "return x * 7"
    write_json_lines(tmp_path / "results.jsonl", lines)
    command = ["eval", "--report-only", tmp_path, "--no-plots", "--human-eval", files.human_eval]
    skip_without_isolation()
    done = run_frspec(*command, "--run-generated-code")
    assert done.returncode == 0, done.stderr
    assert "| plain | 50.0% | 50.0% |" in done.stdout
    assert "| EAGLE-2 + FR 128 | 50.0% | 50.0% |" in done.stdout
    # What three methods wrote alike ran once.
    assert len(read_json_lines(tmp_path / "humaneval.jsonl")) == 2
    again = run_frspec(*command)  # what was run is remembered
    assert "| plain | 50.0% | 50.0% |" in again.stdout


def test_several_runs_are_compared(finished, files, tmp_path) -> None:
    out, _ = finished
    other = tmp_path / "other"
    options = ["--tree-depth", 3, "--tree-topk", 4, "--tree-tokens", 12]
    assert run_frspec(*files.arguments(other, "mt"), *options).returncode == 0
    done = run_frspec("eval", "--report-only", out, other, "--out", tmp_path, "--no-plots")
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text()
    assert report.count("| EAGLE-2 |") >= 8
    for folder in (out, other):
        assert f"| {folder} | EAGLE-2 + FR 128 |" in report
        assert f"## {folder}" in report
    (other / "report.md").unlink()
    assert (
        run_frspec("eval", "--report-only", other / "results.jsonl", "--no-plots").returncode == 0
    )
    assert (other / "report.md").is_file()
    missing = run_frspec("eval", "--report-only", tmp_path / "nothing")
    assert "no such results file" in error_line(missing)


def test_memory_for_one_generator_at_a_time(finished, files, tmp_path) -> None:
    info = run_frspec("info", "--model", files.model, "--drafter", files.drafter, "--json")
    needed = json.loads(info.stdout)["memory"]["total_bytes"]
    command = [*files.arguments(tmp_path, "mt", "conv"), "--memory-limit", needed + 100_000]
    done = run_frspec(*command)
    assert done.returncode == 0, done.stderr
    assert "one after the other through all questions" in done.stderr
    out, _ = finished

    def essence(records: list[dict]) -> list[dict]:
        return timeless([r | {"part": 0, "parts": 0} for r in records])

    assert essence(records(tmp_path)) == essence(records(out))
    order = [record["method"] for record in records(tmp_path)]
    assert order == sorted(order, key=METHODS.index)


def test_ctrl_c_keeps_what_is_done(files, tmp_path) -> None:
    questions = [{"question_id": n, "category": "qa", "turns": [f"w{n}"]} for n in range(60)]
    source = write_json_lines(tmp_path / "questions.jsonl", questions)
    out = tmp_path / "out"
    command = [*files.arguments(out, "qa"), "--spec-bench", source, "--max-new-tokens", 300]
    process = subprocess.Popen([*FRSPEC, *map(str, command)], env=environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    deadline = time.monotonic() + 60
    while not (out / "results.jsonl").exists() or len(read_lines(out)) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert len(records(out)) % 3 == 0
