"""Collect metrics or statistics of all replicas of a service from within one of them."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp
import ray
from ray.serve.context import _get_global_client

_PATIENCE_S: Final = 2.0
"""Timeout in seconds for the page of one replica; a slower replica is dying or overloaded."""


def replica_addresses(name: str) -> Sequence[tuple[str, int]]:
    """Return host and port of the replicas the ingress routes to; empty without HAProxy mode."""
    client: Any = _get_global_client()
    groups: Any = ray.get(client._controller.get_target_groups.remote(from_proxy_manager=True))
    return [
        (target.ip, target.port)
        for group in groups
        if group.app_name == name and group.protocol == "HTTP" and group.ingress_deployment_name
        for target in group.targets
    ]


async def replica_pages(name: str, path: str, headers: Mapping[str, str]) -> Sequence[bytes]:
    """Fetch the page at `path` of every replica of the service that answers, including this one."""
    addresses = await asyncio.to_thread(replica_addresses, name)
    here = ray.util.get_node_ip_address()
    timeout = aiohttp.ClientTimeout(total=_PATIENCE_S)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:

        async def page(host: str, port: int) -> bytes:
            shown = f"[{host}]" if ":" in host else host
            # Replicas of a service on loopback listen only on loopback.
            for address in ("127.0.0.1", shown) if host == here else (shown,):
                with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                    async with session.get(f"http://{address}:{port}{path}") as response:
                        return await response.read() if response.status == 200 else b""
            return b""

        found = await asyncio.gather(*(page(host, port) for host, port in addresses))
    return [text for text in found if text]
