"""Try a new version of a service in a separate process, before any replica is replaced.

It finds a version that fails to import or load, hangs, ends its process, or returns other tensors
than declared for a batch of zeros. The running service is not affected.
"""

import time
from collections.abc import Iterator
from typing import Any, Final, final

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError

from supple.cluster.services.replica import Deployment
from supple.core.spec import SpecError
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel, load_model

_ROWS: Final = (1, 2)
"""Two batch sizes, to check that the first dim of an answer follows the batch."""


def tried(deployment: Deployment, before: Deployment, *, within_s: float) -> Iterator[None]:
    """Try `deployment`, which will replace `before`; yields repeatedly until it is done. Raises
    `ModelFault`, with the user code's error, if it fails or takes more than `within_s` seconds."""
    actor: Any = (
        ray.remote(_Trial)
        .options(num_cpus=0, num_gpus=deployment.gpus_per_replica, max_restarts=0)
        .remote()
    )
    end_s = time.monotonic() + within_s
    try:
        outcome = actor.why_not.remote(deployment, before)
        while time.monotonic() < end_s:
            try:
                why_not: Any = ray.get(outcome, timeout=0)
            except GetTimeoutError:
                yield
                continue
            except (RayActorError, OutOfMemoryError):
                raise ModelFault(
                    "the trial process ended while it loaded the model or computed a batch of "
                    "zeros: a crash, os._exit() or too little memory"
                ) from None
            if why_not is not None:
                raise ModelFault(why_not)
            return
        raise ModelFault(
            f"loading it and one batch of zeros took more than {within_s:.0f} s. If it needs "
            "longer, raise --start-timeout."
        )
    finally:
        ray.kill(actor)


def room_for(deployment: Deployment) -> bool:
    """Whether the accelerators for one more replica are free now."""
    wanted = deployment.gpus_per_replica
    return wanted == 0 or ray.available_resources().get("GPU", 0.0) >= wanted


@final
class _Trial:
    def why_not(self, deployment: Deployment, before: Deployment) -> str | None:
        """Return the reason why the version cannot be served; None if it can."""
        try:
            model = _loaded(deployment)
            for rows in _ROWS:
                model.rehearse(rows)
            try:
                model.rehearse(1, finite=True)
            except ModelFault as fault:
                if _is_finite(before):
                    return f"on zeros, {fault} The running version answers them with numbers."
        except (ModelFault, SpecError) as error:
            return str(error)
        return None


def _loaded(deployment: Deployment) -> ServedModel:
    return load_model(
        deployment.target,
        name=deployment.name,
        weights=deployment.weights,
        source=deployment.source,
    )


def _is_finite(deployment: Deployment) -> bool:
    """Whether the version answers zeros with finite numbers; False if it fails to load now."""
    try:
        _loaded(deployment).rehearse(1, finite=True)
    except (ModelFault, SpecError):
        return False
    return True
