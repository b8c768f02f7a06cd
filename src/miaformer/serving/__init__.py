"""Serving a model over HTTP: pictures of many requests share batches, and compute is what gives way under load.

`settings` what the operator asks for; `uploads` from a request to pictures, within limits; `governor` how long a batch
takes, and what budget the queue affords; `batcher` the queue and the batches; `model_process` the model, apart from all
that; `server` a request's way; `app` the HTTP interface, `protocol` what uvicorn lacks. Needs the extra `serve`.
"""

from typing import TYPE_CHECKING, Any

from miaformer.serving.settings import Settings

if TYPE_CHECKING:
    from miaformer.serving.app import create_app

__all__ = ["Settings", "create_app"]


def __getattr__(name: str) -> Any:
    """`create_app`, once it is asked for: `Settings` alone need no web server."""
    if name == "create_app":
        from miaformer.serving.app import create_app

        return create_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
