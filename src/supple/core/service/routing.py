"""Which replica the ingress sends a request to: the one with the fewest in hand (`leastconn`).

In production Ray Serve's HAProxy does it, told so by `BALANCE`; the simulator does it by
`LeastConnections`. Of equals HAProxy takes the one whose number changed longest ago: it keeps
servers in the order of their connections, and puts one that changed behind its equals.
"""

from typing import Final, final

BALANCE: Final = "leastconn"
"""HAProxy's name for it."""


@final
class LeastConnections:
    """Replicas by the number of requests each has in hand, waiting or at work."""

    def __init__(self) -> None:
        self._in_hand: dict[int, int] = {}
        self._levels: list[dict[int, None]] = [{}]
        """By how many they have: replicas in the order in which they came to have so many."""
        self._lowest = 0
        """No level below has a replica."""

    def add(self, replica: int) -> None:
        """From now on `replica` is sent requests; it has none."""
        self._put(replica, 0)

    def remove(self, replica: int) -> None:
        """`replica`, if it was here, is sent nothing more."""
        in_hand = self._in_hand.pop(replica, None)
        if in_hand is not None:
            del self._levels[in_hand][replica]

    def change(self, replica: int, by: int) -> None:
        """`replica` has `by` more in hand, or fewer; one that was removed is no longer counted."""
        in_hand = self._in_hand.get(replica)
        if in_hand is not None:
            del self._levels[in_hand][replica]
            self._put(replica, in_hand + by)

    def least(self) -> int | None:
        """The replica for the next request; None where there is none."""
        if not self._in_hand:
            return None
        while not self._levels[self._lowest]:
            self._lowest += 1
        return next(iter(self._levels[self._lowest]))

    def _put(self, replica: int, in_hand: int) -> None:
        while len(self._levels) <= in_hand:
            self._levels.append({})
        self._in_hand[replica] = in_hand
        self._levels[in_hand][replica] = None
        self._lowest = min(self._lowest, in_hand)
