"""`frspec rank-tokens`: counting a corpus, importing a published list."""

import argparse
import builtins
import collections
import json
import pickle
import zipfile
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from frspec.errors import ConversionError, HubError, ModelError, RankingError
from frspec.ranking import add_arguments, chunk, command, count, file_chunks, run, table_chunks
from frspec.ranking.corpus import read_chunks
from frspec.ranking.count import Tally, add_up, count_chunk
from frspec.tokenizer import Tokenizer
from ranking_files import (
    RECORDS,
    TEXTS,
    VOCAB_SIZE,
    WORDS,
    check_counts,
    expected_counts,
    rank,
    write_lines,
    write_parquet,
    write_word_model,
)

SPEC_BENCH = Path(__file__).parents[2].parent / "shared" / "data" / "spec_bench.jsonl"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_word_model(tmp_path / "model")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", RECORDS)
def test_every_kind_of_record_gives_its_texts(folder, tmp_path, kind, suffix):
    if suffix == ".parquet":
        if kind == "messages":
            pytest.skip("a Parquet column has one type")
        path = write_parquet(tmp_path / "c.parquet", RECORDS[kind])
    else:
        path = write_lines(tmp_path / "c.jsonl", RECORDS[kind])
    field = ["--field", kind] if kind in ("a.b", "turns") else []
    ranking = rank(folder, "--input", path, *field)
    check_counts(ranking, TEXTS)
    assert len(ranking) == ranking.vocab_size == VOCAB_SIZE
    assert ranking.special_ids == [0]
    assert ranking.corpus == path.name
    assert ranking.tokenizer_fingerprint == Tokenizer.load(folder).fingerprint


def test_tokens_that_the_model_has_no_row_for_are_left_out(tmp_path):
    folder = write_word_model(tmp_path / "model")
    rows = WORDS.index("mat")
    config = {"vocab_size": rows, "eos_token_id": [0, -1, rows + 1]}
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "c.txt").write_text("the cat sat on a mat and the cat slept")
    ranking = rank(folder, "--input", tmp_path / "c.txt")
    assert sorted(ranking.token_ids) == list(range(rows)) and ranking.vocab_size == rows
    assert ranking.special_ids == [0]
    assert ranking.tokens_counted == len("the cat sat on a the cat".split())


@pytest.mark.parametrize("out", ["corpus.txt", "link", "model/tokenizer.json"])
def test_nothing_but_a_ranking_is_replaced(folder, tmp_path, out):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat")
    (tmp_path / "link").symlink_to(corpus)
    before = (tmp_path / out).read_bytes()
    options = ["--tokenizer", folder, "--input", corpus, "--out", tmp_path / out]
    with pytest.raises(RankingError, match="expected a new file or a ranking to replace"):
        run(parsed(options))
    assert (tmp_path / out).read_bytes() == before
    ranking = rank(folder, "--input", corpus)
    assert len(rank(folder, "--input", corpus)) == len(ranking)  # which replaces the first
    path = folder.parent / "ranking.safetensors"
    with pytest.raises(RankingError, match="another file than those to merge"):
        run(parsed(["--merge", path, path, "--out", path]))


def parsed(options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, options)))


