"""One `supple serve` for a person: the service, its printed lines, the requests that it takes from
other terminals, and its end."""

import asyncio
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, final

from supple.cluster.services import ingress
from supple.cluster.services import service as serving
from supple.control.patience import OneThread
from supple.control.socket import ControlServer
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.spec import ServeSpec, refuse_impossible
from supple.core.spec import SpecError

_LOOK_EVERY_S: Final = 1.0
_SLOW_ANSWER_S: Final = 10.0
"""Seconds without an answer from Ray Serve's controller after which that is reported."""
_LEAST_PATIENCE_S: Final = 60.0
_PATIENCE_TIMES: Final = 5.0
"""A new version may take so many times as long to start as the first did."""
_OUTCOMES_KEPT: Final = 16
"""Updates whose outcome can still be requested."""


def run(
    spec: ServeSpec,
    *,
    weights: str | None = None,
    follow: str | None = None,
    profile: LatencyProfile | None = None,
    on_ready: Callable[[str], None] | None = None,
    on_measured: Callable[[Sequence[LatencyPoint]], object] | None = None,
) -> None:
    """Serve until SIGINT, SIGTERM or `supple stop`; requests in flight are answered first.

    `follow` is a run of `supple train` whose next checkpoints are swapped in as they are saved.
    `profile` is what is known of the model already. `on_ready` is handed the service's URL,
    `on_measured` at the end the batches of the last replicas. Raises `SpecError` if the promise
    cannot be kept by any number of replicas, and `ModelFault` if the model cannot be loaded.
    """
    spec = dataclasses.replace(
        spec,
        port=spec.port or ingress.free_port(),
        grpc_port=ingress.free_port() if spec.grpc_port == 0 else spec.grpc_port,
    )
    ingress.connect(spec)
    # Ray's own handler ends the process at once, and its HAProxy would outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    answers = True
    try:
        deployment = serving.deployment_of(spec, weights=weights, profile=profile)
        began_s = time.monotonic()
        serving.deploy(deployment)
        started_s = time.monotonic() - began_s
        points = serving.profile_of(spec.name)
        if points:
            refuse_impossible(spec.slo, LatencyProfile(points=tuple(points), startup_s=0.0))
        url = f"http://{_shown(spec.host)}:{spec.port}"
        _print(f"supple: {spec.name} is served at {url}/v2/models/{spec.name}/infer, {spec.slo}")
        _print(f"  pages        {url}/docs, {url}/metrics")
        if spec.grpc_port is not None:
            _print(f"  gRPC         {_shown(spec.host)}:{spec.grpc_port}")
        if on_ready is not None:
            on_ready(url)
        patience_s = max(_LEAST_PATIENCE_S, _PATIENCE_TIMES * started_s)
        answers = asyncio.run(_Service(spec, deployment, follow, patience_s).until_stopped())
        if on_measured is not None and answers and serving.num_running(spec.name):
            on_measured(serving.profile_of(spec.name))
    finally:
        if not answers:
            _print("supple: Ray Serve's controller does not answer: ended without waiting for it")
        serving.shut_down(spec.name, wait=answers)


