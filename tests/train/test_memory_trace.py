"""A trace without computing against what the same step really allocates on this machine."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.autocast_mode import autocast
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

from supple.train.data.loader import MicroBatch
from supple.train.probes.memory_trace import TracedJob, TraceFailed, trace_memory
from supple.train.probes.stand_in import StandIn
from supple.train.recipe import Recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def num_bytes(tensors: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(tensors) if isinstance(leaf, torch.Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


class RealStep:
    """An instrument: takes a step to warm up, and one under torch's profiler."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.peak_bytes = 0

    def micro_batches(self, recipe: Recipe) -> Generator[MicroBatch, None, None]:
        self.optimizer = recipe.optimizer
        loader = recipe.batches.loader(recipe.seed)
        loader.place(loader.position, 0, 1, self.size, self.size)
        batch = next(iter(loader.feed()))
        yield batch
        gradients = [param.grad for param in recipe.model.parameters()]
        states = [recipe.model.state_dict(), dict(recipe.optimizer.state)]
        held = num_bytes([states, gradients, batch.data])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            yield batch
        results = seen.profiler.kineto_results  # type: ignore[union-attr]
        events = [event for event in results.events() if event.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.peak_bytes = max(self.peak_bytes, held + now)

    def step(
        self, loss: torch.Tensor, micro: MicroBatch, clip_norm: float | None, optimizer: Any
    ) -> bool:
        loss.backward()
        (optimizer or self.optimizer).step()
        self.optimizer.zero_grad(set_to_none=False)
        return True


def really(script: Path, size: int) -> int:
    step = RealStep(size)
    assert StandIn(step).run(str(script), "train") == ""
    return step.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "convnet", "gpt"])
def test_the_trace_is_what_the_step_allocates_within_five_per_cent(name: str) -> None:
    script = EXAMPLES / f"{name}.py"
    for trace in trace_memory(str(script), "train").traces[:2]:
        assert trace.peak_bytes == pytest.approx(really(script, trace.micro_batch_size), rel=0.05)


@pytest.mark.slow
def test_recomputation_keeps_less_of_a_transformer_and_the_same_states() -> None:
    script = str(EXAMPLES / "gpt.py")
    kept = trace_memory(script, "train").traces[0]
    again = trace_memory(script, "train", recompute=True).traces[0]
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


