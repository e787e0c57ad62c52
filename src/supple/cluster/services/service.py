"""Deploy, update, inspect and stop a service on Ray Serve."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve

from supple.cluster.services.replica import Deployment, Replica
from supple.cluster.services.trial import room_for, tried
from supple.cluster.starting import stop_ray
from supple.core.service.latency import LatencyPoint, LatencyProfile
from supple.core.service.spec import ServeSpec
from supple.core.spec import SpecError
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import check_target
from supple.serve.policy import measured
from supple.serve.protocol.rest import RequestLimits
from supple.serve.surface import SurfaceSettings

LOOK_EVERY_S: Final = 0.1
_HEALTH_PERIOD_S: Final = 1.0
_POLICY: Final = "supple.serve.policy:SloPolicy"


def deployment_of(
    spec: ServeSpec, *, weights: str | None = None, profile: LatencyProfile | None = None
) -> Deployment:
    """Return the configuration of the replicas of `spec`. The autoscaler uses `profile` until the
    replicas report measurements."""
    path, class_name = check_target(spec.target)
    fixed = spec.min_replicas == spec.max_replicas
    arguments: dict[str, Any] = {
        "slo": str(spec.slo),
        "idle": f"{spec.idle_s:g}s",
        "price_per_hour": spec.price_per_hour,
        "budget_per_hour": spec.budget_per_hour,
    }
    if profile is not None:
        points = [[p.batch_size, p.p50_s, p.p99_s] for p in profile.points]
        arguments["profile"] = {"points": points, "startup_s": profile.startup_s}
    return Deployment(
        target=f"{Path(path).resolve()}" + (f":{class_name}" if class_name else ""),
        source=Path(path).read_bytes() if class_name else None,
        name=spec.name,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        initial_replicas=spec.initial_replicas,
        policy=None if fixed else (_POLICY, arguments),
        cpus_per_replica=spec.cpus_per_replica,
        gpus_per_replica=spec.gpus_per_replica,
        within_s=spec.slo.within_s,
        max_waiting=spec.max_waiting,
        weights=weights,
        settings=SurfaceSettings(
            tokens=() if spec.token is None else (spec.token,),
            cors_origins=spec.cors_origins,
            limits=RequestLimits(max_body_bytes=spec.max_body_bytes),
        ),
    )


def refuse_no_capacity(spec: ServeSpec) -> None:
    """Raise `SpecError` if the cluster is too small for the `min_replicas` of `spec`."""
    total = ray.cluster_resources()
    least = max(1, spec.min_replicas)
    for what, option, each in (
        ("CPU", "--cpus-per-replica", spec.cpus_per_replica),
        ("GPU", "--gpus-per-replica", spec.gpus_per_replica),
    ):
        have = total.get(what, 0.0)
        if least * each > have:
            raise SpecError(
                f"no capacity: {least} replicas with {option} {each:g} need {least * each:g} "
                f"{what}s, and there are {have:g}. Lower {option} or the MIN of --replicas, or add "
                "nodes."
            )


def deploy(deployment: Deployment, *, route: str = "/") -> None:
    """Deploy a service and return when it runs. It gets the requests whose path begins with
    `route`. Raises `ModelFault` with the error of the user's code if loading fails."""
    _begin(deployment, route)
    for _ in _until_it_runs(deployment.name, math.inf):
        time.sleep(LOOK_EVERY_S)


def updating(deployment: Deployment, before: Deployment, *, route: str = "/") -> Iterator[None]:
    """Replace the running version `before` by `deployment`; yields repeatedly until it is done.

    First the new version is tried beside the old one. If only the weights differ, they are swapped
    in the running replicas. Otherwise the replicas are replaced one after another; each stops after
    its successor has started. If a step fails, `before` is restored at its count, and this raises
    `ModelFault` with the error of the user's code, or `SpecError`. `deployment.patience_s` limits
    the start of one replica.
    """
    swap = _version(deployment) == _version(before)
    if room_for(deployment):
        yield from tried(deployment, before, within_s=deployment.patience_s)
    elif not swap:
        raise SpecError(
            f"no room: the new version is tried beside the {num_running(before.name)} running "
            f"replicas, and {deployment.gpus_per_replica:g} GPUs are not free. Free some, or stop "
            "the service and start it again."
        )
    replicas = max(1, num_running(before.name))
    limit_s = replicas * (deployment.patience_s + _leaving_s(deployment))
    try:
        _begin(deployment, route)
        yield from _until_it_runs(deployment.name, limit_s)
    except Exception:
        _begin(before, route)
        yield from _until_it_runs(before.name, limit_s)
        raise


