"""The ranking file and the sub-vocabularies chosen from it."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import frspec.ranking
from frspec.errors import RankingError
from frspec.ranking import Ranking


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
    special = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=8))
    ranking = make(counts, special_ids=special)
    forced = set(special)
    n = data.draw(st.integers(max(1, len(forced)), len(counts)))
    subset = ranking.subset(n)
    assert subset.dtype == np.int32 and len(subset) == n
    rest = [i for i in ranking.token_ids.tolist() if i not in forced][: n - len(forced)]
    expected = [i for i in ranking.token_ids.tolist() if i in forced or i in rest]
    assert subset.tolist() == expected
    if sum(counts):
        assert ranking.coverage(n) == pytest.approx(
            sum(counts[i] for i in ranking.subset(n).tolist()) / sum(counts)
        )


def test_impossible_subsets_are_refused():
    ranking = make([4, 3, 2, 1], special_ids=[1, 2, 3])
    for n in (0, -1, 5):
        with pytest.raises(RankingError, match=rf"expected a size in \[1, 4\], found {n}"):
            ranking.subset(n)
    with pytest.raises(RankingError, match="2 ids cannot hold the 3 that must be in it"):
        ranking.subset(2)


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


def test_shipped_ranking_is_whole():
    data = Path(frspec.ranking.__file__).resolve().parents[1] / "data"
    path = data / "smollm2-135m-instruct" / "ranking.safetensors"
    assert path.stat().st_size < 1_000_000
    ranking = Ranking.load(path)
    assert len(ranking) == ranking.vocab_size == 49152
    assert ranking.special_ids == [0, 2]
    assert ranking.tokens_counted > 20_000_000
    assert {0, 2} <= set(ranking.subset(8192).tolist())
    assert 0.85 < ranking.coverage(8192) < ranking.coverage(32768) < 1
