"""A thousand malformed requests against `miaformer serve`: no crash, no 5xx but deliberate 503, no memory kept.

    .venv/bin/python benchmarks/fuzz_server.py --json benchmarks/results/fuzz-server.json

Truncated, huge, slow and many at once; broken pictures and decompression bombs; wrong types, forms, queries, heads and
methods: drawn from a seed. Before, in the middle and after, well-formed requests must get the same answers. Says what
each kind of request got, and the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from miaformer.evaluation import describe_environment

SLOW_SECONDS = 2.0  # the server is told to hang up on uploads after so long
PATIENCE = 60.0


class Requests:
    """Malformed requests by kind: bytes to send, or (bytes, seconds to wait, bytes)."""

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        pixels = self.draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        self.pictures = {
            kind: _encoded(Image.fromarray(pixels), kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")
        }

    def kinds(self) -> dict[str, Callable[[], bytes | tuple[bytes, float, bytes]]]:
        return {
            "damaged picture": lambda: post(self.damaged()),
            "truncated picture": lambda: post(self.picture()[: int(self.draw.integers(1, 200))]),
            "random bytes": lambda: post(self.draw.bytes(int(self.draw.integers(1, 100_000)))),
            "decompression bomb": lambda: post(bomb(int(self.draw.integers(6_000, 60_000)))),
            "too large": lambda: post(bytes(11 * 2**20)),
            "says it is huge": lambda: post(b"x", length=int(self.draw.integers(2**31, 2**50))),
            "ends early": lambda: post(self.picture(), length=10**6),
            "slow": lambda: (post(self.picture(), length=10**6), 2 * SLOW_SECONDS, b"x"),
            "wrong type": lambda: post(b'{"image": 1}', kind="application/json"),
            "broken form": lambda: post(self.form(), kind="multipart/form-data; boundary=edge"),
            "no boundary": lambda: post(self.form(), kind="multipart/form-data"),
            "wrong query": lambda: post(self.picture(), query=self.query()),
            "wrong method": lambda: (
                self.choose([b"PUT", b"DELETE", b"BREW"]) + b" /predict HTTP/1.1\r\nHost: s\r\n\r\n"
            ),
            "wrong path": lambda: post(self.picture(), path=f"/{self.draw.bytes(6).hex()}"),
            "no HTTP": lambda: self.draw.bytes(200) + b"\r\n\r\n",
            "huge head": lambda: b"POST /predict HTTP/1.1\r\nX: " + b"y" * 300_000 + b"\r\n\r\n",
            "broken chunks": lambda: (
                b"POST /predict HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"
            ),
        }

    def choose(self, among: list[Any]) -> Any:
        return among[int(self.draw.integers(len(among)))]

    def picture(self) -> bytes:
        return self.choose(list(self.pictures.values()))

    def damaged(self) -> bytes:
        """A picture with some bytes changed: some still decode, which is as good an answer."""
        broken = bytearray(self.picture())
        for place in self.draw.integers(0, len(broken), 1 + len(broken) // 50):
            broken[place] = int(self.draw.integers(256))
        return bytes(broken)

    def form(self) -> bytes:
        head = b'--edge\r\nContent-Disposition: form-data; name="f"; filename="a.png"\r\n\r\n'
        whole = head + self.picture() + b"\r\n--edge--\r\n"
        return self.choose([whole[: len(whole) // 2], whole.replace(b"filename", b"file"), head * 50, whole + whole])

    def query(self) -> str:
        name = self.choose(["budget", "cap", "top_k"])
        return f"{name}={self.choose(['nan', 'inf', '-1', '0', '1e400', 'many', '', '%00', '9' * 400])}"


def post(
    body: bytes, path: str = "/predict", query: str = "", kind: str = "image/png", length: int | None = None
) -> bytes:
    said = len(body) if length is None else length
    head = f"POST {path}?{query} HTTP/1.1\r\nHost: s\r\nContent-Type: {kind}\r\nContent-Length: {said}\r\n\r\n"
    return head.encode() + body


def bomb(side: int) -> bytes:
    """A small PNG of side x side black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(min(side * (side // 8 + 1), 2**24)), 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def _encoded(image: Image.Image, kind: str) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, kind)
    return encoded.getvalue()


async def ask(address: tuple[str, int], request: bytes | tuple[bytes, float, bytes]) -> tuple[str, bytes]:
    """The status, or what became of the connection, and the body."""
    first, wait, then = request if isinstance(request, tuple) else (request, 0.0, b"")
    reader, writer = await asyncio.open_connection(*address)
    try:
        async with asyncio.timeout(PATIENCE):
            writer.write(first)
            await writer.drain()
            if wait:
                await asyncio.sleep(wait)
                writer.write(then)
            if not (writer.can_write_eof() and request_is_short(first)):
                answer = await reader.readuntil(b"\r\n\r\n")
            else:
                writer.write_eof()
                answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", answer.lower())
            return answer.split()[1].decode(), await reader.readexactly(int(length[1])) if length else b""
    except TimeoutError:
        return "no answer", b""
    except (OSError, EOFError):
        return "hung up", b""
    finally:
        writer.close()


def request_is_short(request: bytes) -> bool:
    """Whether it says that more is to come than it has: then its end is sent, as by a client that died."""
    head, _, body = request.partition(b"\r\n\r\n")
    said = re.search(rb"Content-Length: (\d+)", head)
    return said is not None and int(said[1]) > len(body)


def memory_mb(process: int, line: str = "VmRSS") -> float:
    """Of a process and those that it has started."""
    started = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    statuses = [Path(f"/proc/{number}/status").read_text() for number in (process, *started)]
    return sum(int(re.search(rf"{line}:\s+(\d+) kB", status)[1]) for status in statuses) / 1024  # type: ignore[index]


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write what was seen")
    args = parser.parse_args()
    command = [sys.executable, "-m", "miaformer", "serve", args.model, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--upload-seconds", str(SLOW_SECONDS), "--p95-ms", "20000"], stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stderr.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if found is None:
            raise RuntimeError(line)
        report = await attack((found[1], int(found[2])), process, args)
    finally:
        process.kill()
        process.wait()
    report["environment"] = describe_environment(torch.device("cpu"), args.seed)
    report["command"] = report["environment"]["command"]
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if report["well"] else 1


async def attack(address: tuple[str, int], process: subprocess.Popen[str], args: argparse.Namespace) -> dict[str, Any]:
    requests = Requests(args.seed)
    good = {kind: post(picture) for kind, picture in requests.pictures.items()}

    async def answers() -> list[Any]:
        found = [await ask(address, request) for request in good.values()]
        assert {status for status, _ in found} == {"200"}, found
        return [[p["label"], round(p["probability"], 5)] for _, body in found for p in json.loads(body)["predictions"]]

    before = await answers()
    kinds = requests.kinds()
    names = [list(kinds)[number % len(kinds)] for number in range(args.requests)]
    requests.draw.shuffle(names)
    seen: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    room = asyncio.Semaphore(args.at_once)

    async def one(name: str) -> None:
        async with room:
            status, _ = await ask(address, kinds[name]())
            seen[name][status] += 1

    memory: list[float] = []
    start = time.perf_counter()
    for part in (names[: len(names) // 2], names[len(names) // 2 :]):
        await asyncio.gather(*(one(name) for name in part))
        assert await answers() == before
        memory.append(memory_mb(process.pid))
        print(f"{sum(sum(c.values()) for c in seen.values())} requests, {memory[-1]:.0f} MB", flush=True)
    for name, counted in seen.items():
        print(f"{name:20} {dict(counted)}")
    server_errors = {s for counted in seen.values() for s in counted if s.startswith("5") and s != "503"}
    unanswered = sum(counted["no answer"] for counted in seen.values())
    well = not server_errors and not unanswered and process.poll() is None
    return {
        "requests": args.requests,
        "at_once": args.at_once,
        "seconds": round(time.perf_counter() - start, 1),
        "seen": {name: dict(counted) for name, counted in seen.items()},
        "memory_mb": {
            "half_way": round(memory[0]),
            "after": round(memory[1]),
            "peak": round(memory_mb(process.pid, "VmHWM")),
        },
        "same_answers_afterwards": True,
        "well": well,
    }


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
