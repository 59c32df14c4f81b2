"""Workers in processes of this machine: each has its generators, and its GPU if any."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Hashable, Iterable, Sequence

from .. import _core
from ..errors import DeviceError, EvaluationError, FrspecError
from ..generator import plan_engine
from .schedule import Reply
from .worker import Job, Setup, Worker


class ProcessWorkers:
    """`count` processes. On a CPU they share the threads, on GPUs each takes the next one."""

    def __init__(self, setup: Setup, count: int):
        # A fork would share the state of the runtime's threads and of CUDA.
        context = multiprocessing.get_context("spawn")
        self._processes = {}
        self._connections = {}
        for number, own in enumerate(divide(setup, count)):
            connection, other = context.Pipe()
            process = context.Process(target=_serve, args=(other, own), daemon=True)
            process.start()
            other.close()
            self._processes[number], self._connections[number] = process, connection

    def alive(self) -> Sequence[Hashable]:
        return list(self._connections)

    def send(self, worker: Hashable, job: Job) -> None:
        try:
            self._connections[worker].send(job)
        except OSError:
            pass  # it died idle: the end of its connection tells in wait()

    def wait(self) -> Iterable[Reply]:
        ready = multiprocessing.connection.wait(list(self._connections.values()))
        numbers = {connection: number for number, connection in self._connections.items()}
        return [self._receive(numbers[connection]) for connection in ready]

    def close(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.join(5)

    def _receive(self, number: int) -> Reply:
        try:
            records, error = self._connections[number].recv()
        except (EOFError, OSError):
            self._connections.pop(number).close()
            return Reply(number, death=self._cause(number))
        return Reply(number, records=records, error=error)

    def _cause(self, number: int) -> str:
        process = self._processes[number]
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            try:
                return f"{signal.Signals(-code).name}"
            except ValueError:
                return f"signal {-code}"
        return f"exit code {code}"


def divide(setup: Setup, count: int) -> list[Setup]:
    """The setup of each of `count` workers on this machine: its share of threads, or its GPU."""
    if setup.machine["device"].startswith("cuda:") and count > 1:
        raise EvaluationError(
            f"--workers {count}: expected --device cuda, a GPU for each, found"
            f" {setup.machine['device']}"
        )
    gpus = _gpu_count(setup, count) if setup.machine["device"] in ("cuda", "auto") else 0
    if 0 < gpus < count:
        raise EvaluationError(f"--workers {count}: found {gpus} GPUs, expected one for each")
    if gpus:
        return [setup.on(device=f"cuda:{number}") for number in range(count)]
    if setup.machine["threads"] is not None:
        return [setup] * count
    return [setup.on(threads=max(1, _core.usable_threads() // count))] * count


def _gpu_count(setup: Setup, most: int) -> int:
    """GPUs that this build can use, up to `most`."""
    for number in range(most):
        try:
            plan_engine(setup.model, device=f"cuda:{number}", dtype=setup.machine["dtype"])
        except DeviceError:
            return number
    return most


def _serve(connection, setup: Setup) -> None:
    """A worker process: jobs in, (records, error) out, until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes results
    worker = Worker(setup)
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply = (worker.run(job), None)
        except FrspecError as error:
            reply = (None, error)
        except MemoryError:
            reply = (
                None,
                EvaluationError("a worker is out of memory; use fewer --workers and another --out"),
            )
        try:
            connection.send(reply)
        except OSError:
            return
