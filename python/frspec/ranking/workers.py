"""Chunks over processes.

The tokenizers library has threads of its own, and what surrounds it (reading, parsing, taking the
ids out) has one. With several processes each has one thread of the library and its own share of
the rest; this process only reads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ..errors import RankingError
from ..tokenizer import Tokenizer
from .chunk import Chunk
from .count import ChunkCount, count_chunk

# Chunks that wait for each worker, so that none is idle while this process reads.
_WAITING = 3

_tokenizer: Tokenizer  # of a worker


def count_in_processes(
    chunks: Iterable[Chunk], folder: Path, text_field: str | None, processes: int
) -> Iterator[tuple[Chunk, ChunkCount]]:
    """Each chunk and its counts, in order. folder: of the tokenizer."""
    executor = ProcessPoolExecutor(
        processes,
        # A fork would share the locks of the library's threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(folder,),
    )
    waiting: deque = deque()
    try:
        for chunk in chunks:
            with _without_interrupts():
                waiting.append((chunk, executor.submit(_count, chunk, text_field)))
            if len(waiting) >= _WAITING * processes:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise RankingError(
            f"one of {processes} worker processes died (killed, perhaps because memory ran out);"
            " no ranking was written"
        ) from None
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _begin(folder: Path) -> None:
    global _tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.load(folder)


def _count(chunk: Chunk, text_field: str | None) -> ChunkCount:
    return count_chunk(_tokenizer, chunk, text_field)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for its next chunk forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is for this process: workers, which begin in here, inherit that it is blocked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
