"""`frspec compare-rankings`, against sets and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import run_frspec
from evaluation_files import SPEC_BENCH, write_json_lines
from frspec.ranking import Ranking
from frspec.tokenizer import Tokenizer
from ranking_files import VOCAB_SIZE, WORDS, write_word_model
from test_rank_inputs import evaluation_records

FIRST = "the the the the cat cat cat sat sat on"
SECOND = "mat mat mat mat the the the and and then"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_word_model(tmp_path / "model")


@pytest.fixture
def pair(folder, tmp_path) -> tuple[Path, Path]:
    return ranking(folder, tmp_path / "a", FIRST), ranking(folder, tmp_path / "b", SECOND)


def ids(text: str) -> list[int]:
    return [WORDS.index(word if word in WORDS else ",") for word in text.split()]


def ranking(folder: Path, path: Path, text: str) -> Path:
    Ranking.from_counts(
        np.bincount(ids(text), minlength=VOCAB_SIZE),
        tokenizer_fingerprint=Tokenizer.load(folder).fingerprint,
        corpus=f"corpus of {path.name}",
        special_ids=[0],
    ).save(path)
    return path


def subset(text: str, size: int) -> set[int]:
    """<end> and the most frequent words, by count, then id."""
    found = ids(text)
    order = sorted(range(1, VOCAB_SIZE), key=lambda i: (-found.count(i), i))
    return {0, *order[: size - 1]}


def covered(ranked: str, size: int, text: str) -> float:
    chosen = subset(ranked, size)
    return sum(i in chosen for i in ids(text)) / len(ids(text))


def compare(*args: object) -> dict:
    done = run_frspec("compare-rankings", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_coverage(report: dict, texts: dict[tuple[str, str], str], sizes: list[int]) -> None:
    expected = [
        (kind, name, len(ids(text)), size, covered(FIRST, size, text), covered(SECOND, size, text))
        for (kind, name), text in texts.items()
        for size in sizes
    ]
    found = [
        (c["kind"], c["text"], c["tokens"], c["vocab_size"], *c["shares"])
        for c in report["coverage"]
    ]
    assert [row[:4] for row in found] == [row[:4] for row in expected]
    np.testing.assert_allclose([r[4:] for r in found], [r[4:] for r in expected])


CORPORA = {("corpus", "corpus of a"): FIRST, ("corpus", "corpus of b"): SECOND}


def test_overlap_and_coverage_of_both_corpora(pair):
    sizes = [2, 4, 5]
    report = compare(*pair, "--vocab-sizes", 5, 2, 4)
    assert report["overlap"] == [
        {"vocab_size": n, "shared": shared, "share": shared / n}
        for n in sizes
        if (shared := len(subset(FIRST, n) & subset(SECOND, n)))
    ]
    assert [each["shared"] for each in report["overlap"]] == [1, 2, 2]
    check_coverage(report, CORPORA, sizes)
    assert [each["path"] for each in report["rankings"]] == list(map(str, pair))


def test_sizes_go_as_far_as_the_vocabulary(pair):
    assert [each["vocab_size"] for each in compare(*pair)["overlap"]] == [VOCAB_SIZE]


def test_held_out_text(folder, pair, tmp_path):
    held = "the cat and the dog on a mat"
    (tmp_path / "held.txt").write_text(held)
    options = ["--tokenizer", folder, "--input", tmp_path / "held.txt", "--vocab-sizes", 4, 6]
    texts = CORPORA | {("held out", "held.txt"): held}
    check_coverage(compare(*pair, *options), texts, [4, 6])


def test_texts_of_an_evaluation_by_task(folder, pair, tmp_path):
    path = write_json_lines(tmp_path / "results.jsonl", evaluation_records())
    options = ["--tokenizer", folder, "--input", path, "--field", "text", "--vocab-sizes", 5]
    mt = "the cat sat on the mat . é é , unknown words then slept"
    qa = "the cat slept and\nthen the cat sat"
    texts = {("held out", "results.jsonl"): f"{mt} {qa}", ("task", "mt"): mt, ("task", "qa"): qa}
    check_coverage(compare(*pair, *options), CORPORA | texts, [5])


def test_spec_bench_by_the_tasks_of_the_paper(folder, pair, tmp_path):
    questions = [
        record | {"turns": [f"the {'mat ' * number}" for _ in record["turns"]]}
        for number, record in enumerate(SPEC_BENCH)
    ]
    path = write_json_lines(tmp_path / "question.jsonl", questions)
    options = ["--tokenizer", folder, "--spec-bench", path, "--vocab-sizes", 2]
    groups = {"mt": (2, 3), "conv": (0, 1), "rag": (7,), "math": (6,), "qa": (5,), "summ": (4,)}
    texts = {
        ("task", task): " ".join(turn for n in numbers for turn in questions[n]["turns"])
        for task, numbers in groups.items()
    }
    whole = {("held out", "question.jsonl"): " ".join(texts.values())}
    check_coverage(compare(*pair, *options), CORPORA | whole | texts, [2])
    done = run_frspec("compare-rankings", *pair, *options)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.split()[:3] == ["Conv.", "6", "2"] for line in lines)
    share = covered(FIRST, 2, FIRST)
    assert any(line.startswith("corpus of a (corpus)") and f"{share:.2%}" in line for line in lines)


def test_imported_list_has_no_corpus(folder, pair, tmp_path):
    imported = Ranking(
        token_ids=np.array(ids("the mat and"), np.int32),
        counts=np.zeros(3, np.int64),
        tokenizer_fingerprint=Tokenizer.load(folder).fingerprint,
        corpus="published",
        tokens_counted=0,
        special_ids=[],
        vocab_size=VOCAB_SIZE,
        source="imported",
    )
    imported.save(tmp_path / "i")
    report = compare(pair[0], tmp_path / "i")
    assert [each["vocab_size"] for each in report["overlap"]] == [3]
    [own] = report["coverage"]
    assert own["text"] == "corpus of a" and own["shares"] == [0.7, 0.4]


def test_what_cannot_be_compared_is_refused(folder, pair, tmp_path):
    def refused(*args: object, expect: str) -> None:
        done = run_frspec("compare-rankings", *args)
        assert done.returncode == 2 and done.stdout == ""
        assert expect in done.stderr and done.stderr.count("\n") == 1

    (tmp_path / "text").write_text("the cat")
    (tmp_path / "empty").write_text("")
    other = write_word_model(tmp_path / "other")
    data = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(data.replace('"slept"', '"slipped"'))
    foreign = ranking(other, tmp_path / "foreign", FIRST)
    tokenizer = ["--tokenizer", folder]
    refused(pair[0], foreign, expect="made for another tokenizer")
    refused(pair[0], tmp_path / "none", expect="no such ranking file")
    refused(*pair, "--vocab-sizes", 0, expect=f"expected sizes in [1, {VOCAB_SIZE}]")
    refused(*pair, "--input", tmp_path / "text", expect="--tokenizer is needed")
    refused(
        *pair, "--tokenizer", other, "--input", tmp_path / "text", expect="for another tokenizer"
    )
    refused(*pair, *tokenizer, "--input", tmp_path / "empty", expect="no text to count")
    refused(*pair, *tokenizer, "--input", tmp_path / "gone", expect="no such input file")
    refused(*pair, *tokenizer, "--spec-bench", tmp_path / "gone", expect="no such file")
