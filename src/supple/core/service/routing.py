"""Route a request to the replica with the fewest requests in hand (`leastconn`).

In production Ray Serve's HAProxy routes, configured by `BALANCE`; in the simulator
`LeastConnections` does. Of several with the fewest, HAProxy takes the one whose number changed
longest ago: servers are ordered by connections, and a changed one goes behind its equals.
"""

from typing import Final, final

BALANCE: Final = "leastconn"
"""HAProxy's name of the algorithm."""


@final
class LeastConnections:
    """Replicas by number of requests in hand, waiting or running."""

    def __init__(self) -> None:
        self._in_hand: dict[int, int] = {}
        self._levels: list[dict[int, None]] = [{}]
        """Replicas by number of requests, in the order in which they reached that number."""
        self._lowest = 0
        """Lower bound of the first level with a replica."""

    def add(self, replica: int) -> None:
        """Start routing to `replica`, which has no requests."""
        self._put(replica, 0)

    def remove(self, replica: int) -> None:
        """Stop routing to `replica`; no effect if it is not here."""
        in_hand = self._in_hand.pop(replica, None)
        if in_hand is not None:
            del self._levels[in_hand][replica]

    def change(self, replica: int, by: int) -> None:
        """Add `by` to the requests of `replica`; no effect after it was removed."""
        in_hand = self._in_hand.get(replica)
        if in_hand is not None:
            del self._levels[in_hand][replica]
            self._put(replica, in_hand + by)

    def least(self) -> int | None:
        """Return the replica for the next request; None without replicas."""
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
