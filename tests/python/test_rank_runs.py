"""Long runs of `frspec rank-tokens`: processes, interruptions, and parts that are merged."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from command_line import environment, run_frspec
from frspec.errors import RankingError
from frspec.ranking import Ranking, checkpoint, chunk, command, file_chunks, table_chunks, workers
from frspec.ranking.merge import merge_rankings
from ranking_files import (
    RECORDS,
    TEXTS,
    VOCAB_SIZE,
    check_counts,
    rank,
    write_lines,
    write_parquet,
    write_word_model,
)
from test_rank_inputs import json_lines, stream_files, write_compressed

REPEATS = 40


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_word_model(tmp_path / "model")


@pytest.fixture
def inputs(tmp_path, monkeypatch) -> list[object]:
    """A corpus of every kind, in small chunks; its texts are TEXTS, 7 * REPEATS times."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 500)
    monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", 100)
    monkeypatch.setattr(table_chunks, "BATCH_ROWS", 7)
    records = RECORDS["text"] * REPEATS
    text = "\n".join([*TEXTS * REPEATS, ""]).encode()
    (tmp_path / "c.txt").write_bytes(text)
    cut = json_lines(TEXTS * REPEATS)
    stream_files(monkeypatch, [write_lines(tmp_path / "streamed.jsonl", records)], tmp_path)
    return [
        write_lines(tmp_path / "c.jsonl", [*records[:9], "broken", *records[9:]]),
        tmp_path / "c.txt",
        write_damaged(tmp_path / "c.jsonl.gz", cut),
        write_compressed(tmp_path / "c.txt.zst", text),
        write_parquet(tmp_path / "c.parquet", records),
        write_array(tmp_path / "c.json", records),
        "hf://some/name",
    ]


def write_array(path: Path, records: list[object]) -> Path:
    path.write_text(json.dumps(records, indent=1))
    return path


def write_damaged(path: Path, data: bytes) -> Path:
    write_compressed(path, data)
    path.write_bytes(path.read_bytes() + b"no archive")
    return path


REPORT = "skipped 1 broken record; of 1 damaged archive the readable part was counted; the first at"


def same_rankings(first: Ranking, second: Ranking) -> None:
    np.testing.assert_array_equal(first.token_ids, second.token_ids)
    np.testing.assert_array_equal(first.counts, second.counts)
    names = ("tokenizer_fingerprint", "corpus", "tokens_counted", "special_ids", "vocab_size")
    for name in (*names, "source"):
        assert getattr(first, name) == getattr(second, name)


# ---------------------------------------------------------------------------- processes


def test_processes_count_the_same(folder, inputs, capsys):
    check_counts(rank(folder, "--input", *inputs, "--processes", 3), TEXTS * 7 * REPEATS)
    assert REPORT in capsys.readouterr().err
    for limit in (1, 1000, 2001):
        alone = rank(folder, "--input", *inputs, "--max-tokens", limit)
        together = rank(folder, "--input", *inputs, "--max-tokens", limit, "--processes", 2)
        assert together.tokens_counted == limit
        same_rankings(alone, together)


def test_error_in_a_worker_is_the_first_of_the_corpus(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 200)
    records = RECORDS["text"] * 20
    path = write_lines(tmp_path / "c.jsonl", [*records, "first", *records, "second"])
    with pytest.raises(RankingError, match=f"{path}:61: not JSON"):
        rank(folder, "--input", path, "--processes", 2, "--strict")
    assert not (tmp_path / "ranking.safetensors").exists()


def kill_workers() -> None:
    for process in multiprocessing.active_children():
        process.kill()


def kill_workers_after_thirty_chunks(monkeypatch) -> None:
    """All of them: the death of one that is idle costs nothing, and may pass unnoticed."""
    read_chunks = command.read_chunks

    def killing(*args):
        for number, each in enumerate(read_chunks(*args)):
            if number == 30:
                kill_workers()
            yield each

    monkeypatch.setattr(command, "read_chunks", killing)


def test_what_dead_workers_had_is_counted_by_others(folder, inputs, monkeypatch, capsys):
    kill_workers_after_thirty_chunks(monkeypatch)
    check_counts(rank(folder, "--input", *inputs, "--processes", 2), TEXTS * 7 * REPEATS)
    assert capsys.readouterr().err.count("2 new ones count what it had") == 1


