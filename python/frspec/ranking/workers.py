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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ..errors import RankingError
from ..tokenizer import Tokenizer
from .chunk import Chunk
from .count import ChunkCount, count_chunk

# Chunks that wait for each worker, so that none is idle while this process reads.
_WAITING = 3
# Times that workers may die one after the other without a chunk that is counted meanwhile: then it
# is the chunk, or the machine.
_MAX_DEATHS = 3

_tokenizer: Tokenizer  # of a worker


def count_in_processes(
    chunks: Iterable[Chunk],
    folder: Path,
    text_field: str | None,
    processes: int,
    report: Callable[[str], None],
) -> Iterator[tuple[Chunk, ChunkCount]]:
    """Each chunk and its counts, in order. folder: of the tokenizer.

    What a worker that dies had not counted is counted by new ones; report takes a line about it.
    RankingError when they die, too.
    """
    pool = _Pool(folder, text_field, processes, report)
    try:
        for chunk in chunks:
            pool.send(chunk)
            if len(pool.waiting) >= _WAITING * processes:
                yield pool.receive()
        while pool.waiting:
            yield pool.receive()
    finally:
        pool.executor.shutdown(wait=False, cancel_futures=True)


class _Pool:
    """Worker processes, and the chunks that were sent to them and not received, in order."""

    def __init__(
        self, folder: Path, text_field: str | None, processes: int, report: Callable[[str], None]
    ):
        self.waiting: deque[tuple[Chunk, Future[ChunkCount] | None]] = deque()
        self._folder, self._text_field, self._processes = folder, text_field, processes
        self._report = report
        self._deaths = 0
        self._reason: Exception | None = None  # of the latest death, where the library gave one
        self._start()

    def send(self, chunk: Chunk) -> None:
        self.waiting.append((chunk, self._submit(chunk)))

    def receive(self) -> tuple[Chunk, ChunkCount]:
        """The first of the waiting chunks, counted."""
        while True:
            chunk, future = self.waiting[0]
            try:
                found = future.result() if future is not None else None
            except BrokenProcessPool as error:
                self._reason = error
                found = None
            if found is not None:
                self.waiting.popleft()
                self._deaths = 0
                return chunk, found
            self._replace_workers()

    def _start(self) -> None:
        self.executor = ProcessPoolExecutor(
            self._processes,
            # A fork would share the locks of the library's threads.
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin,
            initargs=(self._folder,),
        )

    def _submit(self, chunk: Chunk) -> Future[ChunkCount] | None:
        """None when a worker has died or cannot be started."""
        try:
            with _without_interrupts():
                return self.executor.submit(_count, chunk, self._text_field)
        except (BrokenProcessPool, OSError, ValueError) as error:
            # The latter two where no process can be had, and where a worker dies while another is
            # being started: then the library closes under its own hands what that one needs.
            self._reason = error
            return None

    def _replace_workers(self) -> None:
        """One dead worker ends all of an executor's."""
        self._deaths += 1
        self.executor.shutdown(wait=False, cancel_futures=True)  # those that are well have chunks
        why = "a worker process died or did not start (perhaps because memory ran out)"
        if self._deaths >= _MAX_DEATHS:
            raise RankingError(
                f"{why}, {self._deaths} times at the same place; use fewer --processes. No ranking"
                " was written"
            ) from self._reason
        self._report(f"{why}; {self._processes} new ones count what it had")
        self._start()
        self.waiting = deque(
            (chunk, future if _is_done(future) else self._submit(chunk))
            for chunk, future in self.waiting
        )


def _is_done(future: Future[ChunkCount] | None) -> bool:
    return (
        future is not None
        and future.done()
        and not future.cancelled()
        and future.exception() is None
    )


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
