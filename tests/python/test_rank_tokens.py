"""`frspec rank-tokens`: counting a corpus, importing a published list."""

import argparse
import builtins
import collections
import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import tokenizers
from pyarrow import parquet
from tokenizers import decoders, models, pre_tokenizers

from frspec.errors import ConversionError, HubError, ModelError, RankingError
from frspec.ranking import Ranking, add_arguments, command, corpus, count, run
from frspec.ranking.count import count_tokens
from frspec.tokenizer import Tokenizer

WORDS = ["<end>", "<start>", *"the cat sat on a mat and then slept . , é".split()]
VOCAB_SIZE = len(WORDS) + 3  # the embedding is padded
SPEC_BENCH = Path(__file__).parents[2].parent / "shared" / "data" / "spec_bench.jsonl"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model folder whose tokens are words."""
    path = tmp_path / "model"
    path.mkdir()
    backend = tokenizers.Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=",")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<end>", "<start>"])
    backend.save(str(path / "tokenizer.json"))
    config = {"vocab_size": VOCAB_SIZE, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    return path


def rank(folder: Path, *arguments) -> Ranking:
    """Runs the command and reads what it wrote."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = folder.parent / "ranking.safetensors"
    options = ["--tokenizer", str(folder), "--out", str(out), *map(str, arguments)]
    assert run(parser.parse_args(options)) == 0
    return Ranking.load(out)


def expected_counts(texts: list[str]) -> np.ndarray:
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for text in texts:
        for word in text.split():
            counts[WORDS.index(word if word in WORDS else ",")] += 1
    return counts


def check_counts(ranking: Ranking, texts: list[str]) -> None:
    counts = np.empty(VOCAB_SIZE, dtype=np.int64)
    counts[ranking.token_ids] = ranking.counts
    np.testing.assert_array_equal(counts, expected_counts(texts))


TEXTS = ["the cat sat on the mat .", "the cat slept and\nthen the cat sat", "é é , unknown words"]


def write_lines(path: Path, records) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


RECORDS = {
    "text": [{"text": text} for text in TEXTS],
    "sharegpt": [
        {"id": 1, "conversations": [{"from": "human", "value": t} for t in TEXTS[:2]]},
        {"id": 2, "conversations": [{"from": "gpt", "value": TEXTS[2]}]},
        {"id": 3, "conversations": []},
    ],
    "messages": [
        {"messages": [{"role": "user", "content": TEXTS[0]}, {"role": "tool", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": TEXTS[1]}]}]},
        {"messages": [{"role": "assistant", "content": TEXTS[2]}]},
    ],
    "a.b": [{"a": {"b": text}, "text": "not this"} for text in TEXTS],
    "turns": [{"turns": TEXTS[:2], "text": "not this"}, {"turns": TEXTS[2:]}],
}


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


def test_plain_text_is_cut_between_words(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TEXT_PIECE_BYTES", 7)
    text = "\n".join([*TEXTS, "the " * 50, "é " * 50]) + "\nthe cat"
    path = tmp_path / "c.txt"
    path.write_text(text, encoding="utf-8")
    check_counts(rank(folder, "--input", path, "--corpus", "books"), [text])


def test_plain_text_without_breaks_is_read_in_bounded_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "TEXT_PIECE_BYTES", 10)
    path = tmp_path / "c.txt"
    path.write_bytes("é".encode() * 1000 + b"\xc3")
    pieces = list(corpus.read_corpus([path], None, corpus.Broken()))
    texts = [text for piece in pieces for text in piece.texts]
    assert "".join(texts) == "é" * 1000 + "\ufffd"
    assert max(map(len, texts)) <= 10
    assert sum(piece.bytes_read for piece in pieces) == 2001


def test_files_of_several_kinds_add_up(folder, tmp_path):
    plain = tmp_path / "c.txt"
    plain.write_text(TEXTS[0])
    lines = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    ranking = rank(folder, "--input", plain, lines, "--corpus", "both")
    check_counts(ranking, [TEXTS[0], *TEXTS])
    assert ranking.corpus == "both"
    assert ranking.token_ids[0] == WORDS.index("the")


def test_batches_do_not_matter(folder, tmp_path, monkeypatch):
    tokenizer = Tokenizer.load(folder)
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 20)
    total = int(expected_counts(TEXTS * 20).sum())
    for size in (1, 7, 10**6):
        monkeypatch.setattr(count, "BATCH_TEXTS", size)
        seen = []
        pieces = corpus.read_corpus([path], None, corpus.Broken())
        result = count_tokens(tokenizer, pieces, progress=lambda c: seen.append(c.tokens))  # noqa: B023
        np.testing.assert_array_equal(result.counts, expected_counts(TEXTS * 20))
        assert result.tokens == total and result.bytes_read == path.stat().st_size
        assert seen == sorted(seen) and seen[-1] == total
        assert 0 <= result.tokenizer_s <= result.total_s


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_max_tokens_is_exact(folder, tmp_path, limit, monkeypatch):
    monkeypatch.setattr(count, "BATCH_TEXTS", 4)
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"] * 20)
    ranking = rank(folder, "--input", path, "--max-tokens", limit)
    assert ranking.tokens_counted == limit


BROKEN = ['{"text": "the cat"', "[1, 2]", '{"body": "x"}', '{"text": 3}', "null", '{"text": {}}']


def test_broken_lines_are_skipped_and_reported(folder, tmp_path, capsys):
    path = write_lines(tmp_path / "c.jsonl", [RECORDS["text"][0], "", *BROKEN, RECORDS["text"][1]])
    with path.open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    check_counts(rank(folder, "--input", path), TEXTS[:2])
    report = capsys.readouterr().err
    assert f"skipped 7 broken records, the first at {path}:3: not JSON" in report


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


def test_endless_line_is_skipped_in_bounded_memory(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 64)
    long = {"text": "cat " * 100}
    path = write_lines(tmp_path / "c.jsonl", [RECORDS["text"][0], long, RECORDS["text"][1]])
    check_counts(rank(folder, "--input", path), TEXTS[:2])
    assert f"{path}:2: line longer than 64 bytes" in capsys.readouterr().err


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
    monkeypatch.setattr(command, "count_tokens", None)
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
    with pytest.raises(RankingError, match="--max-tokens: expected at least 1"):
        attempt(**{"max-tokens": 0})


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
