"""Serving a model over HTTP: pictures of many requests share batches, and compute is what gives way under load.

`settings` what the operator asks for; `uploads` from a request to pictures, within limits; `governor` how long a batch
takes, and what budget the queue affords; `batcher` the queue and the batches; `app` the HTTP interface. Needs the extra
`serve`.
"""

from miaformer.serving.app import create_app
from miaformer.serving.settings import Settings

__all__ = ["Settings", "create_app"]