def test_workers_that_die_again_and_again_end_the_run(folder, inputs, tmp_path, monkeypatch):
    replace_workers = workers._Pool._replace_workers

    def killing(pool):
        replace_workers(pool)
        kill_workers()

    options = ["--input", *inputs, "--processes", 2, "--checkpoint", tmp_path / "checkpoint"]
    with monkeypatch.context() as patch:
        kill_workers_after_thirty_chunks(patch)
        patch.setattr(workers._Pool, "_replace_workers", killing)
        with pytest.raises(RankingError, match="3 times at the same place"):
            rank(folder, *options)
    assert not (tmp_path / "ranking.safetensors").exists()
    check_counts(rank(folder, *options), TEXTS * 7 * REPEATS)


def test_workers_that_cannot_be_started_count_as_dead(folder, inputs, monkeypatch, capsys):
    submit, number = workers.ProcessPoolExecutor.submit, itertools.count()
    failures = {10: OSError("no process is to be had"), 40: ValueError("bad value(s)")}

    def failing(executor, *work):
        if (failure := failures.get(next(number))) is not None:
            raise failure
        return submit(executor, *work)

    monkeypatch.setattr(workers.ProcessPoolExecutor, "submit", failing)
    check_counts(rank(folder, "--input", *inputs, "--processes", 2), TEXTS * 7 * REPEATS)
    assert capsys.readouterr().err.count("2 new ones count what it had") == 2


# ---------------------------------------------------------------------------- interruptions


