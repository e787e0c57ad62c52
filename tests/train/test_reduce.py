"""The reducer gives the exact gradient of the global batch for shares of any size."""

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from supple.train.generation.group import CollectiveFailed, Group
from supple.train.step.buffers import ChangedBuffers
from supple.train.step.reduce import Bucket, GradientReducer, _cut
from tests.train.ranks import run_ranks

torch.manual_seed(3)
X, Y = torch.randn(10, 6), torch.randn(10, 2)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def reference() -> list[torch.Tensor]:
    model = make_model()
    F.mse_loss(model(X), Y).backward()
    return [param.grad for param in model.parameters() if param.grad is not None]


def reduced(group: Group | None, model: nn.Module, lo: int, hi: int) -> list[float]:
    reducer = GradientReducer(list(model.parameters()), ChangedBuffers(nn.Module()), num_stats=2)
    reducer.zero()
    reducer.arm(
        group,
        before_launch=lambda _: None,
        stats=lambda: [float(hi - lo), 1.0],
        buffer_weight=float(hi - lo),
    )
    if hi > lo:
        (F.mse_loss(model(X[lo:hi]), Y[lo:hi]) * ((hi - lo) / len(X))).backward()
    return reducer.finish()


@pytest.mark.parametrize("bounds", [[0, 10], [0, 5, 10], [0, 4, 7, 10], [0, 9, 10], [0, 10, 10]])
def test_gradients_are_those_of_the_whole_batch_however_it_is_shared(bounds: list[int]) -> None:
    size = len(bounds) - 1
    models = [make_model() for _ in range(size)]

    def body(group: Group) -> list[float]:
        return reduced(group, models[group.rank], bounds[group.rank], bounds[group.rank + 1])

    assert run_ranks(size, body) == [[10.0, float(size)]] * size
    for model in models:
        for param, expected in zip(model.parameters(), reference(), strict=True):
            torch.testing.assert_close(param.grad, expected)
    for model in models[1:]:
        for mine, first in zip(model.parameters(), models[0].parameters(), strict=True):
            assert mine.grad is not None and first.grad is not None
            assert torch.equal(mine.grad, first.grad)


def test_micro_batches_accumulate_before_the_reduction() -> None:
    model = make_model()
    reducer = GradientReducer(list(model.parameters()), ChangedBuffers(nn.Module()), num_stats=1)
    reducer.zero()
    (F.mse_loss(model(X[:6]), Y[:6]) * 0.6).backward()
    reducer.arm(None, before_launch=lambda _: None, stats=lambda: [10.0], buffer_weight=10.0)
    (F.mse_loss(model(X[6:]), Y[6:]) * 0.4).backward()
    reducer.finish()
    for param, expected in zip(model.parameters(), reference(), strict=True):
        torch.testing.assert_close(param.grad, expected)


def test_a_parameter_without_gradient_counts_as_zero() -> None:
    model = make_model()
    unused = nn.Parameter(torch.ones(3))
    reducer = GradientReducer(
        [*model.parameters(), unused], ChangedBuffers(nn.Module()), num_stats=1
    )
    reducer.zero()
    reducer.arm(None, before_launch=lambda _: None, stats=lambda: [10.0], buffer_weight=10.0)
    F.mse_loss(model(X), Y).backward()
    reducer.finish()
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0] * 3


def test_gradients_that_the_user_set_to_none_are_collected_again() -> None:
    model = make_model()
    reducer = GradientReducer(list(model.parameters()), ChangedBuffers(nn.Module()), num_stats=1)
    reducer.zero()
    for param in model.parameters():
        param.grad = None
    reducer.arm(None, before_launch=lambda _: None, stats=lambda: [10.0], buffer_weight=10.0)
    F.mse_loss(model(X), Y).backward()
    reducer.finish()
    for param, expected in zip(model.parameters(), reference(), strict=True):
        assert param.grad is not None
        torch.testing.assert_close(param.grad, expected)


def test_running_statistics_become_the_mean_weighted_by_samples() -> None:
    values = [torch.tensor([1.0, 2.0]), torch.tensor([4.0, 8.0])]
    samples = [1.0, 3.0]

    def body(group: Group) -> list[float]:
        model = nn.BatchNorm1d(2)
        buffers = ChangedBuffers(model, ["running_mean"])
        reducer = GradientReducer(list(model.parameters()), buffers, num_stats=1)
        reducer.zero()
        mine = model.get_buffer("running_mean")
        mine.copy_(values[group.rank])
        reducer.arm(
            group,
            before_launch=lambda _: None,
            stats=lambda: [samples[group.rank]],
            buffer_weight=samples[group.rank],
        )
        reducer.finish()
        return mine.tolist()

    assert run_ranks(2, body) == [[3.25, 6.5]] * 2


