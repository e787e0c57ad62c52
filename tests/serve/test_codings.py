"""gzip and deflate of requests and answers: bounded, and only where they save something."""

import asyncio
import gzip
import json
import zlib
from typing import Any

import numpy as np
import pytest

from supple.serve.protocol.codings import accepted, compress, decompress
from supple.serve.protocol.refusal import Refused
from supple.serve.protocol.rest import RequestLimits
from tests.serve.test_surface import Service, asked


def gzipped(body: bytes) -> bytes:
    """Without the time, so that the bytes are the same in every run."""
    return gzip.compress(body, mtime=0)


PACK = {"gzip": gzipped, "x-gzip": gzipped, "deflate": zlib.compress}
URL = "/v2/models/m/infer"


@pytest.mark.parametrize("coding", [*PACK, "GZIP", "identity"])
def test_a_compressed_request_is_answered(coding: str) -> None:
    body = json.dumps(asked(1, 2)).encode()
    sent = PACK.get(coding.lower(), bytes)(body)

    async def go() -> None:
        async with Service() as service:
            headers = {"Content-Encoding": coding}
            response = await service.client.post(URL, content=sent, headers=headers)
            assert response.json()["outputs"][0]["data"] == [2.0, 4.0]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("coding", "body", "status", "words"),
    [
        ("br", b"x", 415, "'br' is not accepted; gzip and deflate are"),
        ("gzip, gzip", b"x", 415, "is not accepted"),
        ("gzip", b"{}", 400, "the body is not gzip"),
        ("gzip", b"", 400, "ends inside its gzip data"),
        ("gzip", gzipped(b"{}")[:-3], 400, "ends inside its gzip data"),
        ("gzip", gzipped(b"{}") * 3, 400, "bytes follow the gzip data"),
        ("deflate", gzipped(b"{}"), 400, "the body is not deflate"),
        ("gzip", gzipped(b" " * 1001), 413, "more than 1000 bytes after decompression"),
        ("gzip", gzipped(b" " * 1000), 400, "the body is not JSON"),
    ],
)
def test_a_compressed_request_that_is_none_is_refused(
    coding: str, body: bytes, status: int, words: str
) -> None:
    async def go() -> None:
        async with Service(limits=RequestLimits(max_body_bytes=1000)) as service:
            headers = {"Content-Encoding": coding}
            response = await service.client.post(URL, content=body, headers=headers)
            assert response.status_code == status and words in response.json()["error"]
            assert (response.headers.get("accept-encoding") == "gzip, deflate") is (status == 415)

    asyncio.run(go())


def test_a_small_body_that_would_fill_the_memory_is_never_unpacked() -> None:
    bomb = gzip.compress(bytes(50_000_000), 9)
    with pytest.raises(Refused) as refusal:
        decompress(bomb, b"gzip", 1000)
    assert refusal.value.status == 413


@pytest.mark.parametrize(
    ("accept", "coding"),
    [
        (b"gzip", b"gzip"),
        (b"deflate", b"deflate"),
        (b"gzip, deflate, br", b"gzip"),
        (b"GZip;q=0.5, deflate;q=0.8", b"deflate"),
        (b"gzip;q=0", None),
        (b"gzip; q=0, deflate", b"deflate"),
        (b"br", None),
        (b"identity", None),
        (b"*", b"gzip"),
        (b"", None),
        (b"gzip;q=much", b"gzip"),
        (b"gzip;q=1.2.3", None),
    ],
)
def test_the_coding_that_a_client_likes_most_is_taken(accept: bytes, coding: bytes | None) -> None:
    assert accepted(accept) == coding


@pytest.mark.parametrize("size", [2_000, 400_000])
def test_an_answer_that_becomes_smaller_is_compressed(size: int) -> None:
    content = json.dumps([0.5] * (size // 5)).encode()
    for coding, unpack in ((b"gzip", gzip.decompress), (b"deflate", zlib.decompress)):
        packed, used = asyncio.run(compress(content, coding))
        assert used == coding and len(packed) < len(content) / 2 and unpack(packed) == content


@pytest.mark.parametrize("size", [400, 30_000, 400_000])
def test_an_answer_that_does_not_become_smaller_is_sent_as_it_is(size: int) -> None:
    noise = np.random.default_rng(0).bytes(size)
    assert asyncio.run(compress(noise, b"gzip")) == (noise, None)


def test_answers_over_http_are_compressed_for_those_who_accept_it() -> None:
    class Long:
        inputs = {"x": "float32[2]"}  # noqa: RUF012

        def predict(self, batch: Any) -> Any:
            return np.zeros((len(batch), 1000), np.float32)

        class gate:
            set = staticmethod(lambda: None)

    async def go() -> None:
        async with Service(user=Long()) as service:
            for accept, coding in (("gzip", "gzip"), ("deflate", "deflate"), ("identity", None)):
                headers = {"Accept-Encoding": accept}
                for binary in (False, True):
                    body = asked(1, 2) | {"parameters": {"binary_data_output": binary}}
                    response = await service.client.post(URL, json=body, headers=headers)
                    assert response.headers.get("content-encoding") == coding
                    assert ("vary" in response.headers) is (coding is not None)
                    if binary:
                        end = int(response.headers["inference-header-content-length"])
                        assert response.content[end:] == bytes(4000)
                    else:
                        assert response.json()["outputs"][0]["data"] == [0.0] * 1000

    asyncio.run(go())


def test_other_paths_are_compressed_by_starlette() -> None:
    async def go() -> None:
        async with Service() as service:
            headers = {"Accept-Encoding": "gzip"}
            response = await service.client.get("/openapi.json", headers=headers)
            assert response.headers["content-encoding"] == "gzip" and response.json()["paths"]

    asyncio.run(go())
