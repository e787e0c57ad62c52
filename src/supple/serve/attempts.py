"""Table of the requests being computed, to find those that kill their replica. Such a request is
retried once, alone in its batch.

The ingress gives every request a serial number, and sends it again when its replica dies. A replica
writes the numbers it computes to a table shared by all replicas of the machine, and removes them
afterwards. If a number is already there when its request arrives, a replica died while computing
it. Waiting requests are not recorded, because they cannot cause a death.

The table is a memory-mapped file: a write takes about a microsecond and outlives the process.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Final, final

from supple.serve.protocol.refusal import Refused

SERIAL: Final = b"x-supple-serial"
"""The HTTP header, or gRPC metadata key, of the serial number. The ingress replaces a client's."""
MOST_DEATHS: Final = 2
"""Number of replica deaths after which a request is refused."""
_ENTRY: Final = struct.Struct("<QBB6x")
"""Serial number, number of replica deaths, whether it is being computed (1) or not (0)."""
_SLOTS: Final = 65_536
_PROBES: Final = 8
_ALL_FREE: Final = bytes(_PROBES * _ENTRY.size)


@final
class Attempts:
    """The table of attempts in the file at `path`, which is created if it is missing."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` if the file cannot be created or mapped."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(handle, _SLOTS * _ENTRY.size)
            self._table = mmap.mmap(handle, _SLOTS * _ENTRY.size)
        finally:
            os.close(handle)

    def refuse_deadly(self, serial: int) -> None:
        """Raise `Refused` (500) if `MOST_DEATHS` replicas died while computing the request."""
        if (deaths := self.deaths(serial)) >= MOST_DEATHS:
            self.end(serial)
            raise Refused(
                f"{deaths} replicas died while they computed this request; it is not tried again",
                500,
            )

    def deaths(self, serial: int) -> int:
        """Number of replicas that died while computing the request. Call it before `begin`."""
        found, deaths, active = _ENTRY.unpack_from(self._table, self._at(serial))
        return deaths + active if found == serial else 0

    def begin(self, serial: int) -> None:
        """Record that the request is being computed."""
        at = self._at(serial)
        found, deaths, active = _ENTRY.unpack_from(self._table, at)
        if found != serial:
            deaths = active = 0
        _ENTRY.pack_into(self._table, at, serial, min(deaths + active, 255), 1)

    def pause(self, serial: int) -> None:
        """Record that the request is not being computed now; its number of deaths is kept."""
        at = self._at(serial)
        found, deaths, _ = _ENTRY.unpack_from(self._table, at)
        if found == serial:
            _ENTRY.pack_into(self._table, at, serial if deaths else 0, deaths, 0)

    def end(self, serial: int) -> None:
        """Remove the request: it has its answer."""
        at = self._at(serial)
        if _ENTRY.unpack_from(self._table, at)[0] == serial:
            _ENTRY.pack_into(self._table, at, 0, 0, 0)

    def _at(self, serial: int) -> int:
        """Offset of the request's entry; without one, of a free entry, or of the one to replace."""
        first = serial % (_SLOTS - _PROBES) * _ENTRY.size
        places = self._table[first : first + _PROBES * _ENTRY.size]
        if places == _ALL_FREE:
            return first
        noted = [found for found, _, _ in _ENTRY.iter_unpack(places)]
        for wanted in (serial, 0):
            if wanted in noted:
                return first + noted.index(wanted) * _ENTRY.size
        return first


def parse_serial(text: bytes) -> int | None:
    """Return the number in the header's value, a UUID; None if the value is invalid."""
    try:
        return int(text.replace(b"-", b"")[:16], 16) or None
    except ValueError:
        return None
