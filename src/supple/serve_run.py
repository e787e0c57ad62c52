"""One `supple serve` for a person: the service, what is told while it runs, what may be asked of it
from another terminal, and its end."""

import asyncio
import contextlib
import dataclasses
import functools
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, final

from supple.cluster import ingress, serving
from supple.cluster.control import ControlServer
from supple.core.latency import LatencyPoint, LatencyProfile
from supple.core.serve_spec import ServeSpec, refuse_impossible
from supple.core.spec import SpecError

_LOOK_EVERY_S: Final = 1.0


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
    try:
        serving.refuse_no_capacity(spec)
        deployment = serving.deployment_of(spec, weights=weights, profile=profile)
        serving.deploy(deployment)
        points = serving.profile_of(spec.name)
        if points:
            refuse_impossible(spec.slo, LatencyProfile(points=tuple(points), startup_s=0.0))
        url = f"http://{_shown(spec.host)}:{spec.port}"
        _tell(f"supple: {spec.name} is served at {url}/v2/models/{spec.name}/infer, {spec.slo}")
        _tell(f"  pages        {url}/docs, {url}/metrics")
        if spec.grpc_port is not None:
            _tell(f"  gRPC         {_shown(spec.host)}:{spec.grpc_port}")
        if on_ready is not None:
            on_ready(url)
        asyncio.run(_Service(spec, deployment, weights, follow).until_stopped())
        if on_measured is not None and serving.num_running(spec.name):
            on_measured(serving.profile_of(spec.name))
    finally:
        serving.shut_down()


@final
class _Service:
    """The running service, as another terminal may ask about it."""

    def __init__(
        self,
        spec: ServeSpec,
        deployment: serving.Deployment,
        weights: str | None,
        follow: str | None,
    ) -> None:
        self._spec = spec
        self._deployment = deployment
        self._weights = weights
        self._follow = follow
        self._tried = weights
        self._stopped = asyncio.Event()
        self._update: asyncio.Task[None] | None = None
        self._update_said = "none was asked for"
        self._num_running = 0
        # Ray Serve's client is not made for two threads: it changes pickling while it deploys.
        self._ray = ThreadPoolExecutor(1, thread_name_prefix="ray-serve")

    async def until_stopped(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stopped.set)
        control = ControlServer(self._spec.name, self._answer)
        await control.start()
        try:
            while not self._stopped.is_set():
                await self._look()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopped.wait(), _LOOK_EVERY_S)
        finally:
            if self._update is not None:
                await asyncio.wait([self._update])
            await control.stop()
            self._ray.shutdown()
            _tell(f"supple: {self._spec.name} stops; requests in flight are answered")

    async def _look(self) -> None:
        loop = asyncio.get_running_loop()
        count = await loop.run_in_executor(self._ray, serving.num_running, self._spec.name)
        if count != self._num_running:
            _tell(f"  replicas     {self._num_running} -> {count}")
        self._num_running = count
        if self._follow is not None and (self._update is None or self._update.done()):
            newest = _newest(self._follow)
            if newest not in (None, self._tried):
                self._tried = newest
                self._start_update(newest)

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["ask"]:
            case "status":
                return self._status()
            case "stop":
                self._stopped.set()
                return {"accepted": True}
            case "update":
                return self._start_update(request.get("weights"))
            case other:
                raise SpecError(
                    f"a service is not asked to {other}; it takes status, update and stop."
                )

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
            "update": self._update_said,
        }

    def _start_update(self, weights: str | None) -> dict[str, Any]:
        if self._update is not None and not self._update.done():
            raise SpecError(f"{self._spec.name} is being updated; ask again when that is done.")
        self._update_said = "running"
        self._update = asyncio.ensure_future(self._do_update(weights))
        return {"accepted": weights or "the model's file, read again"}

    async def _do_update(self, weights: str | None) -> None:
        revision = self._deployment.revision + (weights is None)
        wanted = dataclasses.replace(self._deployment, revision=revision)
        deploy = functools.partial(serving.deploy, wanted, weights=weights or self._weights)
        try:
            await asyncio.get_running_loop().run_in_executor(self._ray, deploy)
        except Exception as error:  # the service goes on, whatever became of the update
            self._update_said = f"failed: {error}"
            _tell(f"supple: the update failed, what ran before goes on:\n{error}")
            return
        self._deployment, self._weights = wanted, weights or self._weights
        self._update_said = "done"
        _tell(f"  updated      revision {revision}, {weights or self._spec.target}")


def _newest(run: str) -> str | None:
    """The checkpoint a training job saved last; None while there is none."""
    from supple.train import published  # torch comes with it, and only who follows needs it

    try:
        return str(published.newest(run).resolve())
    except published.CheckpointError:
        return None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
