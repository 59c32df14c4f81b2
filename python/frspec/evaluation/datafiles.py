"""Records of a data file: JSON lines (plain or gzip) or Parquet, on disk or on the hub."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import EvaluationError, HubError, first_line
from ..files import user_path

_HUB_FILE = re.compile(r"([^/\\~.\s:][^/\\\s:]*/[^/\\\s:]+):(\S+)")


def data_file(source: str) -> Path:
    """The file of `source`: a path, or "owner/name:path" for a file of a dataset on the hub."""
    path = user_path(source)
    if path.is_file():
        return path
    match = _HUB_FILE.fullmatch(source)
    if match is None:
        raise EvaluationError(
            f"{source}: no such file (and not a file of the hub, which reads owner/name:path)"
        )
    import huggingface_hub

    hub_id, name = match.groups()
    try:
        return Path(huggingface_hub.hf_hub_download(hub_id, name, repo_type="dataset"))
    # huggingface_hub raises its own types, those of its HTTP library and plain OSError.
    except Exception as error:
        raise HubError(f"{source}: cannot be fetched from the hub: {first_line(error)}") from None


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, record) of every record; EvaluationError for what is no record."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        opened = gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        with opened as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield f"{path}:{number}", _parse(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(f"{path}: cannot be read: {error}") from None


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: expected a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise EvaluationError(f"{where}: expected a JSON object, found {type(record).__name__}")
    return record


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise EvaluationError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install 'frspec[parquet]'"
        ) from None
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise EvaluationError(f"{path}: cannot be read as Parquet: {error}") from None
    for number, record in enumerate(records, 1):
        yield f"{path}:{number}", record
