"""A static and an adaptive server under open-loop load: latency, refusals, compute, and whether answers are right.

    .venv/bin/python benchmarks/serving_load.py cifar10-small --data CIFAR10 --threads 1
    .venv/bin/python benchmarks/serving_load.py timm:deit_small_patch16_224 --data PICTURES --p95-ms 2000 --clients 48

Starts `miaformer serve` on this machine, static and adaptive in turn. First it finds what each sustains (so many
clients that always ask; of the adaptive one, for its least budget). Then requests come at 0.5, 1, 1.5 and 2 times the
static one's rate, at random moments (Poisson), whether or not earlier ones were answered. Latency counts from the
moment a request was due, so a server that falls behind is not let off. `timm:NAME` has random weights and controllers
drawn at random: its answers mean nothing, its times do. Stops by itself, in about 2 servers x (loads + 1) x --seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import miaformer
from miaformer.data import Batch, build_transform, open_data
from miaformer.data.images import find_images
from miaformer.data.unlabelled import read_pictures
from miaformer.evaluation import calibrate, describe_environment
from miaformer.evaluation.drawn import draw_controllers

RESULTS = Path(__file__).parent / "results"
PATIENCE = 30.0  # seconds


@dataclass(frozen=True)
class Picture:
    encoded: bytes
    label: int | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="as `miaformer serve` takes it, or timm:NAME")
    parser.add_argument("--data", required=True, help="labelled images (their test split), or a folder of pictures")
    parser.add_argument("--p95-ms", type=float, default=500.0, help="the servers' objective")
    parser.add_argument("--min-budget", type=float, default=0.35)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.5, 1.0, 1.5, 2.0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--clients", type=int, default=64, help="that find the static server's capacity")
    parser.add_argument("--threads", type=int, help="of the servers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write what was measured")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        model = args.model if not args.model.startswith("timm:") else drawn(args.model, args.data, Path(folder))
        pictures = read(args.data, labelled=not args.model.startswith("timm:"))
        report = asyncio.run(measure(args, model, pictures))
    report["environment"] = describe_environment(torch.device("cpu"), args.seed)
    report["command"] = report["environment"]["command"]
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def read(spec: str, labelled: bool, most: int = 2000) -> list[Picture]:
    """Encoded pictures: of labelled data as PNG, so that nothing is lost; of a folder as they are."""
    if not labelled:
        return [Picture(path.read_bytes(), None) for path in find_images(spec)[:most]]
    data = open_data(spec, "test")
    order = np.random.default_rng(0).permutation(len(data))[:most]
    return [Picture(_png(data[int(index)][0]), data[int(index)][1]) for index in order]


def _png(image: Any) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def drawn(spec: str, pictures: str, folder: Path) -> str:
    """A directory with a timm ViT of random weights whose controllers decide differently for each image."""
    import timm

    torch.manual_seed(0)
    model = miaformer.adapt(timm.create_model(spec.removeprefix("timm:"))).eval()
    images = read_pictures(pictures, build_transform(model.data_config()), 48)
    draw_controllers(model, images)
    numbers = torch.arange(len(images)).split(16)
    calibrate(model, [Batch(x, n, n) for x, n in zip(images.split(16), numbers, strict=True)], "pictures", 0.08)
    model.save_pretrained(folder)
    return str(folder)


# The load -------------------------------------------------------------------------------------------------------


class Connections:
    """HTTP/1.1 with connections kept open: just enough, so that the load takes little from what it measures."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON. Raises OSError or EOFError where the server hangs up."""
        while self._idle:  # a server closes those that it has not heard of for long: as clients do, ask anew then
            try:
                return await self._post(*self._idle.pop(), path, body)
            except (ConnectionError, EOFError):
                continue
        return await self._post(*await asyncio.open_connection(*self._address), path, body)

    async def _post(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes
    ) -> tuple[int, dict[str, Any]]:
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: s\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", answer)
            content = await reader.readexactly(int(length[1])) if length else await reader.read()
        except BaseException:
            writer.close()
            raise
        if b"connection: close" in answer or length is None:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(answer.split()[1]), json.loads(content) if content.startswith(b"{") else {}

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