@final
class _Service:
    """The running service, as another terminal sees it."""

    def __init__(
        self,
        spec: ServeSpec,
        deployment: serving.Deployment,
        follow: str | None,
        patience_s: float,
    ) -> None:
        self._spec = spec
        self._deployment = deployment
        self._follow = follow
        self._patience_s = patience_s
        self._tried = deployment.weights
        self._stopped = asyncio.Event()
        self._update: asyncio.Task[None] | None = None
        self._update_number = 0
        self._outcomes = {0: "none was requested"}
        self._num_running = 0
        # Ray Serve's client is not made for two threads: it changes pickling while it deploys.
        self._ray = OneThread("ray-serve")

    async def until_stopped(self) -> bool:
        """Does Ray Serve's controller answer at the end?"""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopped.set)
        control = ControlServer(self._spec.name, self._answer)
        await control.start()
        looking = asyncio.ensure_future(self._look())
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            while not stopped.done():
                await asyncio.wait({stopped}, timeout=_LOOK_EVERY_S)
                if looking.done():
                    looking.result()
                    looking = asyncio.ensure_future(self._look())
            if self._update is not None:
                self._update.cancel()
                await asyncio.wait([self._update], timeout=_SLOW_ANSWER_S)
            await asyncio.wait({looking}, timeout=_SLOW_ANSWER_S)
            return looking.done()
        finally:
            looking.cancel()
            await control.stop()
            _print(f"supple: {self._spec.name} stops; requests in flight are answered")

    async def _look(self) -> None:
        answer = asyncio.ensure_future(
            self._ray.call(partial(serving.num_running, self._spec.name))
        )
        await asyncio.wait({answer}, timeout=_SLOW_ANSWER_S)
        if not answer.done():
            _print(
                f"supple: Ray Serve's controller has not answered for {_SLOW_ANSWER_S:.0f} s. "
                "Replicas that run go on; none is started, updated or replaced until it answers."
            )
        count = await answer
        if count != self._num_running:
            _print(f"  replicas     {self._num_running} -> {count}")
        self._num_running = count
        if self._follow is not None and (self._update is None or self._update.done()):
            newest = _newest(self._follow)
            if newest not in (None, self._tried):
                self._tried = newest
                self._start_update(newest, None)

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["ask"]:
            case "status":
                return self._status()
            case "stop":
                self._stopped.set()
                return {"accepted": True}
            case "update":
                return self._start_update(request.get("weights"), request.get("patience_s"))
            case "outcome":
                return {"outcome": self._outcomes.get(request["number"], "forgotten")}
            case other:
                raise SpecError(f"a service cannot {other}; it takes status, update and stop.")

    def _status(self) -> dict[str, Any]:
        members = [f"replica {index + 1}" for index in range(self._num_running)]
        return {
            "job": self._spec.name,
            "phase": "serving",
            "progress": None,
            "generation": self._deployment.revision,
            "members": members,
            "pids": {},
            "slo": str(self._spec.slo),
            "update": self._outcomes[self._update_number],
        }

    def _start_update(self, weights: str | None, patience_s: float | None) -> dict[str, Any]:
        if self._update is not None and not self._update.done():
            raise SpecError(f"{self._spec.name} is being updated; try again when that is done.")
        self._update_number += 1
        self._outcomes.pop(self._update_number - _OUTCOMES_KEPT, None)
        self._outcomes[self._update_number] = "running"
        self._update = asyncio.ensure_future(
            self._do_update(weights, patience_s or self._patience_s)
        )
        return {
            "accepted": weights or "the model's file, read again",
            "number": self._update_number,
        }

    async def _do_update(self, weights: str | None, patience_s: float) -> None:
        before = self._deployment
        try:
            wanted = dataclasses.replace(
                self._wanted(weights), weights=weights or before.weights, patience_s=patience_s
            )
            await self._steps(serving.updating(wanted, before))
        except asyncio.CancelledError:
            self._outcomes[self._update_number] = "failed: the service was stopped meanwhile"
            raise
        except Exception as error:  # the service goes on, whatever became of the update
            self._outcomes[self._update_number] = f"failed: {error}"
            _print(f"supple: the update failed, what ran before goes on:\n{error}")
            return
        self._deployment = wanted
        self._outcomes[self._update_number] = "done"
        _print(f"  updated      revision {wanted.revision}, {weights or self._spec.target}")

    def _wanted(self, weights: str | None) -> serving.Deployment:
        """What runs, or what the model's file makes of it now if no other weights are named."""
        if weights is not None:
            return self._deployment
        fresh = serving.deployment_of(self._spec)
        return dataclasses.replace(
            self._deployment, source=fresh.source, revision=self._deployment.revision + 1
        )

    async def _steps(self, steps: Iterator[None]) -> None:
        """Go through `steps`, each in the one thread that speaks to Ray Serve."""
        try:
            while await self._ray.call(partial(_goes_on, steps)):
                await asyncio.sleep(serving.LOOK_EVERY_S)
        finally:
            await self._ray.call(steps.close)  # type: ignore[attr-defined]


def _goes_on(steps: Iterator[None]) -> bool:
    for _ in steps:
        return True
    return False


def _newest(run: str) -> str | None:
    """The checkpoint a training job saved last; None while there is none."""
    from supple.train.checkpoint import published

    try:
        return str(published.newest(run).resolve())
    except published.CheckpointError:
        return None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
