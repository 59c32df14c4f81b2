"""What `frspec rank-tokens` reads: compressed files, data sets of the hub, evaluations' results."""

from __future__ import annotations

import builtins
import gzip
import json
from pathlib import Path

import datasets
import pytest

from command_line import run_frspec
from evaluation_files import read_json_lines, write_evaluation_files, write_json_lines
from frspec.errors import HubError, RankingError
from frspec.evaluation.worker import mark_identity
from frspec.ranking import Ranking, chunk, compressed, file_chunks, table_chunks
from frspec.ranking.corpus import read_chunks
from frspec.ranking.table_chunks import HubDataset
from ranking_files import (
    COMPRESS,
    RECORDS,
    TEXTS,
    check_counts,
    rank,
    write_lines,
    write_word_model,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_word_model(tmp_path / "model")


def write_compressed(path: Path, data: bytes) -> Path:
    path.write_bytes(COMPRESS[path.suffix](data))
    return path


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


# ---------------------------------------------------------------------------- compressed


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["c.jsonl", "c.ndjson", "c.txt", "c"])
@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
def test_compressed_files_are_what_they_hold(
    folder, tmp_path, monkeypatch, compression, name, chunk_bytes
):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", 32)
    lines = name.endswith("json") or name.endswith("jsonl")
    data = json_lines(TEXTS * 30) if lines else "\n".join(TEXTS * 30).encode()
    path = write_compressed(tmp_path / f"{name}{compression}", data)
    check_counts(rank(folder, "--input", path), TEXTS * 30)
    chunks = list(read_chunks([path], None))
    assert sum(c.bytes_read for c in chunks) == path.stat().st_size
    assert (len(chunks) > 2) == (chunk_bytes == 64)


@pytest.mark.parametrize("compression", COMPRESS)
def test_streams_one_after_the_other(folder, tmp_path, monkeypatch, compression):
    """Members of gzip, frames of Zstandard, and the zeros that some tools put behind them."""
    compress = COMPRESS[compression]
    path = tmp_path / f"c.jsonl{compression}"
    path.write_bytes(b"".join(compress(json_lines([text])) for text in TEXTS * 9) + bytes(700))
    for size in (1, 5, 1 << 12):
        monkeypatch.setattr(compressed, "_INPUT_BYTES", size)
        check_counts(rank(folder, "--input", path), TEXTS * 9)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["c.jsonl", "c.txt"])
