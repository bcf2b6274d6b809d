"""What may pass by itself is waited for: a full disk, a locked database, an MLflow server that is away.

What failed is done again at growing intervals, and each time a line says what is in the way.
"""

import errno
from collections.abc import Callable, Iterator
from typing import TypeVar

from requests import ConnectionError as NoConnection
from requests import Timeout
from tenacity import RetryCallState, Retrying, wait_exponential

from lorc_core.errors import first_line

T = TypeVar("T")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# How the libraries that write in Rust and C++ tell of a full disk: without its number.
FULL_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
# Of a database's operational errors those that pass; others are of a missing table, say.
LOCKED_WORDS = ("is locked", "connect", "timeout", "timed out")
# MLflow's names of what its server, or a proxy before it, answers for the moment.
PASSING_CODES = ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
PASSING_ANSWERS = ("error code 502", "error code 503", "error code 504")
# What botocore and aiohttp, which need not be installed, call an object store that is away.
AWAY = {
    *("EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError"),
    *("ClientConnectionError", "ServerTimeoutError"),
}
LONGEST_PAUSE_S = 30


class Patience:
    """How long a run waits, all in all.

    Attributes:
        left_s: Seconds that are left.
        say: Called with a line before every wait.
    """

    def __init__(self, seconds: float, say: Callable[[str], None] = lambda line: None) -> None:
        self.left_s = seconds
        self.say = say

    def until_possible(self, attempt: Callable[[], T], obstacle: Callable[[T], str | None] = lambda result: None) -> T:
        """The result of `attempt`, which is called again while there is an obstacle and seconds are left.

        Args:
            attempt: What to do.
            obstacle: What a result tells of one, if what is in the way is no exception.

        Returns:
            What the last attempt returned.

        Raises:
            Exception: What the last attempt raised.
        """

        def in_the_way(state: RetryCallState) -> str | None:
            assert state.outcome is not None
            error = state.outcome.exception()
            if error is None:
                return obstacle(state.outcome.result())
            return passing_obstacle(error) if isinstance(error, Exception) else None  # Ctrl-C is none

        def before_sleep(state: RetryCallState) -> None:
            assert state.next_action is not None
            self.say(f"{in_the_way(state)}; trying again for {self.left_s:.0f} s")
            self.left_s -= state.next_action.sleep

        retrying = Retrying(
            retry=lambda state: in_the_way(state) is not None,
            stop=lambda state: self.left_s <= 0,
            wait=lambda state: min(wait_exponential(max=LONGEST_PAUSE_S)(state), self.left_s),
            before_sleep=before_sleep,
            retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
        )
        return retrying(attempt)


def passing_obstacle(error: BaseException) -> str | None:
    """What is in the way, of an error that may pass by itself; None of any other."""
    for link in causes(error):
        told = str(link)
        line = first_line(link)
        if (isinstance(link, OSError) and link.errno in FULL_DISK) or any(words in told for words in FULL_DISK_WORDS):
            return f"the disk is full ({line})"
        if isinstance(link, NoConnection | Timeout) or any(words in told for words in PASSING_ANSWERS):
            return f"MLflow does not answer ({line})"
        names = {base.__name__ for base in type(link).__mro__}
        if names & AWAY:
            return f"the object store does not answer ({line})"
        passes = "OperationalError" in names and any(words in told for words in LOCKED_WORDS)
        if passes or getattr(link, "error_code", None) in PASSING_CODES:
            return f"MLflow's database is not available ({line})"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that led to it, the first last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
