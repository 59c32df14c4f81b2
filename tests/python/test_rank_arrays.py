"""`frspec rank-tokens` on a file that is one JSON array, as ShareGPT is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frspec.errors import RankingError
from frspec.ranking import chunk
from frspec.ranking.chunk import Chunk
from frspec.ranking.corpus import read_chunks
from ranking_files import COMPRESS, RECORDS, TEXTS, check_counts, rank, write_word_model

STORE = {"": bytes, **COMPRESS}
ELEMENT = json.dumps(RECORDS["text"][0]).encode()
# What an element may say that looks like an array's marks.
HARD = [
    {"text": '], [ } { , " \\ \\\\ \\" \n\t'},
    {"text": "\u00e9 \u4e2d \U0001f600 \\u005d"},
    {"text": "", "more": [[], {}, [{"a": [1, 2]}], '"', "\\"]},
    [],
    {},
    "a, ]",
    -1.5e3,
    None,
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_word_model(tmp_path / "model")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def content_of(chunks: list[Chunk]) -> list[bytes]:
    return [element for piece in chunks for element in piece.content]


def numbers_of(chunks: list[Chunk]) -> list[int]:
    return [piece.first + n for piece in chunks for n in range(len(piece.content))]


@pytest.mark.parametrize("compression", STORE)
@pytest.mark.parametrize("chunk_bytes", [64, 1 << 20])
@pytest.mark.parametrize(
    "before", [b"", b"\xef\xbb\xbf", b" \r\n\t" * 50], ids=["", "bom", "blank"]
)
def test_one_array_is_its_elements(folder, tmp_path, monkeypatch, compression, chunk_bytes, before):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    records = sum((RECORDS[kind] for kind in ("sharegpt", "messages", "text")), [])
    data = before + json.dumps(records, indent=2).encode() + b"\n" * 100
    path = write(tmp_path / f"c.json{compression}", STORE[compression](data))
    check_counts(rank(folder, "--input", path, "--strict"), TEXTS * 3)
    assert sum(c.bytes_read for c in read_chunks([path], None)) == path.stat().st_size


@pytest.mark.parametrize("layout", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=str)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_array_is_cut_between_its_elements_wherever_blocks_end(
    tmp_path, monkeypatch, layout, ensure_ascii
):
    text = json.dumps(HARD, **layout, ensure_ascii=ensure_ascii)
    path = write(tmp_path / "c.json", text.encode())
    for size in range(1, len(text.encode()) + 1):
        monkeypatch.setattr(chunk, "CHUNK_BYTES", size)
        chunks = list(read_chunks([path], None))
        assert [json.loads(element) for element in content_of(chunks)] == HARD
        assert numbers_of(chunks) == list(range(1, len(HARD) + 1))


@pytest.mark.parametrize("end", [b"]", b"] x", b"", b", 7"], ids=repr)
@pytest.mark.parametrize("compression", STORE)
def test_array_goes_on_behind_any_chunk(tmp_path, monkeypatch, end, compression):
    """And finds again what is wrong at its end: a run ends there with --strict, and the next one
    begins behind the last chunk before it."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 64)
    data = STORE[compression](json.dumps(RECORDS["text"] * 5)[:-1].encode() + end)
    path = write(tmp_path / f"c.json{compression}", data + (b"no archive" if compression else b""))
    chunks = list(read_chunks([path], None))
    assert len(chunks) > 5
    wrong = (end != b"]") + bool(compression)
    assert (chunks[-1].at is None) == bool(wrong)
    for number, before in enumerate(chunks, 1):
        if before.at is None:
            continue
        rest = list(read_chunks([path], None, before.after))
        assert content_of(rest) == content_of(chunks[number:])
        assert [str(c.broken) for c in rest if c.broken] == [
            str(c.broken) for c in chunks if c.broken
        ]
        assert numbers_of(rest) == numbers_of(chunks[number:])


