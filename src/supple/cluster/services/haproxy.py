"""Changes to the HAProxy configuration that Ray writes: addresses, timeouts, limits and tokens.

Ray's template has no settings for these. They are a sed program, which a script applies to the file
each time HAProxy is started. The decision records 0009 and 0016 explain every line.
"""

import hashlib
import resource
from collections.abc import Sequence
from typing import Final

from supple.core.service.spec import ServeSpec
from supple.serve.attempts import SERIAL
from supple.serve.protocol.grpc import SERVICE, STREAM
from supple.serve.streams import CLIENT

HEAD_S: Final = 10
"""Timeout for the head of a request, in seconds from the opening of its connection."""
SILENCE_S: Final = 30
"""Timeout between two parts of a body, and for all of it if it fits the ingress' buffer."""
MOST_CONNECTIONS: Final = 30_000
_FILE_SHARE: Final = 0.6
"""Share of the open file limit for client connections; the rest is for replica connections."""
_CLIENT_SHARE: Final = 0.75
"""Share of all connections that one address may have open."""
_KEPT_BYTES: Final = 64 * 1024 * 1024
"""Bytes of buffers that each thread keeps for the next requests."""
_HEALTH: Final = ("/v2/health/live", "/v2/health/ready", "/-/healthz")
_GRPC_HEALTH: Final = (
    *(f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady")),
    "/ray.serve.RayServeAPIService/Healthz",
)
_PREFLIGHT: Final = (
    "{ method OPTIONS } { req.hdr(origin) -m found } "
    "{ req.hdr(access-control-request-method) -m found }"
)
"""Condition of the request in which a browser asks whether a page may call; it has no token."""
_RAYS_HEADERS: Final = (
    *("x-request-timeout-seconds", "x-request-disconnect-disabled", "x-session-id"),
    *("serve_multiplexed_model_id", "serve-multiplexed-model-id"),
)
"""Headers that Ray Serve interprets before the replica; a value that is not UTF-8 makes it fail."""
EDITED: Final = "# edited by Supple"
"""First line of a changed configuration: it is not changed again when HAProxy is restarted."""
NO_TOKEN: Final = "the Authorization header has no known bearer token"


def max_connections() -> int:
    """Largest number of concurrent client connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, int(_FILE_SHARE * hard))


def max_connections_per_client() -> int:
    """Largest number of concurrent connections of one client address."""
    return int(_CLIENT_SHARE * max_connections())


def edits(spec: ServeSpec) -> str:
    """Return the sed program that changes Ray's configuration for `spec`."""
    lines = [
        # Ray opens statistics and metrics to every machine, and the socket to every user.
        f"1i\\\n{EDITED}",
        "s/^\\( *bind\\) [*]\\{0,1\\}:/\\1 127.0.0.1:/",
        "s/mode 666 level admin/mode 600 level admin/",
        # No health check for the proxy in which requests wait while there is no replica.
        "s/ check backup$/ backup/",
        # No log messages to the system.
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
    """Return the sed command that adds lines after each line that matches `pattern`."""
    return f"/{pattern}/a\\\n" + "\\\n".join(f"    {line}" for line in added)


def _address(host: str) -> str:
    if host in ("0.0.0.0", "*"):
        return "*"
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _connection_rules() -> Sequence[str]:
    return (
        "tcp-request connection track-sc0 src table supple_clients",
        f"tcp-request connection reject if {{ sc0_conn_cur gt {max_connections_per_client()} }}",
    )


def _serial_rule(spec: ServeSpec) -> str:
    """The rule that gives a serial number to each request that may be resent."""
    name = SERIAL.decode()
    if spec.retry_safe:
        return f"http-request set-header {name} %[uuid()]"
    return f"http-request del-header {name}"


def _has_token(token: str) -> str:
    """The ACL `has_token`; the file contains only a digest of the token."""
    digest = hashlib.sha256(f"Bearer {token}".encode()).hexdigest().upper()
    return f"acl has_token req.fhdr(authorization),sha2(256),hex -m str {digest}"


def _http_rules(spec: ServeSpec) -> list[str]:
    rules: list[str] = []
    # A page may read these two answers of any origin: they hold nothing of the service.
    cors = "hdr access-control-allow-origin *" if spec.cors_origins else ""
    if spec.token is not None:
        rules += [
            f"acl is_open path {' '.join(_HEALTH)}",
            _has_token(spec.token),
            f"{_answer(401, NO_TOKEN, f'hdr www-authenticate Bearer {cors}')} unless is_open "
            "or has_token" + (f" or {_PREFLIGHT}" if spec.cors_origins else ""),
        ]
    too_large = f"the body is too large: at most {spec.max_body_bytes} bytes (--max-body)"
    length = "{ req.hdr_val(content-length) gt " + f"{spec.max_body_bytes} }}"
    return [
        *rules,
        f"{_answer(413, too_large, cors)} if {length}",
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
            _status(16, "the authorization metadata has no known bearer token")
            + " unless is_open or has_token",
        ]
    return [
        *rules,
        # The size of a compressed message is unknown before it is decompressed.
        _status(12, "compressed messages are not accepted")
        + " if { req.hdr(grpc-encoding) -m found } !{ req.hdr(grpc-encoding) -m str identity }"
        + " or { req.hdr_cnt(grpc-encoding) gt 1 }",  # one `identity` would pass the test above
        f"http-request set-header {CLIENT.decode()} %[src]",
        # The requests of a stream come while it is answered.
        f"http-request wait-for-body time {SILENCE_S}s unless {{ path /{SERVICE}/{STREAM} }}",
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