def test_readable_part_of_a_damaged_archive_is_counted(
    folder, tmp_path, capsys, monkeypatch, compression, name
):
    monkeypatch.setattr(compressed, "_INPUT_BYTES", 64)
    texts = TEXTS * 3
    data = json_lines(texts) if name == "c.jsonl" else "\n".join(texts).encode() + b"\n"
    half = data[: data.rfind(b"\n", 0, len(data) // 2) + 1]
    compress = COMPRESS[compression]
    whole = write_lines(tmp_path / "whole.jsonl", RECORDS["text"])
    path = tmp_path / f"{name}{compression}"
    cut_short = compress(half) + compress(data[len(half) :])[:-5]
    for content, reason in (
        (cut_short, "the archive is cut short"),
        (compress(half) + b"\x01" * 100, "the archive is damaged: "),
    ):
        path.write_bytes(content)
        ranking = rank(folder, "--input", path, whole)
        report = capsys.readouterr().err
        told = f"of 1 damaged archive the readable part was counted; the first at {path}: {reason}"
        assert told in report
        seen = ranking.tokens_counted - len(" ".join(TEXTS).split())
        assert len(half.decode().replace("\n", " ").split()) * 0.5 < seen
        with pytest.raises(RankingError, match=f"{path}: {reason}"):
            rank(folder, "--input", path, whole, "--strict")
    readable = half.decode().splitlines()
    readable = [json.loads(t)["text"] for t in readable] if name == "c.jsonl" else readable
    check_counts(ranking, [*readable, *TEXTS])


@pytest.mark.parametrize("compression", COMPRESS)
def test_half_a_line_of_an_archive_is_no_broken_record(folder, tmp_path, capsys, compression):
    half = json_lines(TEXTS)[:-10]
    path = tmp_path / f"c.jsonl{compression}"
    path.write_bytes(COMPRESS[compression](half) + COMPRESS[compression](b"x" * 99)[:-3])
    check_counts(rank(folder, "--input", path), TEXTS[:2])
    assert "broken record" not in capsys.readouterr().err


def test_what_is_no_archive(folder, tmp_path, capsys):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(json_lines(TEXTS))
    with pytest.raises(RankingError, match="no text to count"):
        rank(folder, "--input", path)
    assert "the archive is damaged: " in capsys.readouterr().err
    path.write_bytes(b"")
    with pytest.raises(RankingError, match="no text to count"):
        rank(folder, "--input", path)
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(RankingError, match="expected .parquet, which has its own compression"):
        rank(folder, "--input", tmp_path / "c.parquet.gz")


def test_what_is_no_text(folder, tmp_path):
    path = tmp_path / "c.jsonl.bz2"
    path.write_bytes(b"BZh9" + bytes(9))
    with pytest.raises(RankingError, match="expected plain text in UTF-8, found binary data"):
        rank(folder, "--input", path)
    path = tmp_path / "C.TXT"
    path.write_text("some words", encoding="utf-16")
    with pytest.raises(RankingError, match="C.TXT: expected plain text"):
        rank(folder, "--input", path)
    path = tmp_path / "c.txt.gz"
    path.write_bytes(gzip.compress("some words".encode("utf-16")))
    with pytest.raises(RankingError, match="c.txt.gz: expected plain text"):
        rank(folder, "--input", path)


def test_suffixes_in_capitals(folder, tmp_path):
    path = tmp_path / "C.JSONL"
    path.write_bytes(json_lines(TEXTS))
    check_counts(rank(folder, "--input", path), TEXTS)
    path = tmp_path / "D.JSONL.GZ"
    path.write_bytes(gzip.compress(json_lines(TEXTS)))
    check_counts(rank(folder, "--input", path), TEXTS)


def forbid_import(monkeypatch, package: str) -> None:
    real_import = builtins.__import__

    def refuse(name, *args, **options):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize(
    ("package", "source", "extra"),
    [("zstandard", "c.txt.zst", "zstd"), ("datasets", "hf://owner/name", "datasets")],
)
def test_missing_packages_are_named(folder, tmp_path, monkeypatch, package, source, extra):
    write_compressed(tmp_path / "c.txt.zst", b"the cat")
    monkeypatch.chdir(tmp_path)
    forbid_import(monkeypatch, package)
    with pytest.raises(RankingError, match=rf"needs {package}.*pip install 'frspec\[{extra}\]'"):
        rank(folder, "--input", source)


# ---------------------------------------------------------------------------- data sets of the hub


def stream_files(monkeypatch, paths: list[Path], tmp_path: Path) -> None:
    """hf://some/name streams these JSON lines files, as the library does, without the hub."""

    def open_stream(source):
        return datasets.load_dataset(
            "json",
            data_files=list(map(str, paths)),
            split=source.split,
            streaming=True,
            cache_dir=str(tmp_path / "cache"),
        )

    monkeypatch.setattr(table_chunks, "open_stream", open_stream)


@pytest.mark.parametrize("kind", ["text", "sharegpt", "a.b", "turns"])
def test_data_set_is_streamed(folder, tmp_path, monkeypatch, kind):
    records = RECORDS[kind] * 4
    paths = [write_lines(tmp_path / f"{i}.jsonl", records[i::2]) for i in range(2)]
    stream_files(monkeypatch, paths, tmp_path)
    monkeypatch.setattr(table_chunks, "BATCH_ROWS", 2)
    field = ["--field", kind] if kind in ("a.b", "turns") else []
    for size in (1, 1 << 20):
        monkeypatch.setattr(chunk, "CHUNK_BYTES", size)
        ranking = rank(folder, "--input", "hf://some/name", *field)
        check_counts(ranking, TEXTS * 4)
        assert ranking.corpus == "hf://some/name"
    with pytest.raises(RankingError, match="hf://some/name: expected a column body, found"):
        rank(folder, "--input", "hf://some/name", "--field", "body")


@pytest.mark.parametrize("rows", [0, 3, 8, 11])
def test_stream_goes_on_behind_any_chunk(tmp_path, monkeypatch, rows):
    records = [{"text": f"{i} {TEXTS[i % 3]}"} for i in range(11)]
    paths = [
        write_lines(tmp_path / f"{i}.jsonl", part)
        for i, part in enumerate((records[:5], records[5:6], records[6:]))
    ]
    stream_files(monkeypatch, paths, tmp_path)
    monkeypatch.setattr(table_chunks, "BATCH_ROWS", 3)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1)
    source = HubDataset.parse("hf://some/name")
    chunks = list(read_chunks([source], None))
    assert [row for c in chunks for row in c.content.to_pylist()] == records
    assert [c.first for c in chunks] == [1, 4, 7, 10]
    for number, before in enumerate(chunks):
        rest = list(read_chunks([source], None, before.after))
        assert [c.content.to_pylist() for c in rest] == [
            c.content.to_pylist() for c in chunks[number + 1 :]
        ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://owner/name", ("owner/name", None, None, "train")),
        ("hf://owner/name/test", ("owner/name", None, None, "test")),
        ("hf://owner/na-me:conf.1", ("owner/na-me", None, "conf.1", "train")),
        ("hf://o/n@abc12:20231101.de/train[:1%]", ("o/n", "abc12", "20231101.de", "train[:1%]")),
    ],
)
def test_spelling_of_a_data_set(text, parts):
    dataset = HubDataset.parse(text)
    assert (dataset.name, dataset.revision, dataset.config, dataset.split) == parts
    assert str(dataset) == text


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://o/n/s/t", "hf://o/n:", "hf://o /n"])
def test_what_is_no_data_set(text):
    with pytest.raises(RankingError, match="expected hf://owner/name"):
        HubDataset.parse(text)


