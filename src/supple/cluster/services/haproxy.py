"""What is changed in the configuration that Ray writes for HAProxy: who is heard, and how long.

Ray's template has no setting for these. They are made as a program for sed, which a script runs on
the file each time HAProxy is started with it. What each line is for is in the decision records 0009
and 0016.
"""

import hashlib
import resource
from collections.abc import Sequence
from typing import Final

from supple.core.service.spec import ServeSpec
from supple.serve.attempts import SERIAL
from supple.serve.protocol.grpc import SERVICE
from supple.serve.streams import CLIENT

HEAD_S: Final = 10
"""Time for the head of a request, from the opening of its connection."""
SILENCE_S: Final = 30
"""Time between two parts of a body; and for the whole, where it fits the ingress' buffer."""
MOST_CONNECTIONS: Final = 30_000
_OF_FILES: Final = 0.6
"""Share of a process' open files for connections of clients; the rest are to replicas."""
_OF_ONE_CLIENT: Final = 0.75
"""Share of all connections that one address may have open."""
_KEPT_BYTES: Final = 64 * 1024 * 1024
"""Bytes of buffers that a thread keeps for the next request."""
_HEALTH: Final = ("/v2/health/live", "/v2/health/ready", "/-/healthz")
_GRPC_HEALTH: Final = (
    *(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady")),
    "/ray.serve.RayServeAPIService/Healthz",
)
_RAYS_HEADERS: Final = (
    *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id"),
    *("serve_multiplexed_model_id", "serve-multiplexed-model-id"),
)
"""Ray Serve acts on them in front of the replica, and fails on one that is not UTF-8."""
EDITED: Final = "# edited by Supple"
"""The first line of a configuration that was changed: HAProxy is started with one again when it was
killed, and the changes are made once."""
NO_TOKEN: Final = "the Authorization header has no bearer token that is known"


def max_connections() -> int:
    """Connections of clients that are held open at a time."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, int(_OF_FILES * hard))


def max_connections_of_one() -> int:
    """The same of one address."""
    return int(_OF_ONE_CLIENT * max_connections())


def edits(spec: ServeSpec) -> str:
    """A program for sed that turns Ray's configuration into that of `spec`."""
    # Statistics and metrics, which Ray opens to every machine, and the socket, to every user.
    lines = [
        f"1i\\\n{EDITED}",
        "s/^\\( *bind\\) [*]\\{0,1\\}:/\\1 127.0.0.1:/",
        "s/mode 666 level admin/mode 600 level admin/",
        # The proxy requests wait in while there is no replica is never held for dead.
        "s/ check backup$/ backup/",
        # Nobody reads the log of the system.
        "/^    log 127.0.0.1:514 /d",
        _after("^    tune.bufsize ", f"tune.memory.hot-size {_KEPT_BYTES}", "no strict-limits"),
        _after(
            "^    option abortonclose$",
            f"timeout http-request {HEAD_S}s",
            "option http-ignore-probes",
        ),
    ]
    for frontend, rules in (
        ("http_frontend", _http_rules(spec)),
        ("grpc_frontend", _grpc_rules(spec)),
    ):
        bind = "^    bind "
        lines += [
            f"/^frontend {frontend}$/,/{bind}/{{",
            f"s/{bind}.*:\\([0-9][0-9]*\\)/    bind {_address(spec.host)}:\\1/",
            _after(bind, *_connection_rules(), _serial_rule(spec), *rules),
            "}",
        ]
    table = "stick-table type ipv6 size 100k expire 60s store conn_cur"
    lines.append(f"/^frontend http_frontend$/i\\\nbackend supple_clients\\\n    {table}")
    return "\n".join(lines) + "\n"


def _after(pattern: str, *added: str) -> str:
    """The command that adds lines after the one that has `pattern`."""
    return f"/{pattern}/a\\\n" + "\\\n".join(f"    {line}" for line in added)


def _address(host: str) -> str:
    if host in ("0.0.0.0", "*"):
        return "*"
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _connection_rules() -> Sequence[str]:
    return (
        "tcp-request connection track-sc0 src table supple_clients",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {max_connections_of_one()} }}",
    )


def _serial_rule(spec: ServeSpec) -> str:
    """A request that may be sent again has a number, the same whenever it is sent."""
    name = SERIAL.decode()
    if spec.retry_safe:
        return f"http-request set-header {name} %[uuid()]"
    return f"http-request del-header {name}"


def _has_token(token: str) -> str:
    """The rule's name for a request with the token, whose digest alone is in the file."""
    digest = hashlib.sha256(f"Bearer {token}".encode()).hexdigest().upper()
    return f"acl has_token req.fhdr(authorization),sha2(256),hex -m str {digest}"


def _http_rules(spec: ServeSpec) -> list[str]:
    rules: list[str] = []
    if spec.token is not None:
        rules += [
            f"acl is_open path {' '.join(_HEALTH)}",
            _has_token(spec.token),
            _answer(401, NO_TOKEN, "hdr www-authenticate Bearer") + " unless is_open or has_token",
        ]
    too_large = f"the body is too large: {spec.max_body_bytes} bytes are the most (--max-body)"
    length = "{ req.hdr_val(content-length) gt " + f"{spec.max_body_bytes} }}"
    return [
        *rules,
        f"{_answer(413, too_large)} if {length}",
        *(f"http-request del-header {name}" for name in _RAYS_HEADERS),
        f"http-request set-header {CLIENT.decode()} %[src]",
        "http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[!-~]+$ }",
        f"http-request wait-for-body time {SILENCE_S}s",
    ]


def _grpc_rules(spec: ServeSpec) -> list[str]:
    rules: list[str] = []
    if spec.token is not None:
        rules += [
            f"acl is_open path {' '.join(_GRPC_HEALTH)}",
            _has_token(spec.token),
            _status(16, "the authorization metadata has no bearer token that is known")
            + " unless is_open or has_token",
        ]
    return [
        *rules,
        # What a compressed message holds is not known before it is unpacked.
        _status(12, "compressed messages are not taken")
        + " if { req.hdr(grpc-encoding) -m found } !{ req.hdr(grpc-encoding) -m str identity }"
        + " or { req.hdr_cnt(grpc-encoding) gt 1 }",  # of which one would do for the test above
        f"http-request wait-for-body time {SILENCE_S}s",
    ]


def _answer(status: int, error: str, headers: str = "") -> str:
    return (
        f"http-request return status {status} content-type application/json "
        f'string \'{{"error": "{error}"}}\' {headers}'
    ).rstrip()


def _status(code: int, message: str) -> str:
    return (
        "http-request return status 200 content-type application/grpc "
        f'hdr grpc-status {code} hdr grpc-message "{message}"'
    )