@pytest.mark.parametrize("chunk_bytes", [1, 40, 1 << 20])
def test_plain_text_is_cut_between_words(folder, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", 8)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    text = "\n".join([*TEXTS, "the " * 50, "é " * 50]) + "\nthe cat"
    path = tmp_path / "c.txt"
    path.write_text(text, encoding="utf-8")
    check_counts(rank(folder, "--input", path, "--corpus", "books"), [text])


@pytest.mark.parametrize("piece_bytes", [4, 5, 10, 2001, 2002])
def test_plain_text_without_breaks_is_read_in_bounded_pieces(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 64)
    path = tmp_path / "c.txt"
    path.write_bytes("é".encode() * 1000 + b"\xc3")
    chunks = list(read_chunks([path], None))
    texts = [t for c in chunks for record in c.records(None)[0] for t in record.texts]
    assert "".join(texts) == "é" * 1000 + "\ufffd"
    assert max(len(text.encode()) for text in texts[:-1] or [""]) <= piece_bytes
    assert sum(c.bytes_read for c in chunks) == 2001


def test_bytes_that_are_no_text_are_cut_too(tmp_path, monkeypatch):
    monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", 4)
    path = tmp_path / "c.txt"
    path.write_bytes(b"\x80" * 11)
    pieces = [data for piece in read_chunks([path], None) for data in piece.content]
    assert [len(data) for data in pieces] == [4, 4, 3]


def test_files_of_several_kinds_add_up(folder, tmp_path):
    plain = tmp_path / "c.txt"
    plain.write_text(TEXTS[0])
    lines = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    ranking = rank(folder, "--input", plain, lines, "--corpus", "both")
    check_counts(ranking, [TEXTS[0], *TEXTS])
    assert ranking.corpus == "both"
    assert ranking.token_ids[0] == WORDS.index("the")


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("limit", [1, 5, 100, 420])
def test_max_tokens_is_exact(folder, tmp_path, monkeypatch, capsys, chunk_bytes, limit):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 21)
    words = " ".join(TEXTS * 21).split()
    assert len(words) == 420
    ranking = rank(folder, "--input", path, "--max-tokens", limit)
    check_counts(ranking, [" ".join(words[:limit])])
    assert f"; stopped at --max-tokens {limit}" in capsys.readouterr().err


def test_corpus_shorter_than_max_tokens(folder, tmp_path, capsys):
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    check_counts(rank(folder, "--input", path, "--max-tokens", 1000), TEXTS)
    assert "stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".parquet"])
def test_size_of_chunks_does_not_matter(folder, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"c{suffix}"
    if suffix == ".parquet":
        write_parquet(path, RECORDS["text"] * 20)
    elif suffix == ".txt":
        path.write_text("\n".join(TEXTS * 20))
    else:
        write_lines(path, RECORDS["text"] * 20)
    tokenizer = Tokenizer.load(folder)
    numbers = []
    monkeypatch.setattr(table_chunks, "BATCH_ROWS", 7)
    monkeypatch.setattr(count, "BATCH_CHARACTERS", 50)
    for size in (1, 300, 1 << 20):
        monkeypatch.setattr(chunk, "CHUNK_BYTES", size)
        monkeypatch.setattr(file_chunks, "TEXT_PIECE_BYTES", max(size, 16))
        chunks = list(read_chunks([path], None))
        tallies = list(add_up(((c, count_chunk(tokenizer, c, None)) for c in chunks), empty()))
        assert (tallies[-1].counts == expected_counts(TEXTS * 20)).all()
        assert tallies[-1].bytes_read == path.stat().st_size
        tokens = [tally.tokens for tally in tallies]
        assert tokens == sorted(tokens) and tokens[-1] == len(" ".join(TEXTS * 20).split())
        assert 0 < tallies[-1].tokenizer_s
        numbers.append(len(chunks))
    assert numbers[0] > numbers[1] > numbers[2] == 1


def empty() -> Tally:
    return Tally.empty(VOCAB_SIZE)


BROKEN = ['{"text": "the cat"', "[1, 2]", '{"body": "x"}', '{"text": 3}', "null", '{"text": {}}']


def test_broken_lines_are_skipped_and_reported(folder, tmp_path, capsys):
    path = write_lines(tmp_path / "c.jsonl", [RECORDS["text"][0], "", *BROKEN, RECORDS["text"][1]])
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    check_counts(rank(folder, "--input", path), TEXTS[:2])
    report = capsys.readouterr().err
    assert f"skipped 7 broken records; the first at {path}:3: not JSON" in report


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (BROKEN[0], "not JSON: Expecting ',' delimiter at column"),
        (BROKEN[1], "expected an object with conversations, messages or text, found a list"),
        (BROKEN[2], "expected an object .* found an object with body"),
        (BROKEN[3], "text: expected text or messages, found a number"),
        ("[" * 100000, "JSON nested too deeply|not JSON"),
    ],
)
def test_strict_stops_at_the_first_broken_line(folder, tmp_path, line, reason):
    path = write_lines(tmp_path / "c.jsonl", [RECORDS["text"][0], line])
    with pytest.raises(RankingError, match=f"{path}:2: {reason}"):
        rank(folder, "--input", path, "--strict")
    assert not (tmp_path / "ranking.safetensors").exists()


