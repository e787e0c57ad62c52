"""Content codings of HTTP bodies: gzip and deflate, of requests and of answers.

A body is decompressed into at most the largest accepted size. An answer is compressed if the client
accepts it and it becomes smaller.
"""

import asyncio
import re
import zlib
from typing import Final

from supple.serve.protocol.refusal import refuse

ACCEPTED: Final = b"gzip, deflate"
_WINDOW_BITS: Final = {b"gzip": 31, b"x-gzip": 31, b"deflate": 15}
"""zlib's `wbits` of a coding; `deflate` of HTTP is deflate in the format of zlib."""
_LEVEL: Final = 1
"""Fastest level, 20 ms a MB of JSON numbers; level 6 takes 13 times as long for 4 % of the size."""
_LEAST_BYTES: Final = 500
"""Smaller answers are sent as they are."""
_THREAD_BYTES: Final = 128 * 1024
"""Larger answers are compressed in another thread."""
_SAMPLE_BYTES: Final = 32 * 1024
_WORTH: Final = 0.9
"""A larger answer is compressed if its first `_SAMPLE_BYTES` shrink to this share: raw floats do
not, and would take 30 ms a MB."""
_QUALITY: Final = re.compile(rb"\s*;\s*q\s*=\s*([0-9.]+)")


def check_coding(coding: bytes) -> None:
    """Raise `Refused` (415) for a Content-Encoding other than gzip, deflate and identity."""
    if coding.strip().lower() not in (b"identity", b"", *_WINDOW_BITS):
        shown = coding[:40].decode("latin-1")
        refuse(f"a body with Content-Encoding {shown!r} is not accepted; gzip and deflate are", 415)


def decompress(body: bytes, coding: bytes, most: int) -> bytes:
    """Return the body without its Content-Encoding. Raises `Refused` for one that is damaged (400)
    or has more than `most` bytes (413)."""
    bits = _WINDOW_BITS.get(coding.strip().lower())
    if bits is None:
        return body
    name = coding.decode("latin-1")[:40]
    unpack = zlib.decompressobj(bits)
    try:
        whole = unpack.decompress(body, most + 1)
    except zlib.error as error:
        refuse(f"the body is not {name}: {error}")
    if len(whole) > most:
        refuse(
            f"the body has more than {most} bytes after decompression, and at most {most} are "
            "accepted (--max-body)",
            413,
        )
    if not unpack.eof:
        refuse(f"the body ends inside its {name} data")
    if unpack.unused_data:
        refuse(f"{len(unpack.unused_data)} bytes follow the {name} data of the body")
    return whole


def accepted(accept: bytes) -> bytes | None:
    """Return the coding for an answer to a request with this Accept-Encoding; None: none."""
    best, best_quality = None, 0.0
    for part in accept.lower().split(b","):
        name, _, rest = part.partition(b";")
        found = _QUALITY.match(b";" + rest) if rest else None
        try:
            quality = float(found[1]) if found else 1.0
        except ValueError:
            continue
        coding = {b"*": b"gzip", b"x-gzip": b"gzip"}.get(name.strip(), name.strip())
        if coding in (b"gzip", b"deflate") and quality > best_quality:
            best, best_quality = coding, quality
    return best


async def compress(content: bytes, accept: bytes) -> tuple[bytes, bytes | None]:
    """Return the answer in the best coding that `accept` allows, and the coding; None if it is sent
    as it is."""
    coding = accepted(accept)
    if coding is None or len(content) < _LEAST_BYTES:
        return content, None
    sample = content[:_SAMPLE_BYTES]
    if len(content) > len(sample) and len(_packed(sample, coding)) > _WORTH * len(sample):
        return content, None
    if len(content) > _THREAD_BYTES:
        packed = await asyncio.to_thread(_packed, content, coding)
    else:
        packed = _packed(content, coding)
    return (packed, coding) if len(packed) < len(content) else (content, None)


def _packed(content: bytes, coding: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, wbits=_WINDOW_BITS[coding])
    return packer.compress(content) + packer.flush()