@dataclass
class Seen:
    """What became of the requests of one measurement."""

    latencies: list[float] = field(default_factory=list)  # seconds, of those answered with 200
    macs: list[float] = field(default_factory=list)
    budgets: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)  # by what happened

    async def ask(self, connections: Connections, picture: Picture, due: float, query: str = "") -> None:
        try:
            async with asyncio.timeout(PATIENCE):
                status, content = await connections.post(f"/predict?top_k=1{query}", picture.encoded)
        except (OSError, EOFError, TimeoutError) as error:
            self.failed[type(error).__name__] += 1
            return
        if status == 200:
            (said,) = content["predictions"]
            self.latencies.append(time.perf_counter() - due)
            self.macs.append(said["macs_fraction"])
            self.budgets.append(1.0 if said["budget"] is None else said["budget"])
            self.right.append(said["label"] == picture.label)
        elif status == 503:
            self.refused += 1
        else:
            self.failed[f"status {status}"] += 1

    def row(self, labelled: bool) -> dict[str, Any]:
        answered = len(self.latencies)
        quantiles = np.quantile(self.latencies, (0.5, 0.95, 0.99)) * 1000 if answered else [np.nan] * 3
        return {
            "requests": answered + self.refused + self.failed.total(),
            "answered": answered,
            "refused": self.refused,
            "failed": dict(self.failed),
            **{name: round(float(ms), 1) for name, ms in zip(("p50_ms", "p95_ms", "p99_ms"), quantiles, strict=True)},
            "budget": _mean(self.budgets),
            "macs_fraction": _mean(self.macs),
            "accuracy": _mean(self.right) if labelled else None,
        }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 4) if values else None


async def saturate(
    connections: Connections, pictures: list[Picture], clients: int, seconds: float, query: str = ""
) -> float:
    """Requests a second that are answered where so many clients always ask. The first fifth warms up."""
    seen, end = Seen(), time.perf_counter() + seconds
    begin = end - 0.8 * seconds
    answered: list[float] = []

    async def client(number: int) -> None:
        turn = number
        while time.perf_counter() < end:
            await seen.ask(connections, pictures[turn % len(pictures)], time.perf_counter(), query)
            answered.append(time.perf_counter())
            turn += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    if seen.refused or seen.failed:
        raise RuntimeError(f"{seen.refused} refused, {dict(seen.failed)} failed: fewer --clients would do")
    return sum(begin <= moment <= end for moment in answered) / (end - begin)


async def open_loop(connections: Connections, pictures: list[Picture], rate: float, seconds: float, seed: int) -> Seen:
    """Requests at so many a second, whatever becomes of them."""
    generator = np.random.default_rng(seed)
    moments = np.cumsum(generator.exponential(1 / rate, int(rate * seconds)))
    seen, start = Seen(), time.perf_counter()
    asked = []
    for number, moment in enumerate(moments):
        await asyncio.sleep(max(0.0, start + moment - time.perf_counter()))
        picture = pictures[number % len(pictures)]
        asked.append(asyncio.create_task(seen.ask(connections, picture, start + moment)))
    await asyncio.gather(*asked)
    return seen


# The servers ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(model: str, args: argparse.Namespace, *options: str) -> AsyncIterator[Connections]:
    """`miaformer serve`, until the end of the block."""
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    command = [sys.executable, "-m", "miaformer", "serve", model, "--port", "0", "--no-page", *threads, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        found, said = None, []
        while found is None:
            said.append(await asyncio.to_thread(process.stderr.readline))
            if not said[-1]:
                raise RuntimeError("".join(said).strip() or "the server did not start")
            found = re.search(r"at http://([\d.]+):(\d+)", said[-1])
        connections = Connections(found[1], int(found[2]))
        await asyncio.sleep(1)
        yield connections
        connections.close()
    finally:
        process.terminate()
        process.wait()


async def measure(args: argparse.Namespace, model: str, pictures: list[Picture]) -> dict[str, Any]:
    objective = ["--p95-ms", str(args.p95_ms)]
    servers = {
        "static": ["--static", *objective],
        "adaptive": ["--min-budget", str(args.min_budget), *objective],
    }
    labelled = pictures[0].label is not None
    patient = ["--p95-ms", "60000", "--answer-seconds", "60"]
    async with serving(model, args, "--static", *patient) as connections:
        capacity = await saturate(connections, pictures, args.clients, args.seconds)
    async with serving(model, args, *patient) as connections:
        least = await saturate(connections, pictures, args.clients, args.seconds, f"&budget={args.min_budget}")
    print(f"requests a second: static {capacity:.1f}, at a budget of {args.min_budget} {least:.1f}", flush=True)
    rows = []
    for load in args.loads:
        for name, options in servers.items():
            async with serving(model, args, *options) as connections:
                await open_loop(connections, pictures, min(load, 1.0) * capacity, 0.2 * args.seconds, args.seed + 1)
                seen = await open_loop(connections, pictures, load * capacity, args.seconds, args.seed)
            row = {"server": name, "load": load, "rate": round(load * capacity, 2), **seen.row(labelled)}
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return {
        "model": args.model,
        "objective_ms": args.p95_ms,
        "capacity": round(capacity, 2),
        "capacity_at_least_budget": round(least, 2),
        "seconds": args.seconds,
        "rows": rows,
    }


if __name__ == "__main__":
    main()
