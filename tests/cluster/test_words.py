"""What a user is told of a worker that Ray lost, of a node that lacks the job, of an address."""

from pathlib import Path
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError, OutOfMemoryError

from supple.cluster.ray import cause_in_words, connect
from supple.cluster.worker import refuse_unless_seen
from supple.core.spec import SpecError, TrainSpec


def died(message: str, **more: Any) -> ActorDiedError:
    context = ActorDiedErrorContext(
        error_message=message,
        class_name="WorkerBody",
        actor_id=bytes(16),
        node_ip_address="10.0.0.2",
        **more,
    )
    return ActorDiedError(context)


def test_a_lost_node_is_told_by_its_address() -> None:
    error = died("The actor died because its node has died. Node Id: 12ab")
    assert cause_in_words(error) == "its node 10.0.0.2 is gone"


def test_a_node_that_the_platform_took_is_told_apart() -> None:
    taken = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED)
    error = died("The actor died because its node has died.", node_death_info=taken)
    assert cause_in_words(error) == "its node 10.0.0.2 was taken by the platform"


def test_a_lost_process_is_told_without_the_names_of_classes() -> None:
    error = died("Worker unexpectedly exits with a connection error code 2. End of file.")
    assert cause_in_words(error) == "its process on 10.0.0.2 was killed or crashed"
    assert cause_in_words(ActorDiedError()) == "its process was killed or crashed"


def test_memory_is_named_where_ray_names_it() -> None:
    error = OutOfMemoryError("Task was killed due to the node running low on memory.")
    assert cause_in_words(error) == "killed because its node ran out of memory"


def test_a_node_that_lacks_the_script_or_the_run_folder_is_named(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    with pytest.raises(SpecError, match=r"the script .*train.py is not on node 10.0.0.2\. With"):
        refuse_unless_seen(str(script), tmp_path, node="10.0.0.2")
    script.touch()
    refuse_unless_seen(str(script), tmp_path, node="10.0.0.2")
    with pytest.raises(SpecError, match=r"the run folder .*not on node .* put --run-dir on a file"):
        refuse_unless_seen(str(script), tmp_path / "none", node="10.0.0.2")


def test_the_address_of_a_ray_client_is_refused_before_ray_is_asked() -> None:
    with pytest.raises(SpecError, match=r"--address ray://head:10001 is the address of a Ray"):
        connect(TrainSpec(name="job", script="train.py", address="ray://head:10001"))