@pytest.mark.slow
def test_a_model_of_640_gigabytes_of_states_is_traced_here(tmp_path: Path) -> None:
    script = write(tmp_path, "job.step(F.mse_loss(model(x), y))")
    trace = trace_memory(script, "train").traces[0]
    assert trace.parameter_bytes == 100 * 20_000**2 * 4
    assert trace.state_bytes == pytest.approx(4 * trace.parameter_bytes)
    assert trace.largest_block_bytes == 20_000**2 * 4
    assert trace.peak_bytes > trace.state_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("print(model(x).nonzero())", "reads a tensor's value while it trains"),
        ("pass", "did not call job.step"),
        ("model(x[:, :7])", "failed while it was traced"),
    ],
)
def test_a_script_that_cannot_be_traced_says_why(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(TraceFailed, match=words):
        trace_memory(write(tmp_path, body), "train")


@pytest.mark.slow
def test_nothing_fake_is_left_behind_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(TraceFailed):
        trace_memory(write(tmp_path, "print(model(x).nonzero())"), "train")
    assert float(torch.ones(3).sum()) == 3.0


DATA = """
import sys
import torch

def train(job):
    model = job.model(lambda: torch.nn.Linear(1000, {outputs}))
    job.optimizer(torch.optim.{optimizer}, lr=1e-3)
    data = torch.utils.data.TensorDataset(torch.zeros({samples}, 1000))
    for number, (x,) in enumerate(job.batches(data, batch_size={batch})):
        {body}
        job.step(model(x).square().mean())
"""


def job_of(tmp_path: Path, **given: Any) -> str:
    path = tmp_path / "job.py"
    form = {"outputs": 1, "optimizer": "SGD", "samples": 640, "batch": 8, "body": ""} | given
    path.write_text(DATA.format(**form))
    return str(path)


def sizes(found: TracedJob) -> list[int]:
    return [trace.micro_batch_size for trace in found.traces]


def test_a_batch_larger_than_the_data_is_traced_as_the_data(tmp_path: Path) -> None:
    found = trace_memory(job_of(tmp_path, samples=6, batch=64), "train")
    assert (found.batch_size, found.dataset_size, sizes(found)) == (64, 6, [6, 3, 1])


def test_iterable_data_that_ends_is_known_by_its_end(tmp_path: Path) -> None:
    script = Path(job_of(tmp_path, samples=20, batch=64))
    source = script.read_text().replace("number, (x,) in", "number, x in")
    script.write_text(
        source.replace("job.batches(data,", "job.batches([lambda: iter(data.tensors[0])],")
    )
    found = trace_memory(str(script), "train")
    assert (found.dataset_size, sizes(found)) == (20, [20, 16, 8])


def test_a_batch_of_one_is_traced_at_its_double_too(tmp_path: Path) -> None:
    assert sizes(trace_memory(job_of(tmp_path, batch=1), "train")) == [2, 1]
    assert sizes(trace_memory(job_of(tmp_path, batch=1, samples=1), "train")) == [1]


@pytest.mark.slow
def test_where_the_optimizer_has_the_peak_larger_sizes_are_traced(tmp_path: Path) -> None:
    """Of 4,000 outputs Adam's own buffers are larger than what a few samples need."""
    wide = {"outputs": 4000, "optimizer": "AdamW", "batch": 8}
    found = trace_memory(job_of(tmp_path, **wide, samples=100_000), "train")
    peaks = [trace.peak_bytes for trace in found.traces]
    assert sizes(found)[0] > 8 and peaks[0] > peaks[1] == peaks[-1]
    assert max(sizes(trace_memory(job_of(tmp_path, **wide, samples=40), "train"))) == 32


@pytest.mark.parametrize("body", ["x = x.reshape(8, -1)", "assert len(x) == 8, 'must be 8'"])
def test_code_that_runs_at_one_size_only_is_traced_at_that_one(tmp_path: Path, body: str) -> None:
    found = trace_memory(job_of(tmp_path, body=body), "train")
    assert sizes(found) == [8]
    assert [size for size, _ in found.untraced] == [4, 2, 1]
    assert all(why.startswith(("RuntimeError", "AssertionError")) for _, why in found.untraced)
    assert float(torch.ones(3).sum()) == 3.0


def test_a_loop_that_is_left_early_is_asked_again_for_the_sizes_it_left_out(tmp_path: Path) -> None:
    left = trace_memory(job_of(tmp_path, body="if number == 3: break"), "train")
    assert (sizes(left), left.untraced) == ([8, 4, 2, 1], ())
    with pytest.raises(TraceFailed, match="was left before the 2 batches"):
        trace_memory(job_of(tmp_path, body="if number == 1: break"), "train")


PARSES = (
    "p = __import__('argparse').ArgumentParser(); p.add_argument('--data', required=True); "
    "p.parse_args()"
)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("sys.exit(3)", r"line 10, called sys.exit\(3\) while Supple ran it"),
        (PARSES, r"line 10, reads a command line \(the following arguments .* --data\)"),
    ],
)
def test_a_script_that_ends_itself_says_so(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(TraceFailed, match=words):
        trace_memory(job_of(tmp_path, body=body), "train")


def test_what_a_script_prints_is_not_the_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_memory(job_of(tmp_path, body="print('step', sys.argv)"), "train")
    said = capsys.readouterr()
    assert said.out == ""
    assert f"step ['{tmp_path}/job.py']" in said.err


# -- ordinary habits -------------------------------------------------------------------------------

HABIT = """
import torch
import torch.nn.functional as F
from torch import nn

def build():
    return nn.Sequential(
        nn.Linear(256, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 10))

def loss_of(model, x, y):
    return F.cross_entropy(model(x).float(), y)

def train(job):
    model = job.model({build})
    {after}
    job.optimizer(torch.optim.AdamW, lr=1e-3)
    data = torch.utils.data.TensorDataset(torch.zeros(512, 256), torch.zeros(512).long())
    for x, y in job.batches(data, batch_size=512):
        {each}
        {step}
"""
PLAIN = {"build": "build", "after": "", "each": "", "step": "job.step(loss_of(model, x, y))"}
AUTOCAST = "with torch.autocast('{}', {}): loss = loss_of(model, x, y)\n        job.step(loss)"
ON_CPU = AUTOCAST.format("cpu", "torch.bfloat16")
HABITS: dict[str, dict[str, str]] = {
    "plain": {},
    "bfloat16 in the factory": {
        "build": "lambda: build().to(torch.bfloat16)", "each": "x = x.bfloat16()",
    },
    "bfloat16 after it": {
        "after": "model = model.to(torch.bfloat16)", "each": "x = x.bfloat16()",
    },
    "half": {"after": "model.half()", "each": "x = x.half()"},
    "device": {"after": "model.to(torch.device('cpu'))"},
    "autocast": {"step": ON_CPU},
    "a value read": {"step": "loss = loss_of(model, x, y); job.step(loss); print(loss.item())"},
    "a value formatted": {
        "step": "loss = loss_of(model, x, y); job.step(loss); print(f'{loss:.3f} {loss}')"
    },
    "finite": {"step": "loss = loss_of(model, x, y); assert loss.isfinite(); job.step(loss)"},
    "called twice": {"step": "job.step(loss_of(model, x, y) + loss_of(model, x + 1, y))"},
    "evaluated": {
        "each": "model.eval(); F.one_hot(model(x[:4]).detach().argmax(1), 10); model.train()",
    },
}  # fmt: skip


def habit(tmp_path: Path, **changes: str) -> Path:
    path = tmp_path / "habit.py"
    path.write_text(HABIT.format(**PLAIN | changes))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", HABITS)
def test_the_memory_of_an_ordinary_habit_is_what_it_allocates(tmp_path: Path, name: str) -> None:
    script = habit(tmp_path, **HABITS[name])
    trace = trace_memory(str(script), "train").traces[0]
    assert trace.micro_batch_size == 512
    assert trace.peak_bytes == pytest.approx(really(script, 512), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "like"),
    [
        ({"build": "lambda: torch.compile(build())"}, {}),
        ({"after": "step = torch.compile(model)", "step": "job.step(loss_of(step, x, y))"}, {}),
        ({"after": "model.compile()"}, {}),
        ({"step": AUTOCAST.format("cuda", "torch.bfloat16")}, {"step": ON_CPU}),
        ({"step": AUTOCAST.format("cuda", "dtype=torch.float16")}, {"step": ON_CPU}),
    ],
)
def test_what_is_not_here_is_traced_as_what_it_stands_for(
    tmp_path: Path, changes: dict[str, str], like: dict[str, str]
) -> None:
    """A compiled model as it is written, autocast of an accelerator as the processor's."""
    found, other = (
        trace_memory(str(habit(tmp_path, **given)), "train").traces[0] for given in (changes, like)
    )
    assert found == other


def test_every_size_is_told_before_it_is_traced(tmp_path: Path) -> None:
    told: list[int] = []
    found = trace_memory(job_of(tmp_path, batch=4), "train", on_size=told.append)
    assert sorted(told) == sorted(sizes(found))


@pytest.mark.slow
def test_nothing_of_torch_is_changed_after_a_trace(tmp_path: Path) -> None:
    before = (torch.compile, torch.utils.swap_tensors, nn.Module.compile, autocast.__init__)
    trace_memory(job_of(tmp_path), "train")
    assert before == (torch.compile, torch.utils.swap_tensors, nn.Module.compile, autocast.__init__)
