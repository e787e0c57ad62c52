"""The processes of `serve_live.py`: one Ray Serve each, with services of Supple or plain ones.

A host deploys what its arguments say, prints one line of URLs, then every second how many
replicas each service has, until its standard input ends.
"""

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

WEIGHTS = "SUPPLE_BENCH_DIGITS"
INITIAL, MOST = 2, 8
_CPUS = 0.1
_EVERY_S = 1.0
_DEVICE_S, _DEVICE_ROW_S = 0.46, 0.04


def train(path: Path) -> None:
    """A logistic regression of scikit-learn's scanned digits, stored."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    digits: Any = load_digits()
    model = LogisticRegression(max_iter=300).fit(digits.data[:1500] / 16, digits.target[:1500])
    np.savez(path, weights=model.coef_.T.astype("float32"), bias=model.intercept_.astype("float32"))


class Digits:
    """One scan at a time; a call waits for its "device" off the processor."""

    inputs = {"pixels": "float32[64]"}  # noqa: RUF012
    outputs = {"digit": "int64[]"}  # noqa: RUF012
    max_batch = 1

    def load(self) -> None:
        stored = np.load(os.environ[WEIGHTS])
        self.weights, self.bias = stored["weights"], stored["bias"]

    def predict(self, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        time.sleep(_DEVICE_S + _DEVICE_ROW_S * len(batch))
        return np.argmax(batch / 16 @ self.weights + self.bias, axis=1)


class DigitsBatched(Digits):
    """Up to eight scans cost little more than one."""

    max_batch = 8


def supple_host(services: list[dict[str, Any]]) -> dict[str, str]:
    from supple.cluster.services import ingress
    from supple.cluster.services import service as serving
    from supple.core.service.spec import ServeSpec, parse_slo

    port = ingress.free_port()
    specs = []
    for asked in services:
        constant = asked["constant"]
        batched = "Batched" if asked["max_batch"] > 1 else ""
        spec = ServeSpec(
            name=asked["name"],
            target=f"{__file__}:Digits{batched}",
            slo=parse_slo(asked["slo"]),
            port=port,
            min_replicas=constant or 1,
            max_replicas=constant or MOST,
            initial_replicas=constant or INITIAL,
            cpus_per_replica=_CPUS,
        )
        specs.append(spec)
    ingress.connect(dataclasses.replace(specs[0], max_replicas=MOST * len(specs)))
    urls = {}
    for spec in specs:
        route = f"/v2/models/{spec.name}"
        serving.deploy(serving.deployment_of(spec), route=route)
        urls[spec.name] = f"http://127.0.0.1:{port}{route}/infer"
    return urls


def ray_host(services: list[dict[str, Any]]) -> dict[str, str]:
    """Ray Serve as it comes, and tuned: a replica for each ongoing request, asked for after 3 s."""
    import logging
    import socket

    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
    from ray.serve.schema import LoggingConfig

    class Plain:
        def __init__(self) -> None:
            self.model = Digits()
            self.model.load()

        async def __call__(self, request: Any) -> Any:
            document = await request.json()
            pixels = np.array(document["inputs"][0]["data"], "float32").reshape(1, 64)
            return {"digit": self.model.predict(pixels).tolist()}

    tuned = {
        "target_ongoing_requests": 1.0,
        "upscale_delay_s": 3.0,
        "downscale_delay_s": 60.0,
        "look_back_period_s": 10.0,
        "metrics_interval_s": 2.0,
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    serve.start(
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )
    urls = {}
    for asked in services:
        counts = {"min_replicas": 1, "initial_replicas": INITIAL, "max_replicas": MOST}
        deployment: Any = serve.deployment(Plain).options(
            name=asked["name"],
            ray_actor_options={"num_cpus": _CPUS},
            autoscaling_config=counts | (tuned if asked["name"] == "ray_tuned" else {}),
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(deployment.bind(), name=asked["name"], route_prefix=f"/{asked['name']}")
        urls[asked["name"]] = f"http://127.0.0.1:{port}/{asked['name']}"
    return urls


def main() -> None:
    kind, services = sys.argv[1], json.loads(sys.argv[2])
    urls = (supple_host if kind == "supple" else ray_host)(services)
    import ray
    from ray import serve

    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    _tell({"urls": urls})
    try:
        while not ended.wait(_EVERY_S):
            applications = serve.status().applications
            held = {}
            for name in urls:
                states = applications[name].deployments[name].replica_states
                held[name] = (
                    sum(count for state, count in states.items() if state == "RUNNING"),
                    sum(states.values()),
                )
            _tell({"at": time.monotonic(), "held": held})
        if kind == "supple":
            from supple.cluster.services import service as serving

            profiles = {
                name: [[p.batch_size, p.p50_s, p.p99_s] for p in serving.profile_of(name)]
                for name in urls
            }
            _tell({"profiles": profiles})
    finally:
        serve.shutdown()
        ray.shutdown()


def _tell(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
