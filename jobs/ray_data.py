"""Ray Data as the jobs use it: on the run's cluster, and silent where the job itself says how far it is."""

import logging

import ray.data

from speechgpt.runtime import cluster
from speechgpt.runtime.config import ResourcesSection


def connect(resources: ResourcesSection) -> None:
    """`cluster.connect`; Ray Data's warnings still come through, and its log files stay whole."""
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.addFilter(_is_news)
    # Its bars would draw over ours; this setting travels to the workers, too.
    ray.data.DataContext.get_current().enable_progress_bars = False
    cluster.connect(resources)


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING and "Progress bars" not in record.getMessage()
