"""Asking a store again that failed for a passing reason, where Arrow's own retries do not: S3's answer that it is too
busy is longer than a small object, and Arrow, which has room for the object only, calls that a failure for good."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_PAUSES = (0.2, 1.0, 3.0, 10.0, 20.0)
"""Seconds between attempts."""

logger = logging.getLogger(__name__)


def patiently(work: Callable[[], T], passing: type[OSError] = OSError) -> T:
    """What `work` gives; it is done again, from the start, when it raises an error of the class `passing`.

    What a machine itself says has a number (a full disk), and is raised at once, as is FileNotFoundError.
    """
    for pause in _PAUSES:
        try:
            return work()
        except FileNotFoundError:
            raise
        except passing as error:
            if error.errno is not None:
                raise
            logger.warning("%s; again in %g s", error, pause)
        time.sleep(pause)
    return work()
