"""What machine a number was measured on, and the one JSON line a benchmark ends with."""

import json
import os
import platform

import psutil
import torch


def machine() -> dict[str, str | int]:
    return {
        "cores": os.cpu_count() or 1,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def report(benchmark: str, metrics: dict[str, float]) -> None:
    """Print the metrics for people, then the JSON line for programs."""
    for name, value in metrics.items():
        print(f"  {name:28} {value:.4g}")
    print(json.dumps({"benchmark": benchmark, "machine": machine(), "metrics": metrics}))
