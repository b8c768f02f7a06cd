"""`miaformer serve`: classify pictures over HTTP, with compute that gives way under load."""

from __future__ import annotations

import argparse
import gc
import signal
import socket
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from miaformer.cli.arguments import add_command, open_device, open_model, own_model, say_choice
from miaformer.serving.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from miaformer.prediction.predictor import Predictor
    from miaformer.serving.model_process import ModelProcess

DESCRIPTION = """\
Serve a model over HTTP: POST /predict, GET /health, GET /metrics (Prometheus), an API page at /docs, and at / a page
to try the model. Images of different requests share batches, each with its own budget.

Compute adapts to load. While no request waits, an image gets --budget. When requests arrive faster than the server can
answer at that budget, it lowers the budget, down to --min-budget, so that answers arrive within --p95-ms. If that
is not enough, it refuses requests, with 503 and Retry-After. Each answer says which budget the image got, and how
much compute it took.
"""

EPILOG = """\
examples:
  miaformer serve cifar10-small
      the bundled model, at http://127.0.0.1:8000
  miaformer serve runs/photos/model --host 0.0.0.0 --port 80 --budget 0.8 --min-budget 0.4 --p95-ms 300
      aim for a p95 latency of 0.3 s; under load, spend down to half as much on each image
  miaformer serve runs/photos/model --replicas 1 8 --ray-address auto
      run the same application on a Ray cluster, in as many processes as the load requires
  curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?budget=0.5&top_k=3'
  curl -F file=@cat.jpg -F file=@dog.jpg -F budget=0.5 http://127.0.0.1:8000/predict

SIGTERM and Ctrl-C stop the server. It first answers the requests that it has admitted.
"""


# Fields of `Settings`: unit, type, meaning.
_LIMITS = (
    ("p95_ms", "MS", float, "target for the 95th percentile of the time from a request's arrival to its answer, in ms"),
    ("max_queue", "N", int, "maximum images waiting"),
    ("max_pictures", "N", int, "maximum images per request"),
    ("max_upload_bytes", "N", int, "maximum bytes per request"),
    ("max_held_bytes", "N", int, "maximum bytes of all requests that are being read"),
    ("max_pixels", "N", int, "maximum pixels per image"),
    ("upload_seconds", "S", float, "maximum seconds for a request to arrive"),
    ("answer_seconds", "S", float, "maximum seconds to answer a request that has arrived"),
)


def add_parser(subparsers: Any) -> None:
    parser = add_command(subparsers, "serve", "classify images over HTTP", DESCRIPTION, EPILOG)
    parser.add_model()
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    parser.add_number("--port", 8000, "port to listen on; 0 picks a free one")
    spending = parser.add_argument_group("compute")
    spending.add_argument(
        "--budget",
        type=float,
        metavar="B",
        help="mean MACs while no request waits, as a fraction of the dense model's; also the largest budget a "
        "request may set (default: the largest calibrated)",
    )
    spending.add_argument(
        "--min-budget",
        type=float,
        metavar="B",
        help="lowest mean MACs under load (default: half of --budget, or the smallest calibrated if that is larger)",
    )
    spending.add_argument("--cap", type=float, metavar="C", help="hard limit on the MACs of any image")
    spending.add_argument(
        "--static", action="store_true", help="run the dense model: execute everything, whatever the load"
    )
    limits = parser.add_argument_group("limits")
    for name, metavar, kind, about in _LIMITS:
        option, default = f"--{name.replace('_', '-')}", getattr(Settings, name)
        limits.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{about} (default: {default:,})")
    limits.add_argument(
        "--max-connections",
        type=int,
        default=512,
        metavar="N",
        help="maximum connections at once; more get 503 (default: 512)",
    )
    several = parser.add_argument_group("Ray")
    several.add_argument(
        "--replicas",
        type=int,
        nargs="+",
        metavar="N",
        help="number of servers behind one address; two numbers: scale between them with load (extra `ray`)",
    )
    several.add_argument(
        "--ray-address", metavar="A", help="address of a running cluster (default: start one on this machine)"
    )
    parser.add_argument(
        "--allow-origins",
        nargs="+",
        default=[],
        metavar="O",
        help="sites whose pages may send requests: https://..., or '*'",
    )
    parser.add_argument("--no-page", action="store_true", help="serve no page at / and no /explain")
    parser.add_engine("auto")
    parser.add_dtype()
    parser.add_device()
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.max_connections < 1:
        raise ValueError(f"--max-connections {args.max_connections} must be at least 1")
    return _run_here(args) if args.replicas is None else _run_on_ray(args)


