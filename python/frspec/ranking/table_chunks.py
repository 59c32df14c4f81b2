"""Chunks of tables: Parquet files, and data sets of the Hugging Face hub as streams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HubError, RankingError, first_line
from ..hub import TIMEOUT_SECONDS
from . import chunk
from .chunk import Chunk, TableChunk
from .records import KNOWN_FIELDS, reason

HUB_PREFIX = "hf://"

_HUB_DATASET = re.compile(
    r"hf://(?P<name>[^/@:\s]+/[^/@:\s]+)(@(?P<revision>[^/:\s]+))?(:(?P<config>[^/\s]+))?"
    r"(/(?P<split>[^/\s]+))?"
)
# Rows that are read at once; a chunk has as many of these batches as it takes to fill it.
BATCH_ROWS = 256


@dataclass(frozen=True)
class HubDataset:
    """A split of a data set on the hub, written hf://owner/name[@revision][:config][/split]."""

    text: str
    name: str
    revision: str | None
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> HubDataset:
        """RankingError for what does not read like one."""
        match = _HUB_DATASET.fullmatch(text)
        if match is None:
            raise RankingError(
                f"{text}: expected hf://owner/name[@revision][:config][/split] for a data set"
            )
        return cls(text, **match.groupdict() | {"split": match["split"] or "train"})

    def __str__(self) -> str:
        return self.text


def parquet_chunks(path: Path, field: str | None, at: dict[str, Any] | None) -> Iterator[Chunk]:
    """Chunks of a Parquet file. at: {"row": rows} before the first one."""
    parquet, errors = import_parquet(path)
    row = (at or {"row": 0})["row"]
    try:
        file = parquet.ParquetFile(path)
        columns = _columns(str(path), file.schema_arrow.names, field)
        total, size = file.metadata.num_rows, path.stat().st_size
        for table in _gather(_batches_behind(file, row, columns)):
            first, row = row + 1, row + table.num_rows
            # Compressed bytes of a row are not known: its share of the file stands for them.
            read = size * row // total - size * (first - 1) // total
            yield TableChunk(
                where=str(path), content=table, first=first, at={"row": row}, bytes_read=read
            )
    except (errors.ArrowException, OSError) as error:
        raise RankingError(f"{path}: cannot be read as Parquet: {reason(error)}") from None


def import_parquet(path: Path):
    """pyarrow.parquet and pyarrow; RankingError when they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RankingError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'frspec[parquet]'"
        ) from None
    return pyarrow.parquet, pyarrow


def dataset_chunks(
    source: HubDataset, field: str | None, at: dict[str, Any] | None
) -> Iterator[Chunk]:
    """Chunks of a data set on the hub. at: {"row": rows, "state": the stream's own}."""
    row = (at or {"row": 0})["row"]
    dataset = open_stream(source).with_format("arrow")
    try:
        if at is not None:
            dataset.load_state_dict(at["state"])
        tables = dataset.iter(batch_size=BATCH_ROWS)
        texts = (t.select(_columns(source.text, t.column_names, field)) for t in tables)
        for table in _gather(texts):
            first, row = row + 1, row + table.num_rows
            at = {"row": row, "state": dataset.state_dict()}
            yield TableChunk(where=source.text, content=table, first=first, at=at)
    except RankingError:
        raise
    # The hub's client, its HTTP library and the formats' readers each raise types of their own.
    except Exception as error:
        raise HubError(
            f"{source}: cannot be read behind record {row}: {first_line(error)}"
        ) from None


def open_stream(source: HubDataset):
    """The data set as a `datasets.IterableDataset`; HubError when it cannot be had."""
    import huggingface_hub

    datasets = import_datasets(source)
    try:
        # Asked first because this call takes a timeout and does not try for half a minute.
        huggingface_hub.HfApi().dataset_info(
            source.name, revision=source.revision, timeout=TIMEOUT_SECONDS
        )
        return datasets.load_dataset(
            source.name,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
    except Exception as error:
        raise HubError(f"{source}: cannot be opened on the hub: {first_line(error)}") from None


def import_datasets(source: HubDataset):
    """The library; RankingError when it is missing."""
    try:
        import datasets
    except ImportError:
        raise RankingError(
            f"{source}: needs datasets, which is not installed: pip install 'frspec[datasets]'"
        ) from None
    return datasets


def _batches_behind(file, row: int, columns: list[str]) -> Iterator:
    """Tables of a Parquet file behind its first `row` rows; row groups before it are not read."""
    import pyarrow

    start = 0  # the first row of a group
    for number in range(file.metadata.num_row_groups):
        skip = max(row - start, 0)
        start += file.metadata.row_group(number).num_rows
        if row >= start:
            continue
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[number], columns=columns):
            if skip < batch.num_rows:
                yield pyarrow.Table.from_batches([batch.slice(skip)])
            skip = max(skip - batch.num_rows, 0)


def _gather(tables: Iterable) -> Iterator:
    """Tables of CHUNK_BYTES or a little more, out of smaller ones."""
    import pyarrow

    gathered: list = []
    for table in tables:
        gathered.append(table)
        if sum(table.nbytes for table in gathered) >= chunk.CHUNK_BYTES:
            yield pyarrow.concat_tables(gathered, promote_options="default")
            gathered = []
    if gathered:
        yield pyarrow.concat_tables(gathered, promote_options="default")


def _columns(where: str, columns: Sequence[str], field: str | None) -> list[str]:
    """The columns that hold the texts, and the task of an evaluation."""
    known = [field.split(".")[0]] if field else list(KNOWN_FIELDS)
    wanted = [name for name in known if name in columns]
    if not wanted:
        raise RankingError(
            f"{where}: expected a column {' or '.join(known)}, found {', '.join(columns)}"
        )
    return [*wanted, *({"task"} & set(columns) - set(wanted))]
