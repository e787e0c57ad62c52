"""Which requests were being computed when a replica died: what kills its replica is not tried a
third time, and not in company a second time.

The ingress gives every request a serial number and sends it again when its replica dies. Each
replica notes in a table, which all replicas of one machine share, the numbers it computes and takes
them off again. A number that is there when it comes a second time was left by a replica that died
over it. Requests that only waited are not noted: to lose one's replica while another's request is
computed says nothing.

The table is memory of a file: a note costs about a microsecond, and outlives the process.
"""

import mmap
import os
import struct
from pathlib import Path
from typing import Final, final

from supple.serve.protocol.rest import Refused

SERIAL: Final = b"x-supple-serial"
"""The header, or gRPC metadata, in which the ingress writes the number; a client's own is
replaced."""
MOST_DEATHS: Final = 2
"""So many replicas may die over one request."""
_ENTRY: Final = struct.Struct("<QBB6x")
"""Serial number, replicas that died over it, whether it is computed now."""
_SLOTS: Final = 65_536
_PROBES: Final = 8
_ALL_FREE: Final = bytes(_PROBES * _ENTRY.size)


@final
class Attempts:
    """The table in the file at `path`, made if it is not there."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` if there can be none."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(handle, _SLOTS * _ENTRY.size)
            self._table = mmap.mmap(handle, _SLOTS * _ENTRY.size)
        finally:
            os.close(handle)

    def refuse_deadly(self, serial: int) -> None:
        """Raise `Refused` (500) if as many replicas died over the request as may."""
        if (deaths := self.deaths(serial)) >= MOST_DEATHS:
            self.end(serial)
            raise Refused(
                f"{deaths} replicas died while they computed this request; it is not tried again",
                500,
            )

    def deaths(self, serial: int) -> int:
        """Replicas that died while they computed the request, which is computed nowhere now."""
        found, deaths, active = _ENTRY.unpack_from(self._table, self._at(serial))
        return deaths + active if found == serial else 0

    def begin(self, serial: int) -> None:
        """The request is computed from now on."""
        at = self._at(serial)
        found, deaths, active = _ENTRY.unpack_from(self._table, at)
        if found != serial:
            deaths = active = 0
        _ENTRY.pack_into(self._table, at, serial, min(deaths + active, 255), 1)

    def pause(self, serial: int) -> None:
        """It is not computed for a while, or not here; who died over it is remembered."""
        at = self._at(serial)
        found, deaths, _ = _ENTRY.unpack_from(self._table, at)
        if found == serial:
            _ENTRY.pack_into(self._table, at, serial if deaths else 0, deaths, 0)

    def end(self, serial: int) -> None:
        """It has its answer."""
        at = self._at(serial)
        if _ENTRY.unpack_from(self._table, at)[0] == serial:
            _ENTRY.pack_into(self._table, at, 0, 0, 0)

    def _at(self, serial: int) -> int:
        """Where the request is noted, or else would be: in a free place, or that of one that was
        never asked again."""
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
    """The number in the header's value, which is a UUID; None if it is none."""
    try:
        return int(text.replace(b"-", b"")[:16], 16) or None
    except ValueError:
        return None
