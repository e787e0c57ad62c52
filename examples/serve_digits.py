"""Handwritten digits (scikit-learn's, 1,797 real scans), answered over HTTP to a latency promise.

supple serve examples/serve_digits.py:Digits --slo p99=100ms      # trains for a second, serves
supple serve examples/serve_digits.py:Digits --weights supple-runs/digits   # what a job learnt
python examples/serve_digits.py                                      # ask it about unseen scans
"""

import json
import sys
import urllib.request

import torch
from digits import build_model
from digits import load as load_scans
from torch import nn

import supple


class Digits:
    inputs = {"pixels": "float32[64]"}  # noqa: RUF012
    outputs = {"digit": "int64[]", "confidence": "float32[]"}  # noqa: RUF012

    def load(self, weights: str | None = None) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.net = build_model()
        if weights is None:
            self.train()
        else:
            supple.load_weights(self.net, weights)
        self.net.eval()

    def train(self) -> None:
        """A second of training, so that the example needs no file."""
        x, y = load_scans()[0].tensors
        optimizer = torch.optim.Adam(self.net.parameters(), lr=3e-3)
        for _ in range(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), y).backward()
            optimizer.step()

    @torch.inference_mode()
    def predict(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        confidence, digit = self.net(batch).softmax(1).max(1)
        return {"digit": digit, "confidence": confidence}


def main(url: str) -> None:
    """Ask the service about the scans it was not trained on."""
    _, x, y = load_scans()
    right = 0
    for rows, wanted in zip(x.split(32), y.split(32), strict=True):
        tensor = {"name": "pixels", "shape": list(rows.shape), "datatype": "FP32"}
        body = json.dumps({"inputs": [{**tensor, "data": rows.flatten().tolist()}]}).encode()
        request = urllib.request.Request(f"{url}/v2/models/serve_digits/infer", data=body)
        with urllib.request.urlopen(request) as response:
            outputs = {o["name"]: o["data"] for o in json.load(response)["outputs"]}
        right += int((torch.tensor(outputs["digit"]) == wanted).sum())
    print(f"{right} of {len(x)} unseen scans read right, {right / len(x):.1%}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
