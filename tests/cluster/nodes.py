"""A Ray cluster of several nodes on this machine, each of real processes that can be killed."""

import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from ray.cluster_utils import Cluster

from supple.cluster.starting import as_small_as_it_gets


class Nodes:
    """The head has one place for a worker; others are added and killed by the test."""

    def __init__(self, head_cpus: int = 1) -> None:
        head = {"num_cpus": head_cpus, "include_dashboard": False, "no_monitor": True}
        with as_small_as_it_gets():
            self._cluster: Any = Cluster(initialize_head=True, head_node_args=head)

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self, num_cpus: int) -> Any:
        """A node with room for so many workers, once the cluster knows it."""
        with as_small_as_it_gets():
            return self._cluster.add_node(num_cpus=num_cpus)

    def kill(self, node: Any) -> None:
        """All processes of the node's own at once, as a power cut would."""
        self._cluster.remove_node(node, allow_graceful=False)

    def kill_raylet(self, node: Any) -> None:
        """The parent of the node's workers alone: they live on, and nobody tells them."""
        (raylet,) = node.all_processes["raylet"]
        raylet.process.kill()

    def drain(self, node: Any, *, left_s: int) -> None:
        """Announce, as a platform does, that the node will be taken."""
        subprocess.run(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
                *("--address", self.address, "--node-id", node.node_id),
                *("--reason", "DRAIN_NODE_REASON_PREEMPTION"),
                *("--reason-message", "the test takes it"),
                *("--deadline-remaining-seconds", str(left_s)),
            ],
            check=True,
            capture_output=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._cluster.shutdown()
