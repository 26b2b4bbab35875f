"""Which clients of a deployment are alive: each renews its lease; what a dead one held is released."""

from __future__ import annotations

import time
from collections.abc import Callable

LEASE_S = 900.0  # a suspended process loses what it holds after this


class Leases:
    """Leases by holder, which is the id of one client's deployment object."""

    def __init__(self, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s, self._clock = lease_s, clock
        self._renewed: dict[str, float] = {}

    def renew(self, holder: str) -> None:
        self._renewed[holder] = self._clock()

    def expired(self) -> list[str]:
        """Holders that did not renew in time. Each is named once."""
        at = self._clock()
        gone = [holder for holder, renewed in self._renewed.items() if at - renewed > self._lease_s]
        for holder in gone:
            del self._renewed[holder]
        return gone


class HeldKeys:
    """How often each holder holds each key."""

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, int]] = {}  # key -> holder -> count

    def __contains__(self, key: str) -> bool:
        return key in self._counts

    def hold(self, key: str, holder: str) -> None:
        holders = self._counts.setdefault(key, {})
        holders[holder] = holders.get(holder, 0) + 1

    def release(self, key: str, holder: str) -> bool:
        """Release one hold. Whether nobody holds the key any more."""
        holders = self._counts.get(key)
        if holders is None or holder not in holders:
            return False
        holders[holder] -= 1
        if not holders[holder]:
            del holders[holder]
        return self._forget_if_free(key)

    def forget(self, key: str) -> None:
        """The key is gone, whoever held it."""
        self._counts.pop(key, None)

    def release_all(self, holder: str) -> list[str]:
        """Release all that a holder holds. Returns the keys that nobody holds any more."""
        mine = [key for key, holders in self._counts.items() if holders.pop(holder, None) is not None]
        return [key for key in mine if self._forget_if_free(key)]

    def _forget_if_free(self, key: str) -> bool:
        if self._counts[key]:
            return False
        del self._counts[key]
        return True
