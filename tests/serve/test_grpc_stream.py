"""ModelStreamInfer, ModelConfig, ModelStatistics and RepositoryIndex. Nothing listens."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from supple.serve.executor import Executor
from supple.serve.grpc_surface import GrpcSurface
from supple.serve.meters import Meters
from supple.serve.models.model import ServedModel
from supple.serve.protocol import grpc as oip
from supple.serve.surface import Surface, SurfaceSettings
from tests.serve.test_grpc_surface import TOKEN, Context, Doubles, called, infer


class Counts:
    """Streams as many parts as its input says; fails at a negative one."""

    inputs = {"x": "float32[2]"}  # noqa: RUF012

    def predict(self, batch: Any) -> Any:
        return batch

    def stream(self, batch: Any) -> Iterator[Any]:
        if (batch < 0).any():
            raise ValueError("SECRET")
        for index in range(int(batch[0, 0])):
            yield {"part": np.asarray([index])}


class Gated(Doubles):
    """Holds a request of zeros until it is let go."""

    max_batch = 1

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.seen: list[float] = []

    def predict(self, batch: Any) -> Any:
        self.seen.append(float(batch[0, 0]))
        if batch[0, 0] == 0:
            assert self.gate.wait(30.0)
        return super().predict(batch)


Scenario = Callable[[Any, "asyncio.Queue[bytes | None]", GrpcSurface, Context], Awaitable[Any]]


def streaming(user: Any, scenario: Scenario, metadata: Any = TOKEN) -> tuple[Any, Meters]:
    """Run `scenario` with the iterator of responses and the queue of requests; None ends them."""

    async def go() -> tuple[Any, Meters]:
        model = ServedModel(user, name="m")
        executor = Executor(model, timeout_s=30.0)
        meters = Meters(model="m", replica="r")
        surface = Surface(model, executor, meters, SurfaceSettings(tokens=("known",)))
        grpc_surface = GrpcSurface(surface, meters)
        sent: asyncio.Queue[bytes | None] = asyncio.Queue()

        async def requests() -> AsyncIterator[bytes]:
            while (wire := await sent.get()) is not None:
                yield wire

        context = Context(metadata)
        responses = grpc_surface.stream(requests(), context)
        try:
            async with asyncio.timeout(30.0):
                return await scenario(responses, sent, grpc_surface, context), meters
        finally:
            executor.close()

    return asyncio.run(go())


def all_of(*messages: Any) -> Scenario:
    async def scenario(responses: Any, sent: Any, *_: Any) -> list[Any]:
        for message in (*messages, None):
            sent.put_nowait(None if message is None else message.SerializeToString())
        make = oip.MESSAGES["ModelStreamInferResponse"]
        return [make.FromString(wire) async for wire in responses]

    return scenario


def numbered(message: Any, number: int) -> Any:
    message.id = str(number)
    return message


def final(response: Any) -> bool:
    return response.infer_response.parameters["triton_final_response"].bool_param


def test_each_request_of_a_stream_is_answered_in_its_order() -> None:
    sent = [numbered(infer(i, i), i) for i in range(50)]
    found, meters = streaming(Doubles(), all_of(*sent))
    assert [r.infer_response.id for r in found] == [str(i) for i in range(50)]
    raws = [np.frombuffer(r.infer_response.raw_output_contents[0], "<f4")[0] for r in found]
    assert raws == [2.0 * i for i in range(50)]
    assert all(final(r) and not r.error_message for r in found)
    assert meters.num_arrived == 50 and 'status="200"} 50.0\n' in meters.text().decode()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (infer(1.0), "needs 2 elements"),
        (infer(1.0, 2.0, name="other"), "no model 'other'"),
        (infer(-1.0, 2.0), "the model failed on this request"),
    ],
)
@pytest.mark.parametrize("user", [Doubles, Counts])
def test_a_request_that_fails_is_answered_by_its_reason_and_the_stream_goes_on(
    user: type, bad: Any, words: str
) -> None:
    found, _ = streaming(user(), all_of(infer(1, 1), numbered(bad, 7), infer(1, 1)))
    assert [bool(r.error_message) for r in found] == [False, True, False]
    assert words in found[1].error_message and "SECRET" not in found[1].error_message
    assert found[1].infer_response.id == "7"


def test_bytes_that_are_no_request_are_answered_too() -> None:
    async def scenario(responses: Any, sent: Any, *_: Any) -> Any:
        sent.put_nowait(b"\xff\xff")
        return oip.MESSAGES["ModelStreamInferResponse"].FromString(await anext(responses))

    for user in (Doubles(), Counts()):
        found, _ = streaming(user, scenario)
        assert found.error_message


def test_a_model_that_streams_answers_with_a_message_for_each_part() -> None:
    found, _ = streaming(Counts(), all_of(numbered(infer(3, 0), 1), numbered(infer(2, 0), 2)))
    assert [r.infer_response.id for r in found] == ["1", "1", "1", "2", "2"]
    parts = [np.frombuffer(r.infer_response.raw_output_contents[0], "<i8")[0] for r in found]
    assert parts == [0, 1, 2, 0, 1] and not any(map(final, found))


def test_an_empty_last_message_is_sent_to_those_who_ask_for_it() -> None:
    sent = numbered(infer(2, 0), 1)
    sent.parameters["triton_enable_empty_final_response"].bool_param = True
    found, _ = streaming(Counts(), all_of(sent))
    assert [final(r) for r in found] == [False, False, True]
    assert found[2].infer_response.id == "1" and not found[2].infer_response.outputs


@pytest.mark.parametrize("user", [Doubles, Counts])
def test_a_sequence_is_refused_by_name_in_a_stream(user: type) -> None:
    sent = infer(1, 1)
    sent.parameters["sequence_id"].int64_param = 5
    (found,), _ = streaming(user(), all_of(sent))
    assert "'sequence_id'" in found.error_message


def test_a_priority_is_refused_where_there_is_no_queue() -> None:
    sent = infer(1, 1)
    sent.parameters["priority"].int64_param = 1
    (found,), _ = streaming(Doubles(), all_of(sent))
    assert not found.error_message
    (found,), _ = streaming(Counts(), all_of(sent))
    assert "'priority' of a stream is not supported" in found.error_message


def test_a_stream_without_a_token_is_refused() -> None:
    async def scenario(responses: Any, _: Any, __: Any, context: Context) -> Any:
        assert [wire async for wire in responses] == []
        return context

    context, meters = streaming(Doubles(), scenario, metadata=())
    assert context.code is grpc.StatusCode.UNAUTHENTICATED and "token" in context.details
    assert meters.num_arrived == 0


def test_the_next_requests_are_read_while_the_first_is_computed_up_to_a_bound() -> None:
    user = Gated()

    async def scenario(responses: Any, sent: Any, surface: Any, _: Any) -> Any:
        for i in range(60):
            sent.put_nowait(infer(i, i).SerializeToString())
        first = asyncio.ensure_future(anext(responses))
        while surface._meters.num_arrived < 34:  # 32 in the queue, one out of it, one before it
            await asyncio.sleep(0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert surface._meters.num_arrived == 34
        user.gate.set()
        await first
        await anext(responses)
        while surface._meters.num_arrived < 35:
            await asyncio.sleep(0)

    streaming(user, scenario)


def test_a_client_that_leaves_ends_what_it_waits_for() -> None:
    user = Gated()

    async def scenario(responses: Any, sent: Any, *_: Any) -> None:
        for i in range(20):
            sent.put_nowait(infer(i, i).SerializeToString())
        first = asyncio.ensure_future(anext(responses))
        while not user.seen:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        await responses.aclose()
        user.gate.set()
        for _ in range(100):
            await asyncio.sleep(0)

    streaming(user, scenario)
    assert user.seen == [0.0], "requests that nobody waits for are not computed"


def test_the_configuration_over_grpc_is_the_one_of_the_public_client() -> None:
    public: Any = pytest.importorskip("tritonclient.grpc.service_pb2")
    asked: Any = oip.MESSAGES["ModelConfigRequest"](name="m")  # type: ignore[call-arg]
    answer, _, _ = called("ModelConfig", asked)
    found = public.ModelConfigResponse.FromString(answer.SerializeToString()).config
    assert found.name == "m" and found.max_batch_size == 64 and found.backend == "supple"
    assert [(t.name, t.data_type, [*t.dims]) for t in found.input] == [("x", 11, [2])]
    assert [(t.name, t.data_type, [*t.dims]) for t in found.output] == [("y", 11, [2])]
    assert found.dynamic_batching.priority_levels == 9
    assert not found.model_transaction_policy.decoupled


def test_the_statistics_over_grpc_are_those_of_the_public_client() -> None:
    public: Any = pytest.importorskip("tritonclient.grpc.service_pb2")
    for name in ("", "m"):
        asked: Any = oip.MESSAGES["ModelStatisticsRequest"](name=name)  # type: ignore[call-arg]
        answer, _, _ = called("ModelStatistics", asked)
        (found,) = public.ModelStatisticsResponse.FromString(answer.SerializeToString()).model_stats
        assert (found.name, found.version, found.inference_count) == ("m", "1", 0)
    asked = oip.MESSAGES["ModelStatisticsRequest"](name="other")  # type: ignore[call-arg]
    _, context, _ = called("ModelStatistics", asked)
    assert context.code is grpc.StatusCode.NOT_FOUND


def test_every_field_of_a_statistic_has_the_number_that_the_public_client_reads() -> None:
    public: Any = pytest.importorskip("tritonclient.grpc.service_pb2")
    durations = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    names = (*durations, "cache_hit", "cache_miss")
    stats = {name: {"count": i, "ns": i * 10} for i, name in enumerate(names, 1)}
    batch = {n: {"count": i, "ns": i} for i, n in enumerate(names[3:6], 1)} | {"batch_size": 4}
    made = oip.MESSAGES["ModelStatistics"](  # type: ignore[call-arg]
        last_inference=1,
        inference_count=2,
        execution_count=3,
        inference_stats=stats,
        batch_stats=[batch],
    )
    found = public.ModelStatistics.FromString(made.SerializeToString())
    assert (found.last_inference, found.inference_count, found.execution_count) == (1, 2, 3)
    for name, wanted in stats.items():
        one = getattr(found.inference_stats, name)
        assert {"count": one.count, "ns": one.ns} == wanted
    assert found.batch_stats[0].batch_size == 4 and found.batch_stats[0].compute_output.ns == 3


def test_the_index_over_grpc_lists_the_model() -> None:
    answer, _, _ = called("RepositoryIndex", oip.MESSAGES["RepositoryIndexRequest"]())
    assert [(m.name, m.version, m.state) for m in answer.models] == [("m", "1", "READY")]
    _, context, _ = called("RepositoryIndex", oip.MESSAGES["RepositoryIndexRequest"](), ())
    assert context.code is grpc.StatusCode.UNAUTHENTICATED