def test_without_a_network_the_hub_is_named(folder, tmp_path):
    out = tmp_path / "r.safetensors"
    done = run_frspec(
        "rank-tokens", "--tokenizer", folder, "--input", "hf://owner/name:config", "--out", out,
        env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")},
    )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("frspec: error: hf://owner/name:config: cannot be opened on the hub: ")
    assert not out.exists()


def test_stream_that_breaks_off_is_an_error_of_the_hub(folder, tmp_path, monkeypatch):
    paths = [write_lines(tmp_path / "0.jsonl", RECORDS["text"]), tmp_path / "1.jsonl"]
    paths[1].write_text("{\n")
    stream_files(monkeypatch, paths, tmp_path)
    monkeypatch.setattr(table_chunks, "BATCH_ROWS", 1)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1)
    with pytest.raises(HubError, match="hf://some/name: cannot be read behind record"):
        rank(folder, "--input", "hf://some/name")


# ---------------------------------------------------------------------------- evaluations


def evaluation_records() -> list[dict]:
    """As `frspec eval` writes them: plain decoding, the same text by a drafter, one that differs,
    a question that was refused."""

    def record(number: int, method: str, **rest) -> dict:
        return {
            "task": ("mt", "qa")[number % 2], "question_id": str(number), "question": "f",
            "category": "", "turn": 1, "method": method, **rest,
        }  # fmt: skip

    records = []
    for number, text in enumerate(TEXTS):
        same = {"text": text, "token_ids_sha256": str(number)}
        records += mark_identity([record(number, m, **same) for m in ("plain", "eagle2")], {})
    other = {"text": "then slept", "token_ids_sha256": "other"}
    records += mark_identity([record(2, "eagle2-128", **other)], {1: "2"})
    records += mark_identity([record(7, "plain", error="prompt: too long")], {})
    return [{"kind": "header", "version": 1, "model": {}}, *records]


def test_results_of_an_evaluation_count_each_text_once(folder, tmp_path, capsys):
    path = write_json_lines(tmp_path / "results.jsonl", evaluation_records())
    ranking = rank(folder, "--input", path, "--field", "text", "--strict")
    check_counts(ranking, [*TEXTS, "then slept"])
    check_counts(rank(folder, "--input", path), [*TEXTS, "then slept"])


def test_own_texts_of_a_model_are_ranked(tmp_path, ranking_writer):
    """`frspec eval`, then `frspec rank-tokens` over what it wrote."""
    files = write_evaluation_files(tmp_path, ranking_writer)
    results = tmp_path / "results"
    assert run_frspec(*files.arguments(results, "mt", "qa")).returncode == 0
    path, out = results / "results.jsonl", tmp_path / "own.safetensors"
    done = run_frspec(
        "rank-tokens", "--tokenizer", files.model, "--input", path, "--field", "text",
        "--strict", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = read_json_lines(path)[1:]
    texts = [r["text"] for r in records if r["method"] == "plain"]
    assert len(records) == 3 * len(texts) == 9
    assert Ranking.load(out).tokens_counted == sum(len(text.split()) for text in texts) > 0
