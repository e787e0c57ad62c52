"""One Ray for the tests whose subject is a job and not the Ray it runs on."""

from collections.abc import Iterator

import pytest

from tests.cluster.nodes import Nodes


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """The address of a Ray with room for many workers. A job that joins it starts none of its own,
    and takes its workers along when it ends; nobody may kill what belongs to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        nodes = Nodes(head_cpus=16)
    with nodes:
        yield nodes.address