def _begin(deployment: Deployment, route: str) -> None:
    """Set `deployment` as the target state of Ray Serve, and return without waiting."""
    prepared: Any = serve.deployment(serve.ingress()(Replica)).options(**_options(deployment))
    # Without a version, every deploy would replace every replica, even for new weights.
    prepared._version = _version(deployment)
    target = serve.RunTarget(
        target=prepared.bind(deployment), name=deployment.name, route_prefix=route
    )
    serve.run_many([target], wait_for_applications_running=False)


def _version(deployment: Deployment) -> str:
    """Return a digest that is equal for deployments with the same replicas, except for weights."""
    fixed = dataclasses.replace(deployment, weights=None, patience_s=0.0)
    return hashlib.sha256(repr(fixed).encode()).hexdigest()[:16]


def _leaving_s(deployment: Deployment) -> float:
    """Time a stopping replica has to finish its requests, in seconds."""
    return deployment.predict_timeout_s + 10.0


def _until_it_runs(name: str, within_s: float) -> Iterator[None]:
    """Yield until all replicas of `name` have reached the target state. Raises `ModelFault` if the
    deployment fails, or takes more than `within_s` seconds."""
    end_s = time.monotonic() + within_s
    while (application := serve.status().applications[name]).status != "RUNNING":
        late = time.monotonic() > end_s
        if application.status == "DEPLOY_FAILED" or late:
            after, reason = f"its replicas did not start within {within_s:.0f} s", why_not(name)
            raise ModelFault(f"{after}: {reason}" if late and reason else reason or after)
        yield


def _options(deployment: Deployment) -> dict[str, Any]:
    options: dict[str, Any] = {
        "name": deployment.name,
        # Batches form inside a replica, so it must hold many requests at once.
        "max_ongoing_requests": deployment.max_waiting,
        "user_config": {"weights": deployment.weights, "patience_s": deployment.patience_s},
        "ray_actor_options": {
            "num_cpus": deployment.cpus_per_replica,
            "num_gpus": deployment.gpus_per_replica,
        },
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": 10.0,
        "graceful_shutdown_timeout_s": _leaving_s(deployment),
        "graceful_shutdown_wait_loop_s": 0.1,
        # An update starts a replica before it stops one.
        "max_surge_percent": 25,
        "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    }
    if deployment.policy is None:
        return options | {"num_replicas": deployment.min_replicas}
    path, arguments = deployment.policy
    return options | {
        "autoscaling_config": {
            "min_replicas": deployment.min_replicas,
            "initial_replicas": deployment.initial_replicas or max(1, deployment.min_replicas),
            "max_replicas": deployment.max_replicas,
            # The policy has its own smoothing, delays and state, in seconds.
            "look_back_period_s": 2.0,
            "metrics_interval_s": 0.5,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 0.0,
            "policy": {"policy_function": path, "policy_kwargs": dict(arguments)},
        }
    }


def why_not(name: str) -> str | None:
    """Return the error of the replicas of `name` that failed to start, without Ray's frames."""
    application = serve.status().applications.get(name)
    if application is None:
        return None
    texts = [*(d.message for d in application.deployments.values()), application.message]
    for text in texts:
        for fault in ("supple.serve.models.faults.ModelFault: ", "supple.core.spec.SpecError: "):
            if fault in text:
                return text.rpartition(fault)[2].strip()
    return next((text for text in texts if text), None)


def profile_of(name: str) -> Sequence[LatencyPoint]:
    """Return the batch times measured by a replica of `name`; empty without declared inputs."""
    reported: Mapping[str, float] = serve.get_app_handle(name).profile.remote().result()
    return measured({key: {name: value} for key, value in reported.items()})


def num_running(name: str) -> int:
    """Number of replicas of `name` that take requests."""
    application = serve.status().applications.get(name)
    if application is None or name not in application.deployments:
        return 0
    states = application.deployments[name].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def shut_down(name: str | None = None, *, wait: bool = True) -> None:
    """Stop serving: requests in flight of the service `name` are answered, new ones refused. With
    `wait=False`, which needs no answer of Ray Serve's controller, a Ray started here is ended at
    once, and on a cluster the service stays."""
    if wait:
        if name is not None:
            # `serve.shutdown()` alone would stop the ingress before the replicas.
            serve.delete(name)
        serve.shutdown()
    stop_ray()
