"""Handwritten digits (scikit-learn's, 1,797 real scans), answered over HTTP to a latency promise.

supple serve examples/serve_digits.py:Digits --slo p99=100ms       # serve
python examples/serve_digits.py                                     # ask it about unseen scans
"""

import json
import sys
import urllib.request
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

NUM_TRAIN = 1500


def scans() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """All scans, 64 grey values each, and what was written, in a fixed shuffled order."""
    digits: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return digits.data[order].astype(np.float32), digits.target[order]


class Digits:
    inputs = {"pixels": "float32[64]"}  # noqa: RUF012
    outputs = {"digit": "int64[]", "confidence": "float32[]"}  # noqa: RUF012

    def load(self, weights: str | None = None) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        if weights is not None:
            self.net.load_state_dict(torch.load(weights, weights_only=True))
        else:
            self.train()

    def train(self) -> None:
        """A second of training, so that the example needs no file."""
        x, y = (torch.from_numpy(part[:NUM_TRAIN]) for part in scans())
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x / 16), y).backward()
            optimizer.step()

    @torch.inference_mode()
    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        confidence, digit = self.net(batch / 16).softmax(1).max(1)
        return {"digit": digit, "confidence": confidence}


def main(url: str) -> None:
    """Ask the service about the scans it was not trained on."""
    x, y = (part[NUM_TRAIN:] for part in scans())
    right = 0
    for start in range(0, len(x), 32):
        rows = x[start : start + 32]
        tensor = {"name": "pixels", "shape": list(rows.shape), "datatype": "FP32"}
        body = json.dumps({"inputs": [{**tensor, "data": rows.ravel().tolist()}]}).encode()
        request = urllib.request.Request(f"{url}/v2/models/serve_digits/infer", data=body)
        with urllib.request.urlopen(request) as response:
            outputs = {o["name"]: o["data"] for o in json.load(response)["outputs"]}
        right += int((np.asarray(outputs["digit"]) == y[start : start + 32]).sum())
    print(f"{right} of {len(x)} unseen scans read right, {right / len(x):.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
