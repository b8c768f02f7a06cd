"""`miaformer serve` as an operator runs it: a process that answers, minds its connections, and stops well."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

import httpx
from command_line import run
from test_serving import check_says, number, picture

from miaformer import load
from miaformer.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def server(calibrated: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and where it listens."""
    argv = ["serve", calibrated, "--port", 0, "--device", "cpu", "--threads", 1, "--p95-ms", 20_000, "--cap", 0.7]
    process = subprocess.Popen(
        [sys.executable, "-m", "miaformer", *map(str, argv)], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if " engine for " not in line)  # which engines were chosen comes first
    found = re.search(r"serving \S+ at (http://127\.0\.0\.1:\d+): budget 0\.\d\d, under load down to 0\.\d\d", line)
    assert found, line
    with process:
        yield process, found[1]
        process.kill()


def wait_until_up(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError("the server did not come up")


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def test_it_answers_as_the_model_does_and_a_huge_head_is_refused(
    server: tuple[subprocess.Popen[str], str], calibrated: Path
) -> None:
    _, url = server
    wait_until_up(url)
    predictor = Predictor(load(calibrated))
    for seed, asked in enumerate(({}, {"budget": 0.5}, {"budget": 0.5, "cap": 0.4})):
        (said,) = httpx.post(f"{url}/predict", content=picture(seed), params=asked).json()["predictions"]
        spend = {"budget": httpx.get(f"{url}/health").json()["budget"], "cap": 0.7, **asked}
        check_says(said, predictor, picture(seed), **spend)
    assert httpx.get(f"{url}/openapi.json").json()["paths"].keys() >= {"/predict", "/health", "/metrics", "/explain"}
    assert "cdn" not in httpx.get(f"{url}/docs").text  # works where there is no network
    with connect(url) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: s\r\n" + b"X-Long: " + b"y" * 200_000)
        assert line.recv(1000).startswith(b"HTTP/1.1 400")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_without_its_model_it_asks_to_come_back_and_gets_another(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    wait_until_up(url)
    before = httpx.post(f"{url}/predict", content=picture()).json()["predictions"]
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            os.kill(int(child), signal.SIGKILL)
    refused = httpx.post(f"{url}/predict", content=picture())
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
    ill = httpx.get(f"{url}/health")
    assert (ill.status_code, ill.json()["status"]) == (503, "the model's process ended (signal 9) and starts again")
    wait_until_up(url)
    assert httpx.post(f"{url}/predict", content=picture()).json()["predictions"] == before


def test_stopped_it_answers_what_it_has_begun(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    wait_until_up(url)
    files = [("f", (f"{n}.png", picture(n, size=(400, 400)))) for n in range(16)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = [pool.submit(httpx.post, f"{url}/predict", files=files, timeout=60) for _ in range(8)]
        while number(httpx.get(f"{url}/metrics").text, "miaformer_queue_pictures") == 0:
            assert not all(reply.done() for reply in replies)
        process.send_signal(signal.SIGTERM)
        codes = [
            reply.result().status_code for reply in replies if not isinstance(reply.exception(), httpx.ConnectError)
        ]
    assert codes
    assert set(codes) == {200}
    assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    with pytest.raises(OSError, match="refused"):
        connect(url)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--budget", "0.001"], "budget=0.001 is below"),
        (["--budget", "0.4", "--min-budget", "0.5"], "min_budget=0.5 is more than budget=0.4"),
        (["--cap", "0.0001"], "of the backbone's MACs that patch embedding, controllers"),
        (["--device", "abacus"], "--device abacus cannot be used here"),  # only the model's process tries it
        (["--p95-ms", "-5"], "p95_ms=-5.0 must be a positive number"),
        (["--max-connections", "0"], "--max-connections 0 must be at least 1"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:0"),
        (["--port", "99999"], "cannot listen at 127.0.0.1:99999"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    capsys: pytest.CaptureFixture[str], calibrated: Path, argv: list[str], said: str
) -> None:
    status, out, err = run(capsys, "serve", calibrated, "--port", 0, "--device", "cpu", *argv)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
