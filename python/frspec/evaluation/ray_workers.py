"""Workers of a Ray cluster: one per GPU, or, where there is none, one per machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from .. import _core
from ..errors import EvaluationError, FrspecError
from .schedule import Reply
from .worker import Job, Setup, Worker


class RayWorkers:
    """An actor for each GPU of the cluster. Without a GPU: `cpu_workers` actors that share the
    CPUs, by default one a machine.

    RAY_ADDRESS names a cluster; without it Ray starts on this machine. Model, drafter and ranking
    must be at the same paths (or hub ids) everywhere.
    """

    def __init__(self, setup: Setup, cpu_workers: int | None = None):
        self._ray = ray = _import_ray()
        self._started = not ray.is_initialized()
        if self._started:
            _start(ray)
        self._actors: dict[int, Any] = {}
        self._running: dict[Any, int] = {}  # object reference to worker
        try:
            self._make_actors(setup, cpu_workers)
        except BaseException:
            self.close()
            raise

    def _make_actors(self, setup: Setup, cpu_workers: int | None) -> None:
        ray = self._ray
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = sum(int(node.get("GPU", 0)) for node in nodes)
        if gpus and setup.machine["device"] != "cpu":
            if not any(
                device["name"] == "cuda" and device["available"] for device in _core.devices()
            ):
                raise EvaluationError(
                    f"--workers ray: the cluster has {gpus} GPUs and this machine, which plans the"
                    " run, has none: expected a GPU here too, or --device cpu"
                )
            # Ray lets each actor see its own GPU only.
            setups, options = [setup.on(device="cuda")] * gpus, {"num_gpus": 1}
        else:
            cpus = sum(int(node.get("CPU", 0)) for node in nodes)
            count = cpu_workers or len(nodes)
            if count > cpus:
                raise EvaluationError(f"--workers ray:{count}: the cluster has {cpus} CPUs")
            threads = setup.machine["threads"] or cpus // count
            setups, options = [setup.on(threads=threads)] * count, {}
        options |= {"num_cpus": 1, "max_restarts": 0, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(**options)(_Actor)
        self._actors = {number: actor.remote(own) for number, own in enumerate(setups)}

    def alive(self) -> Sequence[Hashable]:
        return list(self._actors)

    def send(self, worker: Hashable, job: Job) -> None:
        self._running[self._actors[worker].run.remote(job)] = worker

    def wait(self) -> Iterable[Reply]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        return [self._receive(reference) for reference in ready]

    def close(self) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
                self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _receive(self, reference: Any) -> Reply:
        worker = self._running.pop(reference)
        try:
            records, error = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as death:
            del self._actors[worker]
            return Reply(worker, death=" ".join(str(death).split())[:200])
        except self._ray.exceptions.RayError as error:
            return Reply(worker, error=EvaluationError(f"Ray: {str(error).splitlines()[0]}"))
        return Reply(worker, records=records, error=error)


class _Actor:
    def __init__(self, setup: Setup):
        self._worker = Worker(setup)

    def run(self, job: Job) -> tuple[list | None, Exception | None]:
        try:
            return self._worker.run(job), None
        except FrspecError as error:
            return None, error


def _start(ray) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it reports to its makers otherwise
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS"),
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
    except Exception as error:  # Ray raises its own types, ValueError and ConnectionError
        raise EvaluationError(f"Ray cannot start: {' '.join(str(error).split())}") from None


def _import_ray():
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise EvaluationError(
            "--workers ray needs Ray, which is not installed: pip install 'frspec[ray]'"
        ) from None
    return ray