def test_run_goes_on_behind_any_chunk(folder, inputs, tmp_path, monkeypatch, capsys):
    """Ctrl-C every few chunks, until a run comes to its end."""
    read_chunks = command.read_chunks

    def interrupted(*args):
        for number, each in enumerate(read_chunks(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(command, "read_chunks", interrupted)
    path = tmp_path / "checkpoint"
    counted = [0]
    for _ in range(1000):
        try:
            ranking = rank(folder, "--input", *inputs, "--checkpoint", path)
            break
        except KeyboardInterrupt:
            counted.append(int(safetensors.numpy.load_file(path)["counts"].sum()))
            report = capsys.readouterr().err
            assert f"{path}: keeps {counted[-1]:,} tokens; the same command" in report
            if len(counted) > 2:
                assert f"{path}: going on behind {counted[-2]:,} tokens" in report
    assert counted == sorted(set(counted)) and len(counted) > 10
    check_counts(ranking, TEXTS * 7 * REPEATS)
    assert REPORT in capsys.readouterr().err
    assert not path.exists()


# Small chunks, slowly, and a checkpoint behind each of them.
SLOW_RUN = """
import sys, time
from frspec.ranking import checkpoint, chunk, command
checkpoint.INTERVAL_SECONDS = 0
chunk.CHUNK_BYTES = 256
def slowly(*args, read_chunks=command.read_chunks):
    for each in read_chunks(*args):
        time.sleep(0.02)
        yield each
command.read_chunks = slowly
from frspec.cli import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("processes", [1, 2])
def test_run_that_was_ended_goes_on(folder, tmp_path, ending, processes):
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 1000)
    script = tmp_path / "slow.py"
    script.write_text(SLOW_RUN)
    kept, out = tmp_path / "checkpoint", tmp_path / "ranking.safetensors"
    options = [
        "rank-tokens", "--tokenizer", folder, "--input", path, "--out", out,
        "--checkpoint", kept, "--processes", processes,
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not kept.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    if ending == signal.SIGINT:  # Ctrl-C reaches all processes of a terminal
        os.killpg(process.pid, ending)
    else:
        process.send_signal(ending)
    errors = process.communicate(timeout=60)[1]  # workers hold it open: they end as well
    assert process.returncode == (130 if ending == signal.SIGINT else -ending)
    assert "Traceback" not in errors and not out.exists()
    done = run_frspec(*options)
    assert done.returncode == 0 and f"{kept}: going on behind " in done.stderr
    check_counts(Ranking.load(out), TEXTS * 1000)
    assert not kept.exists()


def interrupt(folder: Path, *arguments) -> None:
    """A run that is ended behind its first chunks."""
    read_chunks = command.read_chunks

    def interrupted(*args):
        for number, each in enumerate(read_chunks(*args)):
            if number == 3:
                raise KeyboardInterrupt
            yield each

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(command, "read_chunks", interrupted)
        rank(folder, *arguments)


def test_checkpoint_of_another_run_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 100)
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 20)
    other = write_lines(tmp_path / "other.jsonl", RECORDS["text"] * 20)
    kept = tmp_path / "checkpoint"
    interrupt(folder, "--input", path, "--checkpoint", kept)
    before = kept.read_bytes()
    again = write_word_model(tmp_path / "again")
    data = (again / "tokenizer.json").read_text()
    (again / "tokenizer.json").write_text(data.replace('"slept"', '"slipped"'))

    def refused(*arguments, match, model=folder):
        with pytest.raises(RankingError, match=f"{kept}: .*{match}"):
            rank(model, *arguments, "--checkpoint", kept)
        assert kept.read_bytes() == before

    refused("--input", path, model=again, match="tokenizer fingerprint was")
    refused("--input", other, match=r"input 1 was .*c\.jsonl .* now .*other\.jsonl")
    refused("--input", path, other, match="number of inputs was 1, now 2")
    refused("--input", path, "--field", "text", match="--field was None, now text")
    refused("--input", path, "--max-tokens", 99, match="--max-tokens was None, now 99")
    refused("--input", path, "--strict", match="--strict was False, now True")
    with path.open("a") as file:
        file.write("\n")
    refused("--input", path, match="input 1 was")


def test_what_is_no_checkpoint_is_left_alone(folder, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    kept = tmp_path / "checkpoint"
    kept.write_text("mine")
    with pytest.raises(RankingError, match="not a checkpoint"):
        rank(folder, "--input", path, "--checkpoint", kept)
    assert kept.read_text() == "mine"
    ranking = rank(folder, "--input", path)
    ranking.save(kept)
    with pytest.raises(RankingError, match="format: expected 'frspec-checkpoint'"):
        rank(folder, "--input", path, "--checkpoint", kept)
    same_rankings(Ranking.load(kept), ranking)


def test_full_disk_keeps_the_checkpoint_before(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 100)
    monkeypatch.setattr(checkpoint, "INTERVAL_SECONDS", 0)
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 20)
    kept = tmp_path / "checkpoint"
    interrupt(folder, "--input", path, "--checkpoint", kept)
    before = kept.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", full)
        with pytest.raises(RankingError, match=f"{kept}: cannot be written: No space left"):
            rank(folder, "--input", path, "--checkpoint", kept)
    assert kept.read_bytes() == before
    check_counts(rank(folder, "--input", path, "--checkpoint", kept), TEXTS * 20)


# ---------------------------------------------------------------------------- merging


def test_merged_parts_are_the_ranking_of_the_whole(folder, inputs, tmp_path):
    whole = rank(folder, "--input", *inputs)
    parts = []
    for number, part in enumerate((inputs[:1], inputs[1:3], inputs[3:])):
        parts.append(tmp_path / f"part-{number}.safetensors")
        rank(folder, "--input", *part).save(parts[-1])
    out = tmp_path / "merged.safetensors"
    done = run_frspec("rank-tokens", "--merge", *parts, "--out", out)
    assert done.returncode == 0, done.stderr
    same_rankings(Ranking.load(out), whole)
    same_rankings(rank(folder, "--merge", *parts[:1]), Ranking.load(parts[0]))
    assert rank(folder, "--merge", *parts, "--corpus", "all").corpus == "all"


def test_rankings_that_do_not_belong_together_are_refused(folder, tmp_path):
    ranking = rank(folder, "--input", write_lines(tmp_path / "c.jsonl", RECORDS["text"]))
    good = tmp_path / "good.safetensors"
    ranking.save(good)
    other = tmp_path / "other.safetensors"
    out = tmp_path / "merged.safetensors"

    def refused(match: str, *paths, **changes):
        values = {name: getattr(ranking, name) for name in ("special_ids", "corpus")}
        values["tokenizer_fingerprint"] = ranking.tokenizer_fingerprint
        counts = changes.pop("counts", ranking.counts_by_id())
        Ranking.from_counts(counts, **values | changes).save(other)
        done = run_frspec("rank-tokens", "--merge", *(paths or (good, other)), "--out", out)
        assert done.returncode == 2 and match in done.stderr and done.stderr.count("\n") == 1
        assert not out.exists()

    refused("made for another tokenizer", tokenizer_fingerprint="f" * 64)
    refused(f"vocab_size: expected {VOCAB_SIZE} as in {good}", counts=np.ones(40, np.int64))
    refused("special_ids: expected [0] as in", special_ids=[1])
    refused("would be counted twice", good, tmp_path / "." / "good.safetensors")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(good.read_bytes())
    refused(f"{copy}: would be counted twice, its counts are in {good} too", good, copy)
    more = tmp_path / "more.safetensors"
    rank(folder, "--input", write_lines(tmp_path / "d.jsonl", RECORDS["text"] * 2)).save(more)
    merged = tmp_path / "both.safetensors"
    merge_rankings([good, more]).save(merged)
    refused(f"its counts are in {merged} too", merged, more)
    whole = tmp_path / "whole.safetensors"
    lines = write_lines(tmp_path / "e.jsonl", RECORDS["text"] * 3)
    rank(folder, "--input", lines).save(whole)
    refused(f"its counts are in {merged} too", merged, whole)
    refused("no such ranking file", good, tmp_path / "none")
