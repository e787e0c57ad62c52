"""Layers measured one by one."""

from pathlib import Path

import pytest

from supple.train.probes.layer_probe import measure_layers
from supple.train.probes.memory_trace import trace_memory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

STACK = """
import time
import torch

class Slow(torch.nn.Linear):
    def forward(self, x):
        for _ in range(40):
            out = super().forward(x)
        return out

def train(job):
    model = job.model(lambda: torch.nn.Sequential(
        torch.nn.Linear(256, 256), Slow(256, 256), torch.nn.Linear(256, 8)))
    job.optimizer(torch.optim.SGD, lr=0.1)
    data = torch.utils.data.TensorDataset(torch.randn(512, 256))
    for (x,) in job.batches(data, batch_size=256, epochs=3):
        job.step(model(x).square().mean())
"""


@pytest.mark.slow
def test_layers_come_in_the_order_of_their_calls_with_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "stack.py"
    path.write_text(STACK)
    traces = trace_memory(str(path), "train").traces
    report = measure_layers(str(path), "train", traces)
    assert [layer.num_parameters for layer in report.layers] == [256 * 257, 256 * 257, 8 * 257]
    assert [layer.output_bytes_per_sample for layer in report.layers] == [1024, 1024, 32]
    cost = [layer.host_s + 256 * layer.device_s_per_sample for layer in report.layers]
    assert cost[1] > 4 * cost[0]
    assert (report.base_batch_size, report.base_lr, report.total_samples) == (256, 0.1, 1536)
    states = sum(layer.state_bytes for layer in report.layers)
    assert states == pytest.approx(traces[0].state_bytes)


@pytest.mark.slow
def test_the_layers_of_the_gpt_are_its_embedding_blocks_norm_and_head() -> None:
    script = str(EXAMPLES / "gpt.py")
    report = measure_layers(script, "train", trace_memory(script, "train").traces)
    assert len(report.layers) == 5  # the positions are a bare weight, and go with the bytes
    assert report.layers[0].num_parameters == (256 + 64) * 96
    assert all(layer.host_s + layer.device_s_per_sample > 0 for layer in report.layers)
