"""The parts of `frspec eval`: prompts, scoring, data files, methods, workers that die, plots."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import pytest

from evaluation_files import SPEC_BENCH, EvaluationFiles, write_evaluation_files, write_json_lines
from frspec import EvaluationError
from frspec.evaluation.datafiles import data_file, read_records
from frspec.evaluation.methods import Configuration, configurations
from frspec.evaluation.process_workers import ProcessWorkers, divide
from frspec.evaluation.prompts import gsm8k_prompt
from frspec.evaluation.results import ResultsFile, read_results
from frspec.evaluation.run import generate
from frspec.evaluation.schedule import Reply, run_jobs
from frspec.evaluation.scoring import gsm8k_answer, gsm8k_reference, human_eval_completion
from frspec.evaluation.statistics import Run
from frspec.evaluation.tasks import TASKS, load_questions, parse_tasks
from frspec.evaluation.worker import Setup

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
METHODS = (Configuration("plain"), Configuration("eagle2"), Configuration("eagle2", 128))
PAPER_TASKS = ["mt", "conv", "rag", "math", "qa", "summ", "code"]


@pytest.fixture(scope="module")
def files(tmp_path_factory, ranking_writer) -> EvaluationFiles:
    return write_evaluation_files(tmp_path_factory.mktemp("evaluation"), ranking_writer)


def make_setup(files: EvaluationFiles, **request: object) -> Setup:
    machine = {"device": "cpu", "dtype": None, "max_context": 512, "memory_limit": None}
    return Setup(
        model=str(files.model),
        drafters={"eagle2": str(files.drafter)},
        ranking=str(files.ranking),
        machine=machine | {"threads": 1},
        tree=None,
        request={"max_new_tokens": 12, "temperature": 0.0, "seed": 0, "stop": []} | request,
    )


# ==== Tasks and data files


def test_tasks_are_in_the_order_of_the_paper() -> None:
    assert [task.name for task in parse_tasks(["all"])] == [*PAPER_TASKS, "gsm8k"]
    assert [task.name for task in parse_tasks(["HumanEval", "MT."])] == ["mt", "code"]


def test_the_grouping_of_spec_bench() -> None:
    if not (SHARED / "spec_bench.jsonl").is_file():
        pytest.skip("the data is absent")
    tasks = parse_tasks(PAPER_TASKS[:-1])
    questions = load_questions(tasks, {"spec_bench": str(SHARED / "spec_bench.jsonl")})
    counts = {name: [q for q in questions if q.task == name] for name in PAPER_TASKS[:-1]}
    assert {name: len(found) for name, found in counts.items()} == dict.fromkeys(counts, 80)
    assert all(len(q.turns) == (2 if q.task == "conv" else 1) for q in questions)
    assert len({q.category for q in counts["conv"]}) == 8
    few = load_questions(tasks, {"spec_bench": str(SHARED / "spec_bench.jsonl")}, limit=8)
    assert len({q.category for q in few if q.task == "conv"}) == 8  # spread over the file


def test_every_gsm8k_answer_is_a_number() -> None:
    if not (SHARED / "gsm8k_test.jsonl").is_file():
        pytest.skip("the data is absent")
    questions = load_questions([TASKS["gsm8k"]], {"gsm8k": str(SHARED / "gsm8k_test.jsonl")})
    assert len(questions) == 1319
    assert all(float(question.reference) == int(question.reference) for question in questions)
    # A solution of the data set, as a text without the trigger, gives its own answer.
    for _, record in read_records(SHARED / "gsm8k_test.jsonl"):
        assert gsm8k_answer(record["answer"]) == gsm8k_reference(record["answer"])


def test_gsm8k_prompt_has_eight_examples_and_ends_open() -> None:
    prompt = gsm8k_prompt("How many?")
    assert prompt.count("Q: ") == prompt.count("A:") == 9
    assert prompt.count("The answer is ") == 8
    assert prompt.endswith("The answer is 8.\n\nQ: How many?\nA:")


def test_gzip_and_blank_lines(tmp_path) -> None:
    path = tmp_path / "questions.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write('{"a": 1}\n\n{"a": 2}\n')
    assert [(w, r["a"]) for w, r in read_records(path)] == [(f"{path}:1", 1), (f"{path}:3", 2)]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(EvaluationError, match="cannot be read"):
        list(read_records(path))


def test_parquet(tmp_path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "gsm8k.parquet"
    rows = [{"question": "How many?", "answer": "Two.\n#### 2"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (question,) = load_questions([TASKS["gsm8k"]], {"gsm8k": str(path)})
    assert (question.question_id, question.reference) == ("1", "2")


def test_a_file_of_the_hub(monkeypatch, tmp_path) -> None:
    import huggingface_hub

    asked = []

    def download(hub_id, name, repo_type):
        asked.append((hub_id, name, repo_type))
        return str(tmp_path / "fetched.jsonl")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = data_file("openai/gsm8k:main/test.parquet")
    assert found == tmp_path / "fetched.jsonl"
    assert asked == [("openai/gsm8k", "main/test.parquet", "dataset")]
    with pytest.raises(EvaluationError, match="reads owner/name:path"):
        data_file("openai/gsm8k")


def test_a_question_twice(tmp_path) -> None:
    source = write_json_lines(tmp_path / "twice.jsonl", [SPEC_BENCH[2], SPEC_BENCH[2]])
    with pytest.raises(EvaluationError, match="question 161 occurs twice"):
        load_questions([TASKS["mt"]], {"spec_bench": str(source)})


def test_configurations() -> None:
    drafters = {"eagle2": "drafter"}
    found = configurations(["eagle2", "plain"], [8192, "full", 32768], drafters)
    assert [c.name for c in found] == ["plain", "eagle2", "eagle2-32768", "eagle2-8192"]
    assert [Configuration.parse(c.name) for c in found] == list(found)
    assert found[2].label == "EAGLE-2 + FR 32k"
    with pytest.raises(EvaluationError, match="--drafter eagle2=DIR"):
        configurations(["eagle2"], ["full"], {})


# ==== Scoring


@pytest.mark.parametrize(
    ("text", "expect"),
    [
        (" 16 - 7 = 9. The answer is 18.\n\nQ: And 7? A: The answer is 8.", "18"),
        ("The answer is $1,234.", "1234"),
        ("the ANSWER is -3.5 or so", "-3.5"),
        ("First 12, then 40.", "40"),
        ("none", None),
        ("The answer is unknown.", None),
    ],
)
def test_gsm8k_answer(text, expect) -> None:
    assert gsm8k_answer(text) == expect


PROMPT = 'def double(x):\n    """ Twice x. """\n'


@pytest.mark.parametrize(
    "text",
    [
        "    return 2 * x\n",
        "return 2 * x",
        "y = 2\n    return y * x",
        "y = 2\nreturn y * x",
        "if x:\n        return 2 * x\n    return 0",
        "if x:\n    return 2 * x\nreturn 0",
        "for _ in range(1):\n    return 2 * x",
        "def double(x):\n    return 2 * x",
        "Here it is:\n```python\ndef double(x):\n    return 2 * x\n```\nIt doubles.",
        "```\n    return 2 * x\n```",
        "```python\nimport math\n\ndef double(x):\n  return 2 * x",
        "def double(x):\n    return 2 * x\n```\n\nThis function doubles. It's short.",
        "return 2 * x\n```\nThis doubles it.",
        "Sure, here's the body:\n```python\nreturn 2 * x\n```\nDone!",
        "Sure, here's the body:\n```\nreturn 2 * x",
        "Usage:\n```\ndouble(2)\n```\nCode:\n```python\ndef double(x):\n    return 2 * x\n```",
    ],
)
def test_human_eval_completion_makes_a_program(text) -> None:
    scope: dict = {}
    exec(PROMPT + human_eval_completion("double", text), scope)
    assert scope["double"](4) == 8


# ==== Workers


class DyingWorkers(ProcessWorkers):
    """Kills a process as soon as it has been sent its first job."""

    def __init__(self, setup: Setup, count: int, victims: set[int]):
        super().__init__(setup, count)
        self.victims = victims

    def send(self, worker, job) -> None:
        super().send(worker, job)
        if worker in self.victims:
            self.victims.remove(worker)
            os.kill(self._processes[worker].pid, signal.SIGKILL)


def questions_of(files: EvaluationFiles):
    return load_questions(parse_tasks(["mt", "conv", "qa"]), {"spec_bench": str(files.spec_bench)})


def test_the_prompts_of_a_dead_worker_are_done_by_another(files, tmp_path, monkeypatch) -> None:
    def start(setup, workers, jobs):
        return DyingWorkers(setup, 2, {0})

    monkeypatch.setattr("frspec.evaluation.run.start_workers", start)
    lines: list[str] = []
    monkeypatch.setattr("frspec.evaluation.run.say", lines.append)
    questions = questions_of(files)
    with ResultsFile(tmp_path / "results.jsonl", {"methods": [m.name for m in METHODS]}) as results:
        assert generate(make_setup(files), METHODS, questions, results) == []
    _, records = read_results(tmp_path)
    found = [(r["task"], r["question_id"], r["method"], r["turn"]) for r in records]
    expected = {
        (q.task, q.question_id, method.name, turn)
        for q in questions
        for method in METHODS
        for turn in range(1, len(q.turns) + 1)
    }
    assert set(found) == expected and len(found) == len(expected)
    assert len({record["worker"] for record in records}) == 1
    assert len(lines) == 1 and "worker 0 died (SIGKILL); mt 161 goes to another" in lines[0]


def test_all_workers_dead(files, tmp_path) -> None:
    workers = DyingWorkers(make_setup(files), 2, {0, 1})
    from frspec.evaluation.worker import Job

    jobs = [Job(question, METHODS) for question in questions_of(files)]
    try:
        with pytest.raises(EvaluationError, match=r"every worker has died \(SIGKILL\); 5 jobs"):
            run_jobs(workers, jobs, lambda job, records: pytest.fail("done"), lambda line: None)
    finally:
        workers.close()


class ScriptedWorkers:
    """Replies as told, without processes."""

    def __init__(self, count: int, reply):
        self.living = list(range(count))
        self.sent: list = []
        self.reply = reply

    def alive(self):
        return self.living

    def send(self, worker, job):
        self.sent.append((worker, job))

    def wait(self):
        worker, job = self.sent.pop(0)
        reply = self.reply(worker, job)
        if reply.death:
            self.living.remove(worker)
        return [reply]

    def close(self):
        pass


def test_a_question_that_ends_every_worker_is_left_out(files) -> None:
    from frspec.evaluation.worker import Job

    jobs = [Job(question, METHODS) for question in questions_of(files)]
    poison = jobs[1]

    def reply(worker, job):
        if job == poison:
            return Reply(worker, death="SIGSEGV")
        return Reply(worker, records=[])

    done: list = []
    left_out = run_jobs(
        ScriptedWorkers(3, reply), jobs, lambda job, records: done.append(job), lambda line: None
    )
    assert left_out == [poison]
    assert sorted(map(jobs.index, done)) == [0, 2, 3, 4]


def test_a_worker_that_dies_between_two_jobs(files) -> None:
    from frspec.evaluation.worker import Job

    jobs = [Job(question, METHODS) for question in questions_of(files)][:1]

    class Workers(ScriptedWorkers):
        def wait(self):
            replies = super().wait()
            self.living.remove(1)  # it had nothing to do
            return [*replies, Reply(1, death="SIGKILL")]

    done: list = []
    lines: list[str] = []
    workers = Workers(2, lambda worker, job: Reply(worker, records=[]))
    assert run_jobs(workers, jobs, lambda job, records: done.append(job), lines.append) == []
    assert done == jobs
    assert lines == ["worker 1 died (SIGKILL) between two jobs"]


def test_an_error_of_a_job_ends_the_run(files) -> None:
    from frspec.evaluation.worker import Job

    jobs = [Job(question, METHODS) for question in questions_of(files)]

    def reply(worker, job):
        return Reply(worker, error=EvaluationError("no such drafter"))

    with pytest.raises(EvaluationError, match="no such drafter"):
        run_jobs(ScriptedWorkers(2, reply), jobs, lambda *_: None, lambda line: None)


def test_nothing_is_counted_twice(tmp_path) -> None:
    record = {"task": "qa", "question_id": "1", "question": "f", "turn": 1, "method": "plain"}
    record["error"] = "too long"
    with ResultsFile(tmp_path / "results.jsonl", {}) as results:
        results.append([record])
        with pytest.raises(EvaluationError, match="qa 1 plain would be counted twice"):
            results.append([record])
    assert len(read_results(tmp_path)[1]) == 1


def test_workers_on_one_gpu_are_refused(files) -> None:
    with pytest.raises(EvaluationError, match="--workers 2: expected --device cuda"):
        divide(make_setup(files).on(device="cuda:1"), 2)


def test_ray_workers(files, tmp_path, monkeypatch) -> None:
    ray = pytest.importorskip("ray")
    from frspec.evaluation.ray_workers import RayWorkers

    class DyingRayWorkers(RayWorkers):
        killed = False

        def send(self, worker, job):
            super().send(worker, job)
            if not self.killed:
                self.killed = True
                ray.kill(self._actors[worker])

    monkeypatch.setattr("frspec.evaluation.ray_workers.RayWorkers", DyingRayWorkers)
    # Actors are other processes: they need this file's folder no more than the installed package.
    lines: list[str] = []
    monkeypatch.setattr("frspec.evaluation.run.say", lines.append)
    questions = questions_of(files)
    with ResultsFile(tmp_path / "results.jsonl", {"methods": [m.name for m in METHODS]}) as results:
        assert generate(make_setup(files), METHODS, questions, results, workers="ray:2") == []
    _, records = read_results(tmp_path)
    keys = [(r["task"], r["question_id"], r["method"], r["turn"]) for r in records]
    assert len(keys) == len(set(keys)) == 21
    assert all(record["same_as_plain"] for record in records)
    assert len(lines) == 1 and "mt 161 goes to another" in lines[0]


# ==== Statistics and plots


def make_record(task: str, question: str, method: str, lengths: list[int], seconds: float) -> dict:
    return {
        "task": task, "question_id": question, "turn": 1, "method": method, "text": "",
        "tokens": 1 + sum(lengths), "accept_lengths": lengths, "prefill_s": 0.0,
        "decode_s": seconds, "draft_s": seconds / 4, "verify_s": seconds / 2,
        "rest_s": seconds / 4, "same_as_plain": True, "device": "cpu",
    }  # fmt: skip


def make_run() -> Run:
    """Two tasks, two methods, numbers that can be computed by hand."""
    records = []
    for task, factor in (("mt", 1), ("qa", 2)):
        records += [
            make_record(task, "1", "plain", [1] * 9, 10.0),
            make_record(task, "2", "plain", [1] * 9, 5.0),
            make_record(task, "1", "eagle2", [3, 3, 3], 5.0 / factor),
            make_record(task, "2", "eagle2", [4, 4, 1], 2.5 / factor),
            make_record(task, "1", "eagle2-8192", [2, 2, 2, 3], 4.0 / factor),
            make_record(task, "2", "eagle2-8192", [4, 4, 1], 2.0 / factor),
        ]
    header = {"methods": ["plain", "eagle2", "eagle2-8192"], "vocab_size": 49152}
    return Run("run", header, records)


def test_statistics_by_hand() -> None:
    run = make_run()
    plain, full, small = run.methods
    assert run.accept_length(full, "mt") == 3
    assert run.accept_length(small, "mt") == pytest.approx(18 / 7)
    assert run.tokens_per_s(plain, "mt") == pytest.approx((1 + 2) / 2)
    assert run.tokens_per_s(plain, "mt", False) == pytest.approx((0.9 + 1.8) / 2)
    assert run.speed_up(full, "mt") == pytest.approx(2)
    assert run.average(run.speed_up, full) == pytest.approx((2 + 4) / 2)
    shares = run.time_shares(small)
    assert shares["verify_s"] == pytest.approx(2 * shares["draft_s"])
    assert str(run.identity(full)) == "all 4"


def test_a_question_that_a_method_lacks_is_not_compared() -> None:
    run = make_run()
    kept = [r for r in run.records if (r["question_id"], r["method"]) != ("2", "eagle2")]
    partial = Run("run", run.header, kept)
    assert partial.tokens_per_s(run.methods[0], "mt") == pytest.approx(1)
    assert partial.speed_up(run.methods[1], "mt") == pytest.approx(2)


def test_plots_are_images(tmp_path) -> None:
    from frspec.evaluation.plots import write_plots

    run = make_run()
    one = write_plots(tmp_path / "one", [run])
    assert set(one) == {"time.png", "speed-up.png", "accept-length.png"}
    several = write_plots(tmp_path / "several", [run, make_run()])
    assert {"time-1.png", "speed-up-2.png", "accept-length.png"} <= set(several)
    for name in one:
        data = (tmp_path / "one" / name).read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert not list((tmp_path / "one").glob(".*"))


def test_matplotlib_missing(monkeypatch, tmp_path) -> None:
    import sys

    from frspec.evaluation.plots import write_plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluationError, match=r"pip install 'frspec\[eval\]'"):
        write_plots(tmp_path, [make_run()])


def test_ray_missing(monkeypatch, files) -> None:
    import sys

    from frspec.evaluation.run import start_workers

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EvaluationError, match=r"pip install 'frspec\[ray\]'"):
        start_workers(make_setup(files), "ray", 3)


def test_header_is_json(tmp_path) -> None:
    with ResultsFile(tmp_path / "results.jsonl", {"methods": ["plain"]}):
        pass
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "header", "version": 1, "methods": ["plain"]}
