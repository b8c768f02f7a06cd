"""Which processor this is: what is fast on one is not on another."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def described() -> dict[str, str]:
    """What Linux says of the first processor: `model name`, `vendor_id` and more; nothing on other systems."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processor_name() -> str:
    """`AMD EPYC 7763`, say."""
    return described().get("model name") or platform.processor() or platform.machine()


def processor_cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
