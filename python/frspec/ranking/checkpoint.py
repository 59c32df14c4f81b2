"""The checkpoint of a run of counting: a safetensors file, written whole or not at all.

counts     int64 [vocab_size]   occurrences by token id, up to the position
metadata   format "frspec-checkpoint", version "1", and as JSON: configuration (what the counts
           depend on), position, broken, bytes_read
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ..errors import RankingError
from ..files import write_whole
from .chunk import Position
from .count import Tally
from .records import Broken

FORMAT = "frspec-checkpoint"
VERSION = "1"
INTERVAL_SECONDS = 30.0


class RunCheckpoint:
    """A file that an interrupted run goes on from.

    configuration: what the counts depend on, by the name that a person knows it by.
    """

    def __init__(self, path: Path, configuration: Mapping[str, Any]):
        self.path = path
        self._configuration = dict(configuration)
        self._saved_s = time.monotonic()

    def load(self, vocab_size: int) -> Tally:
        """What was counted, an empty tally without a file. RankingError for a file of another
        configuration, or one that is no checkpoint."""
        if not self.path.exists():
            return Tally.empty(vocab_size)
        try:
            with safetensors.safe_open(self.path, framework="np") as file:
                metadata = file.metadata() or {}
                for name, expected in (("format", FORMAT), ("version", VERSION)):
                    if metadata.get(name) != expected:
                        raise RankingError(
                            f"{self.path}: {name}: expected {expected!r}, found"
                            f" {metadata.get(name)!r}"
                        )
                counts = file.get_tensor("counts")
            values = {name: json.loads(metadata[name]) for name in _VALUES}
            self._check(values["configuration"])
            tally = Tally(
                counts,
                int(counts.sum()),
                Position(**values["position"]),
                Broken(**values["broken"]),
                values["bytes_read"],
            )
        except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise RankingError(f"{self.path}: not a checkpoint: {error}") from None
        if counts.shape != (vocab_size,) or counts.dtype != np.int64:
            raise RankingError(
                f"{self.path}: counts: expected int64 [{vocab_size}], found {counts.dtype}"
                f" {list(counts.shape)}"
            )
        return tally

    def save(self, tally: Tally) -> None:
        values = {
            "configuration": self._configuration,
            "position": dataclasses.asdict(tally.position),
            "broken": dataclasses.asdict(tally.broken),
            "bytes_read": tally.bytes_read,
        }
        metadata = {name: json.dumps(value) for name, value in values.items()}
        data = safetensors.numpy.save(
            {"counts": tally.counts}, {"format": FORMAT, "version": VERSION} | metadata
        )
        try:
            write_whole(self.path, data)
        except OSError as error:
            raise RankingError(f"{self.path}: cannot be written: {error.strerror}") from None
        self._saved_s = time.monotonic()

    def save_when_due(self, tally: Tally) -> None:
        """Saves every INTERVAL_SECONDS."""
        if time.monotonic() - self._saved_s >= INTERVAL_SECONDS:
            self.save(tally)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _check(self, found: Mapping[str, Any]) -> None:
        for name, now in self._configuration.items():
            was = found.get(name)
            if was != now:
                raise RankingError(
                    f"{self.path}: checkpoint of another run: {name} was {was}, now {now}; delete"
                    " it or use another --checkpoint"
                )


_VALUES = ("configuration", "position", "broken", "bytes_read")
