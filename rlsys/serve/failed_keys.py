"""Counts requests with a wrong key, by client address. It refuses wrong keys alone: a right one is always served."""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections import Counter
from collections.abc import Callable

from rlsys.serve.config import Limits
from rlsys.serve.errors import Refusal

WINDOW_S = 60.0
NO_KEY = "X-API-Key: found no key that this server knows; wanted one of its keys file"
log = logging.getLogger("rlsys.serve.access")


class FailedKeys:
    """Wrong keys of the current minute.

    At most `limits.failed_keys_in_all` of them are counted, so the table has at most as many addresses.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._began = clock()
        self._counts: Counter[str] = Counter()

    def refusal(self, address: str) -> Refusal:
        """What a request with a wrong key, or without one, is answered."""
        at = self._clock()
        if at - self._began >= WINDOW_S:
            self._began = at
            self._counts.clear()
        limits, client = self._limits, network_of(address)
        for found, most, name in (
            (self._counts[client], limits.failed_keys, "failed_keys"),
            (self._counts.total(), limits.failed_keys_in_all, "failed_keys_in_all"),
        ):
            if found >= most:
                wait = math.ceil(self._began + WINDOW_S - at)
                return Refusal(
                    429,
                    f"{NO_KEY}; more wrong keys in a minute than limits.{name} = {most}",
                    {"Retry-After": str(wait)},
                )
        self._counts[client] += 1
        if self._counts[client] == limits.failed_keys:
            log.warning("%s: %d requests with a wrong key in a minute", client, limits.failed_keys)
        return Refusal(401, NO_KEY)


def network_of(address: str) -> str:
    """The address; of IPv6 the /64, all of which one client has."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        return str(found.ipv4_mapped or ipaddress.ip_network((found, 64), strict=False))
    return address
