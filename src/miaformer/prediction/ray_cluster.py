"""A Ray cluster for as long as it is needed. Needs the extra `ray`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A block with Ray: the cluster at an address, one started here, or the one that this process already uses."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        if ours:
            ray.shutdown()