@pytest.mark.parametrize("chunk_bytes", [8, 70, 1 << 20])
@pytest.mark.parametrize("length", [70, 300])
@pytest.mark.parametrize("after", [True, False])
def test_endless_line_is_skipped_in_bounded_memory(
    folder, tmp_path, monkeypatch, capsys, chunk_bytes, length, after
):
    monkeypatch.setattr(chunk, "MAX_RECORD_BYTES", 64)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    long = {"text": "x" * length}
    path = write_lines(tmp_path / "c.jsonl", [RECORDS["text"][0], long])
    if after:
        with path.open("a") as file:
            file.write(json.dumps(RECORDS["text"][1]) + "\n[]")
    else:
        path.write_bytes(path.read_bytes()[:-1])
    check_counts(rank(folder, "--input", path), TEXTS[: 1 + after])
    report = capsys.readouterr().err
    records = "2 broken records" if after else "1 broken record"
    assert f"skipped {records}; the first at {path}:2: longer" in report
    with pytest.raises(RankingError, match=f"{path}:2: longer than 64 bytes"):
        rank(folder, "--input", path, "--strict")
    if chunk_bytes < 100:
        pieces = read_chunks([path], None)
        assert max(len(piece.content) for piece in pieces) <= chunk_bytes + 64


def test_half_a_surrogate_pair_is_counted_as_unknown(folder, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "the cat"}\n{"text": "the \\ud800 mat"}\n')
    check_counts(rank(folder, "--input", path), ["the cat", "the ? mat"])


def test_coverage_is_printed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "SIZES", (3, 8))
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    ranking = rank(folder, "--input", path)
    printed = capsys.readouterr().out
    for size in (3, 8):
        assert f"{ranking.coverage(size):.2%}" in printed
    assert "100.00%" in printed


def test_wrong_use_is_refused_before_counting(folder, tmp_path, monkeypatch):
    good = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    monkeypatch.setattr(command, "read_chunks", None)
    parser = argparse.ArgumentParser()
    add_arguments(parser)

    def attempt(tokenizer=folder, out=tmp_path / "r", source="--input", file=good, **options):
        arguments = ["--tokenizer", tokenizer, "--out", out, source, file]
        arguments += [part for name, value in options.items() for part in (f"--{name}", value)]
        return run(parser.parse_args([str(a) for a in arguments]))

    with pytest.raises(RankingError, match="no such input file"):
        attempt(file=tmp_path / "none.jsonl")
    with pytest.raises(RankingError, match="no such folder"):
        attempt(out=tmp_path / "none" / "r")
    with pytest.raises(RankingError, match="expected a file, found a folder"):
        attempt(out=tmp_path)
    with pytest.raises(ModelError, match="no such folder"):
        attempt(tokenizer=tmp_path / "none")
    with pytest.raises(HubError, match="not a valid hub id"):
        attempt(tokenizer="owner/na--me")
    for option in ("max-tokens", "processes"):
        with pytest.raises(RankingError, match=f"--{option}: expected at least 1"):
            attempt(**{option: 0})
    with pytest.raises(RankingError, match="no such folder"):
        attempt(checkpoint=tmp_path / "none" / "c")
    with pytest.raises(RankingError, match="expected another file than --out"):
        attempt(checkpoint=tmp_path / "r")
    for source in ("--import-pt", "--merge"):
        with pytest.raises(RankingError, match="--field is for --input"):
            attempt(source=source, field="text")
    with pytest.raises(RankingError, match="hf://owner: expected hf://owner/name"):
        attempt(file="hf://owner")
    with pytest.raises(RankingError, match="--tokenizer is needed"):
        run(parser.parse_args(["--out", "r", "--input", str(good)]))


