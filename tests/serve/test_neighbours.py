"""Requests that share a batch: what is wrong with one is said to that one, of that one alone."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from supple.serve.batch import run_batch
from supple.serve.models.faults import ModelFault
from supple.serve.models.model import ServedModel
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import RequestLimits, decode_request
from tests.serve.test_surface import Service

SECRET = "the secret of another caller"
URL = "/v2/models/m/infer"


class Gated:
    """Waits at the gate with its first batch, so that the requests after it become one batch."""

    inputs = {"s": "bytes[]"}  # noqa: RUF012
    max_batch = 32

    def __init__(self, answer: Callable[[list[str]], Any]) -> None:
        self.answer = answer
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()

    def predict(self, batch: Any) -> Any:
        self.entered.set()
        self.gate.wait()
        texts = [item.decode("utf-8", "surrogateescape") for item in batch]
        self.batches.append(texts)
        return self.answer(texts)


def body(*texts: str, **extra: Any) -> dict[str, Any]:
    tensor = {"name": "s", "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}
    return {"inputs": [tensor], **extra}


def together(
    user: Gated, *requests: dict[str, Any], **settings: Any
) -> tuple[Sequence[httpx.Response], str]:
    """The answers to requests that were asked while the model was busy, and the metrics after."""

    async def go() -> tuple[Sequence[httpx.Response], str]:
        async with Service(user=user, **settings) as service:
            first = asyncio.ensure_future(service.client.post(URL, json=body("first")))
            await service.entered()
            others = [
                asyncio.ensure_future(service.client.post(URL, json=request))
                for request in requests
            ]
            while service.executor.num_waiting < len(others):
                await asyncio.sleep(0)
            user.gate.set()
            await first
            found = await asyncio.gather(*others)
            return found, (await service.client.get("/metrics")).text

    return asyncio.run(go())


def alone(answer: Callable[[list[str]], Any], request: dict[str, Any]) -> httpx.Response:
    return together(Gated(answer), request)[0][0]


def raises(texts: list[str]) -> Any:
    if SECRET in texts:
        raise ValueError(f"cannot read {texts}")
    return texts


def leaves(texts: list[str]) -> Any:
    if SECRET in texts:
        raise SystemExit(SECRET)
    return texts


def cancels(texts: list[str]) -> Any:
    if SECRET in texts:
        raise asyncio.CancelledError(SECRET)
    return texts


def interrupts(texts: list[str]) -> Any:
    if SECRET in texts:
        raise KeyboardInterrupt(SECRET)
    return texts


def closes(texts: list[str]) -> Any:
    if SECRET in texts:
        raise GeneratorExit(SECRET)
    return texts


class OddText(str):
    def encode(self, *_: Any) -> bytes:
        raise RuntimeError(self)


class LeavingText(str):
    def encode(self, *_: Any) -> bytes:
        raise KeyboardInterrupt(self)


def cannot_be_encoded(texts: list[str]) -> Any:
    return [OddText(text) if text == SECRET else text for text in texts]


def interrupts_when_encoded(texts: list[str]) -> Any:
    return [LeavingText(text) if text == SECRET else text for text in texts]


def is_not_utf8(texts: list[str]) -> Any:
    return [text + "\udcff" if text == SECRET else text for text in texts]


def is_an_object(texts: list[str]) -> Any:
    return [{text: 1} if text == SECRET else text for text in texts]


def is_nan(texts: list[str]) -> Any:
    return np.array([np.nan if text == SECRET else 1.0 for text in texts])


def is_complex(texts: list[str]) -> Any:
    return np.ones(len(texts), np.complex64 if SECRET in texts else np.float32)


def is_short(texts: list[str]) -> Any:
    return np.ones(len(texts) - (SECRET in texts))


def has_another_shape(texts: list[str]) -> Any:
    return [np.ones((2, 2) if text == SECRET else 3) for text in texts]


def is_named_otherwise(texts: list[str]) -> Any:
    return {SECRET if SECRET in texts else "y": texts}


def cannot_be_an_array(texts: list[str]) -> Any:
    class Odd:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise KeyError(SECRET)

    return Odd() if SECRET in texts else texts


def interrupts_as_an_array(texts: list[str]) -> Any:
    class Odd:
        def __array__(self, *_: Any, **__: Any) -> Any:
            raise KeyboardInterrupt(SECRET)

    return [Odd() if text == SECRET else 1.0 for text in texts]


def cannot_be_looked_through(texts: list[str]) -> Any:
    class Odd(dict[str, Any]):
        def items(self) -> Any:
            raise KeyError(SECRET)

    return Odd() if SECRET in texts else {"output": texts}


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        *[(answer, 500) for answer in (raises, leaves, is_not_utf8, is_an_object, is_nan)],
        *[(answer, 500) for answer in (is_complex, is_short, cannot_be_an_array)],
        *[(answer, 500) for answer in (cancels, interrupts, closes)],
        *[(answer, 500) for answer in (cannot_be_encoded, interrupts_when_encoded)],
        *[(answer, 500) for answer in (interrupts_as_an_array, cannot_be_looked_through)],
        (has_another_shape, 200),
        (is_named_otherwise, 200),
    ],
)
def test_an_output_that_cannot_be_sent_fails_its_own_request_and_nothing_tells_of_it(
    answer: Callable[[list[str]], Any], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    user = Gated(answer)
    texts = ["a", "b", SECRET, "c", "d", "e", "f", "g"]
    found, metrics = together(user, *(body(text) for text in texts))
    assert user.batches[1] == texts, "they were one batch"
    statuses = [response.status_code for response in found]
    assert statuses == [status if text == SECRET else 200 for text in texts]
    told = [r.text for text, r in zip(texts, found, strict=True) if text != SECRET]
    if answer is not is_named_otherwise:  # a name is the author's; batches of it are one name's
        assert SECRET not in "".join([*told, metrics, caplog.text])
    assert "Traceback" not in found[2].text and __file__ not in found[2].text
    if answer is raises:
        assert "in raises" in caplog.text and "ValueError" in caplog.text


def test_one_bad_request_of_32_costs_a_few_calls_and_not_32() -> None:
    user = Gated(raises)
    found, _ = together(user, *(body(SECRET if i == 11 else "x") for i in range(32)))
    assert [r.status_code for r in found] == [500 if i == 11 else 200 for i in range(32)]
    assert len(user.batches) <= 2 + 2 * 5


def test_a_failed_batch_is_not_taken_apart_when_its_time_is_over() -> None:
    user = Gated(raises)
    user.gate.set()
    requests = [
        decode_request(json.dumps(body(text)).encode(), limits=RequestLimits()).inputs
        for text in ("a", SECRET, "b")
    ]
    found, at_once = run_batch(ServedModel(user, name="m"), requests, within_s=0.0)
    assert len(user.batches) == 1 and not at_once
    assert [type(answer) for answer in found] == [Refused] * 3
    refusals = [answer for answer in found if isinstance(answer, Refused)]
    assert {(answer.status, answer.retry_after_s) for answer in refusals} == {(503, 1.0)}
    assert SECRET not in "".join(map(str, found))


@pytest.mark.parametrize("retry_safe", [True, False])
def test_a_fault_that_takes_no_second_call_is_found_at_once(retry_safe: bool) -> None:
    user = Gated(raises)
    user.retry_safe = retry_safe  # type: ignore[attr-defined]
    user.gate.set()
    texts = [SECRET] if retry_safe else ["a", SECRET]
    requests = [
        decode_request(json.dumps(body(text)).encode(), limits=RequestLimits()).inputs
        for text in texts
    ]
    found, at_once = run_batch(ServedModel(user, name="m"), requests)
    assert at_once, "what it took is what such a batch takes"
    assert [type(answer) for answer in found] == [ModelFault] * len(texts)


def test_requests_of_a_model_that_may_not_compute_twice_fail_alike_and_learn_nothing() -> None:
    user = Gated(raises)
    user.retry_safe = False  # type: ignore[attr-defined]
    found, _ = together(user, body("a"), body(SECRET), body("b"))
    assert [r.status_code for r in found] == [500, 500, 500]
    assert len(user.batches) == 2 and SECRET not in "".join(r.text for r in found)


@pytest.mark.parametrize(
    "answer", [is_not_utf8, cannot_be_encoded, interrupts_when_encoded, interrupts_as_an_array]
)
def test_an_output_that_cannot_be_sent_fails_alone_though_nothing_is_computed_twice(
    answer: Callable[[list[str]], Any],
) -> None:
    user = Gated(answer)
    user.retry_safe = False  # type: ignore[attr-defined]
    found, _ = together(user, body("a"), body(SECRET), body("b"))
    assert [r.status_code for r in found] == [200, 500, 200]
    assert len(user.batches) == 2


def test_bytes_that_are_not_utf8_are_refused_in_json_and_sent_as_binary() -> None:
    def answer(texts: list[str]) -> Any:
        return [b"\xff" + text.encode() for text in texts]

    refused = alone(answer, body("a"))
    assert refused.status_code == 406 and "set binary_data" in refused.json()["error"]
    sent = alone(answer, body("a", parameters={"binary_data_output": True}))
    assert sent.status_code == 200 and sent.content.endswith(b"\x02\0\0\0\xffa")


def test_a_tensor_of_texts_is_sent_as_text_and_a_row_that_holds_no_text_fails_alone() -> None:
    def answer(texts: list[str]) -> Any:
        found = np.array([[text, "é"] for text in texts], dtype=object)
        found[[text == SECRET for text in texts], 1] = 3
        return found

    found, _ = together(Gated(answer), body("a"), body(SECRET), body("b"))
    assert [r.status_code for r in found] == [200, 500, 200]
    assert [r.json()["outputs"][0]["data"] for r in (found[0], found[2])] == [
        ["a", "é"],
        ["b", "é"],
    ]


def test_an_output_whose_name_cannot_be_printed_is_a_fault() -> None:
    found = alone(lambda texts: {"a\nb": texts}, body("a"))
    assert found.status_code == 500
    assert "an output whose name cannot be printed" in found.json()["error"]


def lengths(texts: list[str]) -> list[int]:
    return [int(text) if text.isdigit() else 1 for text in texts]


def ragged_arrays(texts: list[str]) -> Any:
    return [np.arange(n) for n in lengths(texts)]


def ragged_tensors(texts: list[str]) -> Any:
    return [torch.arange(n) for n in lengths(texts)]


def ragged_lists(texts: list[str]) -> Any:
    return {"output": [list(range(n)) for n in lengths(texts)]}


def ragged_objects(texts: list[str]) -> Any:
    found = np.empty(len(texts), object)
    found[:] = [np.arange(n) for n in lengths(texts)]
    return found


def padded(texts: list[str]) -> Any:
    wide = np.zeros((len(texts), max(lengths(texts))), np.int64)
    for row, n in zip(wide, lengths(texts), strict=True):
        row[:n] = np.arange(n)
    return wide


@pytest.mark.parametrize(
    ("answer", "is_declared"),
    [
        *[(answer, True) for answer in (ragged_arrays, ragged_tensors, ragged_lists)],
        *[(answer, False) for answer in (ragged_arrays, ragged_tensors, ragged_lists)],
        (ragged_objects, True),
        (ragged_objects, False),
        (padded, True),  # where it is not, the length is taken for the model's own
    ],
)
def test_an_answer_is_as_long_under_load_as_alone(
    answer: Callable[[list[str]], Any], is_declared: bool
) -> None:
    user = Gated(answer)
    if is_declared:
        user.outputs = {"output": "int64[-1]"}  # type: ignore[attr-defined]
    wanted = ["9", "1", "3", "6", "2"]
    found, _ = together(user, *(body(text) for text in wanted))
    for text, response in zip(wanted, found, strict=True):
        output = response.json()["outputs"][0]
        assert output["shape"] == [1, int(text)] and output["data"] == list(range(int(text)))
    if answer is ragged_arrays and is_declared:
        assert len(user.batches) == 6, "the first answer had not yet said that rows are lists"


def test_a_model_that_answers_with_lists_of_rows_gets_batches() -> None:
    user = Gated(ragged_arrays)
    user.outputs = {"output": "int64[-1]"}  # type: ignore[attr-defined]

    async def go() -> None:
        async with Service(user=user) as service:
            user.gate.set()
            assert (await service.client.post(URL, json=body("2"))).status_code == 200
            assert service.model.shares
            user.answer = padded
            assert (await service.client.post(URL, json=body("2"))).status_code == 200
            assert not service.model.shares

    asyncio.run(go())


def test_a_model_that_pads_once_its_rows_were_lists_answers_each_at_its_own_length() -> None:
    user = Gated(lambda texts: (padded if user.batches[1:] else ragged_arrays)(texts))
    user.outputs = {"output": "int64[-1]"}  # type: ignore[attr-defined]
    wanted = ["9", "1", "3", "6"]

    async def go() -> None:
        async with Service(user=user) as service:
            user.gate.set()
            assert (await service.client.post(URL, json=body("2"))).status_code == 200
            assert service.model.shares
            user.gate.clear()
            user.entered.clear()
            tasks = [asyncio.ensure_future(service.client.post(URL, json=body("1")))]
            await service.entered()
            tasks += [
                asyncio.ensure_future(service.client.post(URL, json=body(text))) for text in wanted
            ]
            while service.executor.num_waiting < len(wanted):
                await asyncio.sleep(0)
            user.gate.set()
            _, *found = await asyncio.gather(*tasks)
            assert wanted in user.batches, "they were one batch at first"
            for text, response in zip(wanted, found, strict=True):
                assert response.json()["outputs"][0]["data"] == list(range(int(text)))

    asyncio.run(go())


def test_rows_of_one_request_that_differ_in_length_fail_it_alone() -> None:
    found, _ = together(Gated(ragged_arrays), body("2", "3"), body("4"), body("5", "5"))
    assert [r.status_code for r in found] == [500, 200, 200]
    assert "send rows whose answers differ in length in separate requests" in found[0].text
    assert found[2].json()["outputs"][0]["shape"] == [2, 5]


def test_the_longest_text_of_a_batch_does_not_widen_the_others() -> None:
    def answer(texts: list[str]) -> Any:
        return ["x" * 5_000_000 if text == "long" else text for text in texts]

    found, _ = together(Gated(answer), body("long"), *(body("short") for _ in range(20)))
    assert len(found[0].json()["outputs"][0]["data"][0]) == 5_000_000
    assert {r.json()["outputs"][0]["data"][0] for r in found[1:]} == {"short"}


def test_the_words_of_a_fault_are_for_the_author_and_its_place_for_the_log() -> None:
    request = decode_request(json.dumps(body(SECRET)).encode(), limits=RequestLimits())
    user = Gated(raises)
    user.gate.set()
    with pytest.raises(ModelFault) as fault:
        ServedModel(user, name="m").predict(request.inputs)
    assert SECRET in str(fault.value), "the author, at start and in a profile, reads all of it"
    assert SECRET not in fault.value.for_client + fault.value.where
    assert "ValueError < " in fault.value.where and "in raises" in fault.value.where