def test_a_lost_peer_fails_the_step_and_the_next_step_is_clean() -> None:
    model = make_model()

    def body(group: Group) -> None:
        if group.rank == 1:
            group.close()
            return
        with pytest.raises(CollectiveFailed):
            reduced(group, model, 0, 5)

    run_ranks(2, body)
    reduced(None, model, 0, 10)
    for param, expected in zip(model.parameters(), reference(), strict=True):
        torch.testing.assert_close(param.grad, expected)


def make_wide_model() -> nn.Module:
    """Three buckets."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6), *(nn.Linear(6, 6) for _ in range(2))))


def reducer_of(model: nn.Module, group: Group | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("supple.train.step.reduce._BUCKET_BYTES", 200)
    monkeypatch.setattr("supple.train.step.reduce._FIRST_BUCKET_BYTES", 200)
    reducer = GradientReducer(list(model.parameters()), ChangedBuffers(nn.Module()), num_stats=1)
    assert len(reducer.buckets) == 3
    arm(reducer, group)
    return reducer


def arm(reducer: GradientReducer, group: Group | None) -> None:
    reducer.zero()
    reducer.arm(group, before_launch=lambda _: None, stats=lambda: [1.0], buffer_weight=1.0)


def test_a_peer_lost_before_or_during_the_backward_pass_is_told_by_finish_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_wide_model()
    launched: list[int] = []

    def body(group: Group) -> None:
        if group.rank == 1:
            return
        reducer = reducer_of(model, group, monkeypatch)
        works = group.all_reduce

        def all_reduce(tensor: torch.Tensor) -> Any:
            launched.append(tensor.numel())
            if len(launched) == 2:
                raise CollectiveFailed("the peer is gone")
            return works(tensor)

        monkeypatch.setattr(Group, "all_reduce", lambda _self, tensor: all_reduce(tensor))
        model(X).sum().backward()
        with pytest.raises(CollectiveFailed, match="the peer is gone"):
            reducer.finish()
        reducer.abandon()

    run_ranks(2, body)
    assert len(launched) == 2


def test_an_abandoned_reduction_that_goes_on_adds_nothing_to_a_later_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that was only slow, such as one that was suspended, comes back to a reduction that
    the others have given up."""
    model = make_wide_model()
    aborted, abandoned = threading.Event(), threading.Event()
    seen: list[torch.Tensor] = []
    late: list[Bucket] = []

    def body(group: Group) -> None:
        if group.rank == 1:
            assert abandoned.wait(30)
            for bucket in late:
                group._group.allreduce([torch.full_like(bucket.flat, 1000.0)]).wait()
            return
        reducer = reducer_of(model, group, monkeypatch)
        model(X).sum().backward()
        works = reducer._works
        late.extend(reducer.buckets[: len(works)])
        assert len(late) == 2
        aborted.set()
        with pytest.raises(CollectiveFailed, match="aborted"):
            reducer.finish()
        reducer.abandon()
        arm(reducer, None)
        model(X).sum().backward()
        before = [bucket.flat.clone() for bucket in reducer.buckets]
        abandoned.set()
        for work in works:
            work.wait()
        assert all(bucket.flat.equal(b) for bucket, b in zip(reducer.buckets, before, strict=True))
        reducer.finish()
        seen.extend(param.grad for param in model.parameters())

    run_ranks(2, body, aborted=aborted)
    expected = make_wide_model()
    expected(X).sum().backward()
    for grad, param in zip(seen, expected.parameters(), strict=True):
        torch.testing.assert_close(grad, param.grad)


def test_the_tail_rides_in_a_float32_bucket_even_for_a_bfloat16_model() -> None:
    params = [nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))]
    buckets = _cut(params, tail=3)
    assert [bucket.flat.dtype for bucket in buckets] == [torch.bfloat16, torch.float32]
    assert buckets[-1].tail.numel() == 3


def test_buckets_hold_every_parameter_once_in_backward_order() -> None:
    params = [nn.Parameter(torch.zeros(1_500_000)) for _ in range(30)]
    buckets = _cut(params, tail=1)
    order = [param for bucket in buckets for param in bucket.params]
    assert [id(param) for param in order] == [id(param) for param in reversed(params)]
    assert len(buckets) > 3