def _predictor(args: argparse.Namespace) -> Predictor:
    """The model that these arguments ask for, ready to run."""
    from miaformer.prediction.predictor import Predictor

    device = open_device(args.device, args.threads)
    model = open_model(args.model, device, args.dtype, **own_model(args))
    if device.type == "cpu":
        model.prepack()
    return Predictor(model, engine=args.engine, on_choice=say_choice)


def _outline(args: argparse.Namespace) -> Predictor:
    """The same without weights: what a server has to know of it."""
    import torch

    from miaformer.prediction.predictor import Predictor

    model = open_model(args.model, torch.device("cpu"), **own_model(args)).to("meta")
    return Predictor(model)


def _app(args: argparse.Namespace, predictor: Predictor, process: ModelProcess | None = None) -> FastAPI:
    """The application that these arguments ask for."""
    from miaformer.serving.app import create_app

    limits = {name: getattr(args, name) for name, *_ in _LIMITS}
    spending = {"budget": args.budget, "min_budget": args.min_budget, "cap": args.cap, "static": args.static}
    settings = Settings(**spending, page=not args.no_page, allow_origins=tuple(args.allow_origins), **limits)
    return create_app(predictor, settings, args.model, process)


def _replica(args: argparse.Namespace) -> FastAPI:
    """The application in a process of a Ray cluster."""
    return _app(args, _predictor(args))


def _run_here(args: argparse.Namespace) -> int:
    import uvicorn

    from miaformer.serving.model_process import ModelProcess
    from miaformer.serving.protocol import ImpatientProtocol

    with _listening(args.host, args.port) as listening:
        process = ModelProcess(partial(_predictor, args))  # loads while we do
        app = _app(args, _outline(args), process)
        gc.collect()
        gc.freeze()  # what is there by now stays: going through it again and again took a quarter of the loop's time
        at = _url(*listening.getsockname()[:2])
        _say(f"serving {args.model} at {at}: {_spending(app.state.server.settings)}")
        config = uvicorn.Config(
            app,
            http=ImpatientProtocol,
            log_level="warning",
            access_log=False,
            proxy_headers=False,  # nothing asks who it was
            limit_concurrency=args.max_connections,
            server_header=False,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; what had been admitted was answered") from None
    return 0


def _run_on_ray(args: argparse.Namespace) -> int:
    from miaformer.serving.on_ray import replicated

    _listening(args.host, args.port).close()  # says at once where the address cannot be had
    signal.signal(signal.SIGTERM, _stop)
    with replicated(
        partial(_replica, args), args.host, args.port, args.replicas, address=args.ray_address, cpus=args.threads or 1
    ) as port:
        replicas = " to ".join(map(str, dict.fromkeys(args.replicas)))
        _say(f"serving {args.model} at {_url(args.host, port)}: {replicas} replicas on Ray")
        while True:
            time.sleep(3600)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt("stopped")


def _url(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _listening(host: str, port: int) -> socket.socket:
    """Raises OSError, naming the address, where it cannot be had."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024
        )
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen at {host}:{port}: {reason}") from error


def _say(line: str) -> None:
    sys.stderr.write(f"miaformer: {line}\n")
    sys.stderr.flush()


def _spending(settings: Settings) -> str:
    if settings.static:
        return "everything is executed"
    if settings.budget is None:
        return "the model is not calibrated, so everything is executed"
    return (
        f"budget {settings.budget:.2f}, under load down to {settings.min_budget:.2f} to answer within "
        f"{settings.p95_ms:g} ms"
    )
