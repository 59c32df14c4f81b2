"""The ranking file, and `frspec rank-tokens` that makes it."""

import argparse
import builtins
import collections
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from frspec.errors import ConversionError, HubError, ModelError, RankingError
from frspec.ranking import Ranking, add_arguments, corpus, count, run
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


def make(counts, special_ids=(0,), **changes) -> Ranking:
    ranking = Ranking.from_counts(
        np.array(counts), tokenizer_fingerprint="f" * 64, corpus="c", special_ids=special_ids
    )
    return replace(ranking, **changes)


# ---------------------------------------------------------------------------- the file


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_order_is_by_count_then_id(counts):
    ranking = make(counts)
    expected = sorted(range(len(counts)), key=lambda i: (-counts[i], i))
    assert ranking.token_ids.tolist() == expected
    assert ranking.counts.tolist() == [counts[i] for i in expected]
    ranking.validate("f" * 64, len(counts))


def test_saved_file_is_read_back_and_is_plain_safetensors(tmp_path):
    path = tmp_path / "r.safetensors"
    make([3, 0, 9, 3], special_ids=[3, 1]).save(path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["token_ids"].dtype == np.int32 and tensors["counts"].dtype == np.int64
    assert tensors["token_ids"].tolist() == [2, 0, 3, 1]
    assert tensors["counts"].tolist() == [9, 3, 3, 0]
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {
            "format": "frspec-ranking",
            "version": "1",
            "tokenizer_fingerprint": "f" * 64,
            "corpus": "c",
            "tokens_counted": "15",
            "special_ids": "[1, 3]",
            "vocab_size": "4",
            "source": "counted",
        }
    loaded = Ranking.load(path)
    assert loaded.token_ids.tolist() == [2, 0, 3, 1] and loaded.counts.tolist() == [9, 3, 3, 0]
    assert (loaded.special_ids, loaded.vocab_size, loaded.tokens_counted) == ([1, 3], 4, 15)
    assert os.listdir(tmp_path) == ["r.safetensors"]


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    make([1, 2]).save(path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(RankingError, match="cannot be written: No space left"):
        make([5, 6]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.safetensors"]
    monkeypatch.undo()
    with pytest.raises(RankingError, match="cannot be written: No such file"):
        make([5, 6]).save(tmp_path / "none" / "r.safetensors")


I32 = np.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": np.array([0, 1, 1], I32)}, "id 1 occurs 2 times, expected once"),
        ({"token_ids": np.array([0, 1, 3], I32)}, r"token_ids: expected ids in \[0, 3\), found 3"),
        ({"token_ids": np.array([0, -1, 2], I32)}, "token_ids: expected ids .* found -1"),
        ({"token_ids": np.array([0, 1, 2])}, r"token_ids: expected int32 \[n\], found int64 \[3\]"),
        ({"counts": np.array([5, 5, 1], I32)}, r"counts: expected int64 \[n\], found int32"),
        ({"counts": np.array([[5, 5, 1]])}, r"counts: expected int64 \[n\], found int64 \[1, 3\]"),
        ({"counts": np.array([5, 6])}, "expected equal lengths, found 3, 2"),
        ({"counts": np.array([5, 1, 5])}, "not ordered .* at row 2"),
        ({"token_ids": np.array([1, 0, 2], I32)}, "not ordered .* at row 1"),
        ({"counts": np.array([6, 6, -1])}, "counts: expected none below 0, found -1"),
        ({"counts": np.array([5, 5, 0])}, "sum 10, tokens_counted says 11"),
        ({"special_ids": [3]}, "special_ids: expected ids in .* found 3"),
        ({"special_ids": [-2]}, "special_ids: expected ids in .* found -2"),
        ({"source": "guessed"}, "source: expected one of counted, imported, found 'guessed'"),
        ({"vocab_size": 0}, "vocab_size: expected a size above 0"),
    ],
)
def test_wrong_content_is_refused(tmp_path, changes, message):
    good = make([5, 5, 1])
    good.validate()
    bad = replace(good, **changes)
    with pytest.raises(RankingError, match=message):
        bad.save(tmp_path / "r.safetensors")
    assert os.listdir(tmp_path) == []
    # And when another program wrote it.
    metadata = {
        "format": "frspec-ranking",
        "version": "1",
        "tokenizer_fingerprint": bad.tokenizer_fingerprint,
        "corpus": "c",
        "tokens_counted": str(bad.tokens_counted),
        "special_ids": json.dumps(bad.special_ids),
        "vocab_size": str(bad.vocab_size),
        "source": bad.source,
    }
    path = tmp_path / "bad.safetensors"
    tensors = {"token_ids": bad.token_ids, "counts": bad.counts}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with pytest.raises(RankingError, match=message) as caught:
        Ranking.load(path)
    assert str(caught.value).startswith(str(path))


def test_ranking_of_another_model_is_refused():
    ranking = make([5, 5, 1, 0])
    ranking.validate("f" * 64, 4)
    ranking.validate("f" * 64, 8)  # a padded embedding
    with pytest.raises(RankingError, match="another tokenizer: expected fingerprint 0000"):
        ranking.validate("0" * 64, 4)
    with pytest.raises(RankingError, match=r"expected ids in \[0, 3\), found 3"):
        ranking.validate("f" * 64, 3)


GOOD = {
    "format": "frspec-ranking",
    "version": "1",
    "tokenizer_fingerprint": "f",
    "corpus": "c",
    "tokens_counted": "1",
    "special_ids": "[0]",
    "vocab_size": "1",
    "source": "counted",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "pt"}, "format: expected 'frspec-ranking', found 'pt'"),
        ({"version": "2"}, "version: expected '1', found '2'"),
        ({"corpus": None}, "metadata: expected corpus"),
        ({"tokens_counted": "-1"}, "tokens_counted: expected a count, found '-1'"),
        ({"vocab_size": "9" * 30}, "vocab_size: expected a count"),
        ({"special_ids": "0"}, "special_ids: expected a JSON list of ids, found '0'"),
        ({"special_ids": "[true]"}, "special_ids: expected a JSON list"),
        ({"special_ids": "[0"}, "special_ids: expected a JSON list"),
        ({"special_ids": "[99999999999999999999]"}, "special_ids: expected ids in"),
    ],
)
def test_wrong_metadata_is_refused(tmp_path, changes, message):
    path = tmp_path / "r.safetensors"
    tensors = {"token_ids": np.array([0], I32), "counts": np.array([1])}
    safetensors.numpy.save_file(tensors, path, metadata=GOOD)
    Ranking.load(path)
    metadata = {k: v for k, v in (GOOD | changes).items() if v is not None}
    safetensors.numpy.save_file(tensors, path, metadata=metadata)
    with pytest.raises(RankingError, match=message):
        Ranking.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(RankingError, match="no such ranking file"):
        Ranking.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(RankingError, match="not a safetensors file"):
        Ranking.load(path)
    make([4, 2, 1]).save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RankingError, match="not a safetensors file"):
        Ranking.load(path)
    safetensors.numpy.save_file({"x": np.zeros(1)}, path)
    with pytest.raises(RankingError, match="format: expected 'frspec-ranking', found None"):
        Ranking.load(path)
    safetensors.numpy.save_file({"x": np.zeros(1)}, path, metadata=GOOD)
    with pytest.raises(RankingError, match=r"tensors: expected .* found \['x'\]"):
        Ranking.load(path)


