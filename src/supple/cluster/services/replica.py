"""One replica of a service in Ray Serve: model, HTTP and gRPC surface, autoscaler reports."""

import asyncio
import logging
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from ray import serve
from ray._private import worker as ray_worker

from supple.cluster.services.scrape import replica_pages
from supple.core.service.spec import MAX_WAITING
from supple.serve.attempts import Attempts
from supple.serve.executor import Executor
from supple.serve.grpc_surface import GrpcSurface
from supple.serve.meters import Meters
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel, load_model
from supple.serve.policy import NUM_ARRIVED, NUM_WAITING, reported
from supple.serve.stopwatch import Stopwatch
from supple.serve.surface import Surface, SurfaceSettings

_SWITCH_S: Final = 0.0005
"""Thread switch interval. The predict thread takes Python's lock after every layer; with the
default of 5 ms it would wait that long each time while the event loop is busy."""
_REHEARSAL_S: Final = 1.0
"""Time a new replica spends on measuring its batches before it takes requests."""

_FINAL_SEND_S: Final = 0.25
"""Time to send the last answers before a process ends whose `predict` hangs."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """The configuration of replicas, from a `ServeSpec`; plain data."""

    target: str
    """FILE:CLASS or the path of a saved program, with an absolute path."""
    name: str
    min_replicas: int = 1
    max_replicas: int = 1
    initial_replicas: int | None = None
    """None: `min_replicas`, at least one."""
    policy: tuple[str, Mapping[str, Any]] | None = None
    """Import path and arguments of the autoscaling policy; None: always `min_replicas`."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    predict_timeout_s: float = 30.0
    within_s: float = math.inf
    """The promised latency: a request that would miss it is refused."""
    max_waiting: int = MAX_WAITING
    weights: str | None = None
    """Argument of `load(weights)`; None: `load()`."""
    source: bytes | None = None
    """Content of the file of `target`, also for later replicas, even if the file has changed. None
    for a saved program."""
    patience_s: float = 600.0
    """Timeout for loading other weights, and for the start of a replica in an update."""
    settings: SurfaceSettings = field(default_factory=SurfaceSettings)
    revision: int = 0
    """Changing it replaces every replica, one after another, even if nothing else changed."""


@final
class _Wire(bytes):
    """Bytes for a gRPC client, with the only method that Ray Serve calls on a message."""

    def SerializeToString(self) -> bytes:
        return bytes(self)


class Replica:
    """One copy of the model, with the protocol's HTTP and gRPC surface."""

    async def __init__(self, deployment: Deployment) -> None:  # type: ignore[misc]
        """Load the model and measure its batches; requests arrive after this has returned."""
        sys.setswitchinterval(_SWITCH_S)
        self._deployment = deployment
        self._weights = deployment.weights
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        model = await asyncio.to_thread(
            load_model,
            deployment.target,
            name=deployment.name,
            weights=deployment.weights,
            source=deployment.source,
        )
        replica = serve.get_replica_context().replica_id.unique_id
        self._meters = Meters(model=deployment.name, replica=replica)
        self._stopwatch = Stopwatch()
        attempts = _attempts(deployment.name)
        self._executor = Executor(
            model,
            timeout_s=deployment.predict_timeout_s,
            within_s=deployment.within_s,
            max_waiting=deployment.max_waiting,
            on_batch=self._stopwatch.record,
            attempts=attempts,
            on_stuck=_end_soon,
        )
        self._meters.watch_waiting(lambda: self._executor.num_waiting)
        tokens = deployment.settings.tokens
        headers = {"Authorization": f"Bearer {tokens[0]}"} if tokens else {}
        self._surface = Surface(
            model,
            self._executor,
            self._meters,
            deployment.settings,
            attempts=attempts,
            all_pages=lambda path: replica_pages(deployment.name, path, headers),
        )
        self._grpc = GrpcSurface(self._surface, self._meters)
        await self._rehearse(model)

    async def _rehearse(self, model: ServedModel) -> None:
        """Measure batches of 1, 2, 4 … rows of zeros; the slow first calls are done here too."""
        end_s = time.monotonic() + _REHEARSAL_S
        rows = 1
        with model.allowing_nan():
            while rows <= model.max_batch and len(model.example(rows)) == len(model.inputs) > 0:
                for _ in range(4):
                    await self._executor.submit(model.example(rows), rows, within_s=math.inf)
                if time.monotonic() > end_s:
                    break
                rows *= 2
        self._executor.on_batch = self._measure
        self._executor.on_computed = self._meters.computed

    def _measure(self, rows: int, took_s: float) -> None:
        self._meters.batch(rows, took_s)
        self._stopwatch.record(rows, took_s)

    def __serve_build_asgi_app__(self) -> Surface:
        return self._surface

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Load other weights, and swap the model between two batches. Ray calls this at the start
        and when `user_config` changes. If this raises, Ray replaces the replica."""
        weights = config["weights"]
        if weights != self._weights:
            loading = asyncio.to_thread(self._executor.model.renewed, weights)
            self._executor.model = await asyncio.wait_for(loading, config["patience_s"])
            self._weights = weights

    def check_health(self) -> None:
        """Raise `ModelFault` if the model hangs: Ray, which checks every second, then replaces the
        replica."""
        if self._surface.stuck is not None:
            raise ModelFault(self._surface.stuck)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return arrivals, queue length and measured batches for `SloPolicy`."""
        return {
            NUM_ARRIVED: float(self._meters.num_arrived),
            NUM_WAITING: float(self._executor.num_waiting),
            **reported(self._stopwatch.points()),
        }

    async def profile(self) -> dict[str, float]:
        """Return the measured batches in the format of `supple.serve.policy.reported`."""
        return reported(self._stopwatch.points())

    async def ServerLive(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ServerLive", wire, grpc_context))

    async def ServerReady(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ServerReady", wire, grpc_context))

    async def ModelReady(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ModelReady", wire, grpc_context))

    async def ServerMetadata(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ServerMetadata", wire, grpc_context))

    async def ModelMetadata(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ModelMetadata", wire, grpc_context))

    async def ModelConfig(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ModelConfig", wire, grpc_context))

    async def ModelStatistics(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ModelStatistics", wire, grpc_context))

    async def RepositoryIndex(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("RepositoryIndex", wire, grpc_context))

    async def ModelStreamInfer(
        self, requests: AsyncIterator[bytes], grpc_context: Any
    ) -> AsyncIterator[_Wire]:
        async for wire in self._grpc.stream(requests, grpc_context):
            yield _Wire(wire)

    async def ModelInfer(self, wire: bytes, grpc_context: Any) -> _Wire:
        return _Wire(await self._grpc.call("ModelInfer", wire, grpc_context))


def _attempts(name: str) -> Attempts | None:
    """Open the table shared by the service's replicas on this machine, in Ray's session folder."""
    node: Any = ray_worker._global_node
    try:
        return Attempts(Path(node.get_session_dir_path()) / f"supple-attempts-{name}")
    except OSError:
        return None  # a request that kills replicas is then resent until the ingress gives up


def _end_soon() -> None:
    """End this process, whose model hangs, after `_FINAL_SEND_S` to send the last answers. Ray
    starts another one at once, and the ingress resends the requests that wait here."""
    asyncio.get_running_loop().call_later(_FINAL_SEND_S, os._exit, 1)
