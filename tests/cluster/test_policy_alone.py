"""`SloPolicy` in a Ray Serve deployment that knows nothing of Supple: one line of its config."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SCRIPT = """
import concurrent.futures, logging, threading, time, warnings
import ray
from ray import serve

@serve.deployment(
    max_ongoing_requests=100,
    ray_actor_options={"num_cpus": 0.1},
    autoscaling_config={
        "min_replicas": 1, "max_replicas": 3,
        "look_back_period_s": 2, "upscale_delay_s": 0, "downscale_delay_s": 0,
        "policy": {"policy_function": "supple.serve.policy:SloPolicy",
                   "policy_kwargs": {"slo": "p99=500ms", "predict": "100ms", "startup": "5s"}},
    },
)
class Theirs:
    def __call__(self):
        time.sleep(0.1)
        return 1

def running():
    states = serve.status().applications["default"].deployments["Theirs"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")

ray.init(
    "local",
    num_cpus=4,
    include_dashboard=False,
    log_to_driver=False,
    logging_level=logging.ERROR,
)
serve.start(proxy_location="Disabled")
handle = serve.run(Theirs.bind())
assert running() == 1, running()
enough = threading.Event()

def client():
    while not enough.is_set():
        assert handle.remote().result() == 1

with concurrent.futures.ThreadPoolExecutor(20) as pool:
    clients = [pool.submit(client) for _ in range(20)]
    deadline = time.monotonic() + 120
    try:
        while running() < 2:
            assert time.monotonic() < deadline, "no second replica came"
            time.sleep(0.2)
    finally:
        enough.set()
    for one in clients:
        one.result()
print("scaled")
serve.shutdown()
ray.shutdown()
"""


def test_anyones_deployment_is_scaled_by_the_promise(tmp_path: Path) -> None:
    script = tmp_path / "theirs.py"
    script.write_text(SCRIPT)
    fast = {
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | fast,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 and "scaled" in done.stdout, done.stderr[-3000:]