# ---------------------------------------------------------------------------- sub-vocabularies


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_subset_by_its_definition(data):
    counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=20))
    ids = st.lists(st.integers(0, len(counts) - 1), max_size=4)
    special, always = data.draw(ids), data.draw(ids)
    ranking = make(counts, special_ids=special)
    forced = set(special) | set(always)
    n = data.draw(st.integers(max(1, len(forced)), len(counts)))
    subset = ranking.subset(n, always=always)
    assert subset.dtype == np.int32 and len(subset) == n
    rest = [i for i in ranking.token_ids.tolist() if i not in forced][: n - len(forced)]
    expected = [i for i in ranking.token_ids.tolist() if i in forced or i in rest]
    assert subset.tolist() == expected
    if sum(counts):
        assert ranking.coverage(n) == pytest.approx(
            sum(counts[i] for i in ranking.subset(n).tolist()) / sum(counts)
        )


def test_impossible_subsets_are_refused():
    ranking = make([4, 3, 2, 1], special_ids=[2, 3])
    for n in (0, -1, 5):
        with pytest.raises(RankingError, match=rf"expected a size in \[1, 4\], found {n}"):
            ranking.subset(n)
    with pytest.raises(RankingError, match="2 ids cannot hold the 3 that must be in it"):
        ranking.subset(2, always=[0])
    with pytest.raises(RankingError, match="always: expected ids in"):
        ranking.subset(3, always=[4])


def test_imported_list_gets_the_ids_it_lacks():
    ranking = Ranking(
        token_ids=np.array([7, 2, 5], I32),
        counts=np.zeros(3, np.int64),
        tokenizer_fingerprint="f",
        corpus="c",
        tokens_counted=0,
        special_ids=[9],
        vocab_size=10,
        source="imported",
    )
    ranking.validate()  # its order is its own
    assert ranking.subset(3).tolist() == [7, 2, 9]
    assert ranking.subset(1).tolist() == [9]
    with pytest.raises(RankingError, match="no counts"):
        ranking.coverage(2)


# ---------------------------------------------------------------------------- counting

TEXTS = ["the cat sat on the mat .", "the cat slept and\nthen the cat sat", "é é , unknown words"]


def write_lines(path: Path, records) -> Path:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_parquet(path: Path, records) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(records), path)
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
    from frspec.ranking import command

    monkeypatch.setattr(command, "SIZES", (3, 8))
    path = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    ranking = rank(folder, "--input", path)
    printed = capsys.readouterr().out
    for size in (3, 8):
        assert f"{ranking.coverage(size):.2%}" in printed
    assert "100.00%" in printed


def test_wrong_use_is_refused_before_counting(folder, tmp_path, monkeypatch):
    good = write_lines(tmp_path / "c.jsonl", RECORDS["text"])
    monkeypatch.setattr(corpus, "read_corpus", None)
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


def test_shipped_ranking_is_whole():
    import frspec.ranking

    data = Path(frspec.ranking.__file__).resolve().parents[1] / "data"
    path = data / "smollm2-135m-instruct" / "ranking.safetensors"
    assert path.stat().st_size < 1_000_000
    ranking = Ranking.load(path)
    assert len(ranking) == ranking.vocab_size == 49152
    assert ranking.special_ids == [0, 2]
    assert ranking.tokens_counted > 20_000_000
    assert {0, 2} <= set(ranking.subset(8192).tolist())
    assert 0.85 < ranking.coverage(8192) < ranking.coverage(32768) < 1