def test_empty_corpus_is_refused(folder, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text("\n\n")
    with pytest.raises(RankingError, match="no text to count"):
        rank(folder, "--input", path)
    assert not (tmp_path / "ranking.safetensors").exists()


def test_parquet_problems_are_named(folder, tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "c.parquet", [{"body": "x"}])
    with pytest.raises(RankingError, match="expected a column .* found body"):
        rank(folder, "--input", path)
    path.write_bytes(b"PAR1")
    with pytest.raises(RankingError, match="cannot be read as Parquet"):
        rank(folder, "--input", path)

    real_import = builtins.__import__

    def no_pyarrow(name, *args, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(RankingError, match=r"needs pyarrow.*pip install 'frspec\[parquet\]'"):
        rank(folder, "--input", path)


# ---------------------------------------------------------------------------- importing


def save_pt(path: Path, value) -> Path:
    """What torch.save writes for plain values: a zip archive with a pickle of protocol 2."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("freq/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("freq/version", "3\n")
    return path


def test_published_list_is_imported(folder, tmp_path, capsys):
    ids = [5, 2, 11, 3, 8]
    path = save_pt(tmp_path / "freq_5.pt", ids)
    ranking = rank(folder, "--import-pt", path)
    assert ranking.token_ids.tolist() == ids
    assert ranking.counts.tolist() == [0] * 5
    assert (ranking.source, ranking.corpus, ranking.tokens_counted) == ("imported", "freq_5.pt", 0)
    assert ranking.subset(4).tolist() == [5, 2, 11, 0]  # 0 ends a text
    assert "imported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, VOCAB_SIZE], f"expected ids in .* found {VOCAB_SIZE}"),
        ([1, -2], "expected ids in .* found -2"),
        ([1, 2, 1], "id 1 occurs 2 times"),
        ([], "expected a list of token ids"),
        ([1.5], "expected a list of token ids, found list"),
        ([[1, 2], [3]], "expected a list of token ids, found list"),
        ({"ids": [1]}, "expected a list of token ids, found dict"),
        ([True], "expected a list of token ids"),
    ],
)
def test_list_that_does_not_suit_is_refused(folder, tmp_path, value, message):
    path = save_pt(tmp_path / "freq.pt", value)
    with pytest.raises(RankingError, match=message):
        rank(folder, "--import-pt", path)
    assert not (tmp_path / "ranking.safetensors").exists()


def test_list_that_runs_code_is_refused(folder, tmp_path):
    path = save_pt(tmp_path / "freq.pt", collections.Counter)
    with pytest.raises(ConversionError):
        rank(folder, "--import-pt", path)


# ---------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SPEC_BENCH.is_file(), reason=f"{SPEC_BENCH.name} is not beside the clone")
def test_real_corpus_against_plain_counting(tmp_path):
    texts = [t for line in SPEC_BENCH.open(encoding="utf-8") for t in json.loads(line)["turns"]]
    folder = tmp_path / "model"
    folder.mkdir()
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(folder / "tokenizer.json"))
    ranking = rank(folder, "--input", SPEC_BENCH, "--field", "turns")
    expected = collections.Counter(i for text in texts for i in backend.encode(text).ids)
    found = dict(zip(ranking.token_ids.tolist(), ranking.counts.tolist(), strict=True))
    assert {i: n for i, n in found.items() if n} == dict(expected)
