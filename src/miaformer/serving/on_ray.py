"""The same application in several processes, on one machine or many, by Ray Serve. Needs the extra `ray`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from miaformer.prediction.on_ray import cluster

if TYPE_CHECKING:
    from fastapi import FastAPI

NAME = "miaformer"
WAITING_FOR_A_REPLICA = 16  # requests that one has under way before another is started
MOST_FOR_A_REPLICA = 256  # requests that one may have under way: it refuses by itself long before


def deployment(build: Callable[[], FastAPI], replicas: Sequence[int], cpus: float = 1.0, gpus: float = 0.0) -> Any:
    """What `ray.serve.run` takes: replicas that each call `build` where they start.

    replicas: how many, or the least and the most, as load asks. cpus, gpus: that Ray sets aside for each.

    Raises ValueError for numbers that cannot be.
    """
    from ray import serve

    least, most = replicas[0], replicas[-1]
    if len(replicas) > 2 or not 1 <= least <= most:
        raise ValueError(f"replicas={list(replicas)} must be how many, or the least and the most, from 1 up")

    def application() -> FastAPI:  # Ray tells builders from applications by their being functions
        return build()

    scaled: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaled = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": WAITING_FOR_A_REPLICA,
            }
        }
    described = serve.deployment(
        name=NAME,
        max_ongoing_requests=MOST_FOR_A_REPLICA,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        **scaled,
    )
    return described(serve.ingress(application)()).bind()


@contextmanager
def replicated(
    build: Callable[[], FastAPI],
    host: str,
    port: int,
    replicas: Sequence[int],
    *,
    address: str | None = None,
    cpus: float = 1.0,
) -> Iterator[int]:
    """Serves until the end of the block, and gives the port. address: of a cluster; None starts one here.

    cpus: of a replica, which has so many threads by Ray's own setting; it takes a GPU too, where there are enough.
    """
    with cluster(address):
        import ray
        from ray import serve

        gpus = 1.0 if ray.cluster_resources().get("GPU", 0) >= replicas[0] else 0.0
        try:
            serve.start(http_options={"host": host, "port": port})
            serve.run(deployment(build, replicas, cpus, gpus), name=NAME, route_prefix="/")
            yield port
        finally:
            serve.shutdown()
