"""A trace without computing against what the same step really allocates on this machine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from supple.train.loader import make_loader
from supple.train.memory_trace import TraceFailed, trace_memory
from supple.train.script import load

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


class Measured(BaseException):
    pass


def num_bytes(tensors: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class RealStep:
    """Looks like a `Job`; takes a step to warm up, and one under torch's profiler."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.peak_bytes = 0

    def model(self, build: Any) -> torch.nn.Module:
        self.built = build()
        return self.built

    def optimizer(self, cls: Any, *, lr: float, schedule: Any = None, **options: Any) -> Any:
        self.made = cls(self.built.parameters(), lr=lr, **options)
        return self.made

    def report(self, **_: Any) -> None:
        return

    def batches(self, dataset: Any, *, batch_size: int, **options: Any) -> Iterator[Any]:
        loader = make_loader(
            dataset,
            epochs=1,
            shuffle=True,
            seed=0,
            collate_fn=options.get("collate_fn"),
            num_workers=0,
        )
        loader.place(loader.position, 0, 1, self.size, self.size)
        batch = next(iter(loader.feed())).data
        yield batch
        gradients = [param.grad for param in self.built.parameters()]
        held = num_bytes([self.built.state_dict(), gradients, dict(self.made.state), batch])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            yield batch
        results = seen.profiler.kineto_results  # type: ignore[union-attr]
        events = [event for event in results.events() if event.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak_bytes = max(self.peak_bytes, held + now)
        raise Measured

    def step(self, loss: torch.Tensor, **_: Any) -> bool:
        loss.backward()
        self.made.step()
        self.made.zero_grad(set_to_none=False)
        return True


def really(script: Path, size: int) -> int:
    step = RealStep(size)
    with pytest.raises(Measured):
        load(str(script), "train")(step)
    return step.peak_bytes


@pytest.mark.parametrize("name", ["digits", "convnet", "gpt"])
def test_the_trace_is_what_the_step_allocates_within_five_per_cent(name: str) -> None:
    script = EXAMPLES / f"{name}.py"
    for trace in trace_memory(str(script), "train")[:2]:
        assert trace.peak_bytes == pytest.approx(really(script, trace.micro_batch_size), rel=0.05)


def test_recomputation_keeps_less_of_a_transformer_and_the_same_states() -> None:
    script = str(EXAMPLES / "gpt.py")
    kept, again = trace_memory(script, "train")[0], trace_memory(script, "train", recompute=True)[0]
    assert again.peak_bytes < 0.75 * kept.peak_bytes
    assert again.state_bytes == kept.state_bytes
    adam = 2 * kept.parameter_bytes
    assert kept.optimizer_bytes == pytest.approx(adam, rel=0.01)


HUGE = """
import torch
import torch.nn.functional as F

def train(job):
    model = job.model(lambda: torch.nn.Sequential(
        *[torch.nn.Linear(20_000, 20_000, bias=False) for _ in range(100)]))
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 20_000), torch.zeros(8, 20_000))
    for x, y in job.batches(data, batch_size=4):
        {body}
"""


def write(tmp_path: Path, body: str) -> str:
    path = tmp_path / "huge.py"
    path.write_text(HUGE.replace("{body}", body))
    return str(path)


def test_a_model_of_640_gigabytes_of_states_is_traced_here(tmp_path: Path) -> None:
    script = write(tmp_path, "job.step(F.mse_loss(model(x), y))")
    trace = trace_memory(script, "train")[0]
    assert trace.parameter_bytes == 100 * 20_000**2 * 4
    assert trace.state_bytes == pytest.approx(4 * trace.parameter_bytes)
    assert trace.largest_block_bytes == 20_000**2 * 4
    assert trace.peak_bytes > trace.state_bytes


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print(model(x).sum().item())", "reads a tensor's value while it trains"),
        ("pass", "did not call job.step"),
        ("model(x[:, :7])", "failed while it was traced"),
    ],
)
def test_a_script_that_cannot_be_traced_says_why(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(TraceFailed, match=words):
        trace_memory(write(tmp_path, body), "train")


def test_nothing_fake_is_left_behind_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(TraceFailed):
        trace_memory(write(tmp_path, "print(model(x).sum().item())"), "train")
    assert float(torch.ones(3).sum()) == 3.0
