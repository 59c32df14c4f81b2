"""Questions over workers: each job is done once, whoever dies meanwhile."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Protocol

from ..errors import EvaluationError, FrspecError
from .results import Record
from .worker import Job, Setup, Worker

# Jobs that end this many workers are left out: it is they, not the workers.
MAX_DEATHS = 2


@dataclasses.dataclass(frozen=True)
class Reply:
    """What became of a worker's job: records, an error of it, or why the worker is no more."""

    worker: Hashable
    records: list[Record] | None = None
    error: Exception | None = None
    death: str | None = None


class Workers(Protocol):
    """Workers that take one job at a time."""

    def alive(self) -> Sequence[Hashable]: ...

    def send(self, worker: Hashable, job: Job) -> None: ...

    def wait(self) -> Iterable[Reply]:
        """Replies of workers that were sent a job, and of any that died; waits for one at least."""
        ...

    def close(self) -> None: ...


class InlineWorker:
    """The one worker that is this process."""

    def __init__(self, setup: Setup):
        self._worker = Worker(setup)
        self._job: Job | None = None

    def alive(self) -> Sequence[Hashable]:
        return [0]

    def send(self, worker: Hashable, job: Job) -> None:
        self._job = job

    def wait(self) -> Iterable[Reply]:
        job, self._job = self._job, None
        try:
            return [Reply(0, records=self._worker.run(job))]
        except FrspecError as error:
            return [Reply(0, error=error)]

    def close(self) -> None:
        pass


def run_jobs(
    workers: Workers,
    jobs: Iterable[Job],
    done: Callable[[Job, list[Record]], None],
    report: Callable[[str], None],
) -> list[Job]:
    """Runs all jobs; calls `done` with the records of each, once. Returns the jobs left out.

    report: takes a line about a worker that died. EvaluationError when no worker is left; an error
    of a job ends all of it.
    """
    waiting = deque(jobs)
    running: dict[Hashable, Job] = {}
    deaths: dict[Job, int] = {}
    left_out: list[Job] = []
    reasons = ""
    while waiting or running:
        for worker in workers.alive():
            if waiting and worker not in running:
                running[worker] = waiting.popleft()
                workers.send(worker, running[worker])
        if not running:
            raise EvaluationError(
                f"every worker has died ({reasons or 'there was none'}); {len(waiting)} jobs are"
                " left, and the same command goes on with them"
            )
        for reply in workers.wait():
            job = running.pop(reply.worker, None)
            if job is None:
                reasons = reply.death or "no reason known"
                report(f"worker {reply.worker} died ({reasons}) between two jobs")
                continue
            if reply.error is not None:
                raise reply.error
            if reply.records is not None:
                done(job, reply.records)
                continue
            reasons = reply.death or "no reason known"
            where = f"{job.question.task} {job.question.question_id}"
            deaths[job] = deaths.get(job, 0) + 1
            if deaths[job] < MAX_DEATHS:
                waiting.appendleft(job)
                report(f"worker {reply.worker} died ({reasons}); {where} goes to another")
            else:
                left_out.append(job)
                report(f"worker {reply.worker} died ({reasons}); {where} is left out")
    return left_out
