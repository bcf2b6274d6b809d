"""What may pass by itself is waited for: a full disk, a locked database, an MLflow server that is away.

What failed is done again at growing intervals, and each time a line says what is in the way.
"""

import errno
from collections.abc import Callable, Iterator
from typing import TypeVar

from requests import ConnectionError as NoConnection
from requests import Timeout
from tenacity import RetryCallState, Retrying, wait_exponential

T = TypeVar("T")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# How the libraries that write in Rust and C++ tell of a full disk: without its number.
FULL_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "database or disk is full")
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
            return obstacle(state.outcome.result()) if error is None else passing_obstacle(error)

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
        lines = str(link).strip().splitlines() or [type(link).__name__]
        full = isinstance(link, OSError) and link.errno in FULL_DISK
        if full or any(words in str(link) for words in FULL_DISK_WORDS):
            return f"the disk is full ({lines[0]})"
        if isinstance(link, NoConnection | Timeout):
            return f"MLflow does not answer ({lines[0]})"
        of_database = any(base.__name__ == "OperationalError" for base in type(link).__mro__)  # any driver's
        if of_database or getattr(link, "error_code", None) == "TEMPORARILY_UNAVAILABLE":  # MLflow's word for the same
            return f"MLflow's database is not available ({lines[0]})"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those that led to it, the first last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
