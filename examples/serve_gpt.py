"""The byte-level GPT of gpt.py, answered over HTTP as it writes: one event for each byte.

supple serve examples/serve_gpt.py:Writer --slo p99=10s           # trains for seconds, serves
supple serve examples/serve_gpt.py:Writer --weights supple-runs/gpt   # what a job learnt
python examples/serve_gpt.py                                      # prints its text as it comes
"""

import codecs
import json
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpt import CONTEXT, GPT, Windows, texts

import supple

STEPS, BATCH, TEMPERATURE = 120, 32, 0.7


class Writer:
    inputs = {"prompt": "bytes[]", "length": "int64[]"}  # noqa: RUF012
    outputs = {"text": "bytes[]"}  # noqa: RUF012
    max_batch = 16

    def load(self, weights: str | None = None) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)
        self.net = GPT()
        if weights is None:
            self.train()
        else:
            supple.load_weights(self.net, weights)
        self.net.eval()

    def train(self) -> None:
        """Seconds of training, so that the example needs no file; it writes words, not sense."""
        windows = Windows(texts()[0], STEPS * BATCH)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3)
        for indices in torch.randperm(len(windows)).view(STEPS, BATCH).tolist():
            x, y = map(torch.stack, zip(*(windows[i] for i in indices), strict=True))
            optimizer.zero_grad()
            F.cross_entropy(self.net(x).flatten(0, 1), y.flatten()).backward()
            optimizer.step()

    def stream(self, batch: dict[str, Any]) -> Iterator[dict[str, list[str]]]:
        """Yield the next character of each row; closed when the client leaves."""
        # A character of several bytes is sent with its last one: events are JSON, which is UTF-8.
        decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in batch["prompt"]]
        window = torch.tensor([[*prompt.rjust(CONTEXT)[-CONTEXT:]] for prompt in batch["prompt"]])
        for index in range(int(max(batch["length"]))):
            with torch.inference_mode():
                chances = (self.net(window)[:, -1] / TEMPERATURE).softmax(-1)
                following = torch.multinomial(chances, 1)
                window = torch.cat([window[:, 1:], following], 1)
            rows = zip(decoders, following.flatten().tolist(), batch["length"], strict=True)
            yield {"text": [d.decode(bytes([b])) if index < n else "" for d, b, n in rows]}

    def predict(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Return the whole text of each row, for clients that do not stream."""
        rows = zip(*(part["text"] for part in self.stream(batch)), strict=True)
        return {"text": ["".join(row) for row in rows]}


def main(url: str, prompt: str = "def ", length: int = 400) -> None:
    """Print the model's text as it arrives."""
    tensors = [
        {"name": "prompt", "shape": [1], "datatype": "BYTES", "data": [prompt]},
        {"name": "length", "shape": [1], "datatype": "INT64", "data": [length]},
    ]
    body = json.dumps({"inputs": tensors}).encode()
    print(prompt, end="")
    request = urllib.request.Request(f"{url}/v2/models/serve_gpt/generate_stream", data=body)
    with urllib.request.urlopen(request) as events:
        for line in events:
            if line.startswith(b"data: "):
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    sys.exit(event["error"])
                print(event["outputs"][0]["data"][0], end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
