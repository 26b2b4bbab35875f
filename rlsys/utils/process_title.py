"""Where a process's title is in memory."""

import os

import setproctitle  # of vLLM's requirements

_LEAVES_VARIABLES = "SPT_NOENV"  # else `setproctitle` moves the variables to have more room; Ray sets it too


def find_title() -> None:
    """Find the memory of this process's title, for all calls of `setproctitle` to come.

    `setproctitle` finds it by way of the first environment variable. Once that variable was assigned, it fails, and
    neither it nor vLLM, which names the engine's process with it, tells. Which variable is the first differs from one
    start of Ray to the next. So call this before any assignment.
    """
    is_set = _LEAVES_VARIABLES in os.environ
    if not is_set:
        os.environ[_LEAVES_VARIABLES] = "1"  # a new one comes last
    setproctitle.getproctitle()
    if not is_set:
        del os.environ[_LEAVES_VARIABLES]