@pytest.mark.parametrize(
    ("data", "records", "reason"),
    [
        (
            b"[%s, 7, %s]",
            2,
            "element 2: expected an object with conversations, messages or text, found a",
        ),
        (b"[%s,, %s]", 2, "element 2: not JSON: Expecting value at column 1"),
        (
            b"[%s, %s,\n",
            2,
            r"element 3: expected \] at the end, found none: from here on nothing is counted",
        ),
        (
            b"[%s, %s, ",
            2,
            r"element 3: expected \] at the end, found none: from here on nothing is counted",
        ),
        (b'[%s, %s, {"text": "[1', 2, r"element 3: expected \] at the end, found none"),
        (
            b"[%s, %s] x",
            2,
            "element 3: expected the end of the file behind its array, found more, which",
        ),
        (
            b"[%s]\n[%s]",
            1,
            "element 2: expected the end of the file behind its array, found more, which",
        ),
        (b'[%s, {"text": "\xff"}, %s]', 2, "element 2: not UTF-8 at byte 10"),
        (b'[%s, {"text": tru}, %s]', 2, "element 2: not JSON: Expecting value at column 10"),
        (
            b'[%s,\n{"text":\n\n x}, %s]',
            2,
            "element 2: not JSON: Expecting value at line 3 column 2",
        ),
        (b'[%s, {"text": ]}, %s]', 2, "element 2: not JSON: Expecting value at column 10"),
        (
            b'[%s, {"text": "\n"}, %s]',
            2,
            "element 2: not JSON: Invalid control character at column 11",
        ),
        (b"[%s, %s}, %s]", 2, "element 2: not JSON: Extra data"),
        (
            b"[%s, " + b"[" * 50_000 + b"]" * 50_000 + b", %s]",
            2,
            "element 2: JSON nested too deeply",
        ),
        (b'[%s, {"text": 1' + b"0" * 5000 + b"}, %s]", 2, "element 2: Exceeds the limit"),
    ],
)
def test_broken_element_is_skipped_and_the_rest_is_counted(
    folder, tmp_path, capsys, data, records, reason
):
    path = write(tmp_path / "c.json", data.replace(b"%s", ELEMENT))
    check_counts(rank(folder, "--input", path), TEXTS[:1] * records)
    assert f"skipped 1 broken record; the first at {path}: element " in capsys.readouterr().err
    with pytest.raises(RankingError, match=f"{path}: {reason}"):
        rank(folder, "--input", path, "--strict")


def test_numbers_beyond_any_type_and_half_a_surrogate_pair_are_no_fault(folder, tmp_path):
    odd = b'{"id": 123456789012345678901234567890, "score": 1e400, "text": "\\ud800"}'
    path = write(tmp_path / "c.json", b"[%s, %s, %s]" % (ELEMENT, odd, ELEMENT))
    ranking = rank(folder, "--input", path, "--strict")
    lines = write(tmp_path / "c.jsonl", b"\n".join([ELEMENT, odd, ELEMENT]))
    assert (ranking.counts == rank(folder, "--input", lines, "--strict").counts).all()


@pytest.mark.parametrize("chunk_bytes", [8, 70, 1 << 20])
@pytest.mark.parametrize("length", [70, 3000])
def test_endless_element_is_skipped_in_bounded_memory(
    folder, tmp_path, monkeypatch, capsys, chunk_bytes, length
):
    monkeypatch.setattr(chunk, "MAX_RECORD_BYTES", 64)
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    long = b'{"text": "%s"}' % (b"x" * length)
    path = write(tmp_path / "c.json", b"[%s, %s, 7, %s]" % (ELEMENT, long, ELEMENT))
    check_counts(rank(folder, "--input", path), TEXTS[:1] * 2)
    report = f"skipped 2 broken records; the first at {path}: element 2: longer than 64 bytes"
    assert report in capsys.readouterr().err
    assert max(map(len, content_of(list(read_chunks([path], None))))) <= 64


@pytest.mark.parametrize("data", [b"[]", b" [ \n]\n", b"", b" \n"], ids=repr)
def test_file_without_elements_has_no_text(folder, tmp_path, data):
    path = write(tmp_path / "c.json", data)
    with pytest.raises(RankingError, match="no text"):
        rank(folder, "--input", path)


@pytest.mark.parametrize("data", [b"[", b"[%s] x", b"[%s]" + b" \n" * 200 + b"x" + b" " * 300])
def test_all_bytes_are_read_whatever_they_say(tmp_path, monkeypatch, data):
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 64)
    for suffix, compress in STORE.items():
        stored = compress(data.replace(b"%s", ELEMENT))
        path = write(tmp_path / f"c.json{suffix}", stored[: len(stored) - 4 if suffix else None])
        chunks = list(read_chunks([path], None))
        assert sum(c.bytes_read for c in chunks) == path.stat().st_size
        assert [c.broken.archives for c in chunks if c.broken] == [int(bool(suffix))]


def test_comma_behind_the_last_element_is_passed_over(folder, tmp_path):
    path = write(tmp_path / "c.json", b"[%s, %s,\n]" % (ELEMENT, ELEMENT))
    check_counts(rank(folder, "--input", path, "--strict"), TEXTS[:1] * 2)


def test_lines_of_objects_stay_lines(folder, tmp_path):
    path = write(tmp_path / "c.json", b"\n" + ELEMENT + b"\n" + ELEMENT + b"\n")
    check_counts(rank(folder, "--input", path, "--strict"), TEXTS[:1] * 2)
