"""On Ray: the same answers as in one process, and a worker that is killed loses nothing. (make test-ray)

What workers are given is tested here without Ray.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import run
from hypothesis import given
from hypothesis import strategies as st
from test_serving import picture

from miaformer import load
from miaformer.prediction.classify import BatchClassifier
from miaformer.prediction.entries import BEGINNING, Entry, Position
from miaformer.prediction.on_ray import Stretch, predict_on_ray, stretches
from miaformer.prediction.predictor import Predictor
from miaformer.prediction.run import predict
from miaformer.prediction.sources import Inputs, find_inputs
from miaformer.prediction.unfinished import UnfinishedRun


class Counted:
    """A source of so many entries, which says so or not."""

    def __init__(self, name: str, size: int, known: bool) -> None:
        self.name, self.size, self.identity = name, size, name
        self.count = size if known else None

    def entries(self, start: int = 0) -> Iterator[Entry]:
        return (Entry(f"{self.name}/{number}", b"") for number in range(start, self.size))


SOURCES = st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=8)


@given(SOURCES, st.integers(1, 12), st.data())
def test_stretches_are_everything_once_in_order(drawn: list[tuple[int, bool]], size: int, data: st.DataObject) -> None:
    inputs = Inputs([Counted(str(place), count, known) for place, (count, known) in enumerate(drawn)])
    everything = list(inputs.entries())
    begin = data.draw(st.integers(0, len(everything)))
    start = everything[begin - 1][0] if begin else BEGINNING
    parts = list(stretches(inputs, start, size))
    assert [found for part in parts for found in part.entries()] == everything[begin:]
    for part in parts:
        if part.count is not None:
            assert part.count <= size
            assert len(list(part.entries())) == part.count
    knowns = sum(part.count is not None for part in parts)
    unknown = sum(not known for _, known in drawn)
    assert knowns <= len(everything) // size + unknown + 1  # filled, but where something of unknown size comes between


def test_a_stretch_says_where_it_is_among_all() -> None:
    part = Stretch([Counted("b", 3, True)], place=5, skip=1, count=None)
    assert [position for position, _ in part.entries()] == [Position(5, 2), Position(5, 3)]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(60):
        (root / f"{number:02}.png").write_bytes(picture(number))
    (root / "30.png").write_bytes(b"no picture")
    return root


def make_classifier(model: Path, killed: Path | None = None) -> BatchClassifier:
    """killed: a file that the first worker to get to its third batch writes before it dies."""
    classify = BatchClassifier(Predictor(load(model)), budget=0.5)
    if killed is not None:
        rows, batches = classify.rows, iter(range(1000))

        def deadly(*batch):
            if next(batches) == 2 and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return rows(*batch)

        classify = SimpleNamespace(prepare=classify.prepare, rows=deadly)
    return classify


@pytest.mark.ray
def test_two_workers_of_which_one_is_killed_say_what_one_process_says(
    calibrated: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # workers look for `make_classifier` there
    inputs = find_inputs([photos])
    with UnfinishedRun(tmp_path / "here.jsonl", {}) as here:
        predict(inputs, make_classifier(calibrated), here, batch_size=4)
    killed = tmp_path / "killed"
    make = partial(make_classifier, calibrated, killed)
    with UnfinishedRun(tmp_path / "ray.jsonl", {}) as there:
        predict_on_ray(inputs, make, there, batch_size=4, workers=2)
        assert (there.tally.pictures, there.tally.failed) == (59, 1)
    assert killed.exists()
    check_same(tmp_path / "ray.jsonl", tmp_path / "here.jsonl")


def check_same(first: Path, second: Path) -> None:
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (first, second)]
    for one, other in zip(*rows, strict=True):
        assert one["path"] == other["path"]
        assert one.get("error") == other.get("error")
        assert one.get("label") == other.get("label")
        assert one.get("macs_fraction") == other.get("macs_fraction")
        assert one.get("probability") == pytest.approx(other.get("probability"), abs=1e-5)


@pytest.mark.ray
def test_the_command_does_it_too_and_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str], calibrated: Path, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    for name, more in (("here", ()), ("ray", ("--ray-workers", 2))):
        out = tmp_path / f"{name}.jsonl"
        status, said, _ = run(capsys, "predict", calibrated, photos, "--out", out, "--budget", 0.5, *more)
        assert status == 1  # one is no picture
        assert "59 pictures" in said
    check_same(tmp_path / "ray.jsonl", tmp_path / "here.jsonl")


@pytest.mark.ray
def test_replicas_answer_as_one_server_does_and_survive_the_death_of_one(calibrated: Path) -> None:
    pytest.importorskip("ray")
    import socket
    import time

    import httpx
    import ray

    from miaformer.cli import build_parser
    from miaformer.cli.serve import _replica
    from miaformer.serving.on_ray import replicated

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = build_parser().parse_args(["serve", str(calibrated), "--threads", "1", "--device", "cpu", "--no-page"])
    predictor = Predictor(load(calibrated))

    def ask(seed: int) -> dict:
        """An answer, asked again where the replica that had the question died."""
        for _ in range(200):
            try:
                reply = httpx.post(f"{url}/predict", content=picture(seed), params={"budget": 0.5}, timeout=60)
                if reply.status_code == 200:
                    return reply.json()["predictions"][0]
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("no answer")

    with replicated(partial(_replica, args), "127.0.0.1", port, [2]):
        url = f"http://127.0.0.1:{port}"
        for seed in range(12):
            if seed == 4:
                victims = [a for a in ray.util.list_named_actors(all_namespaces=True) if "REPLICA" in a["name"]]
                assert len(victims) == 2
                ray.kill(ray.get_actor(victims[0]["name"], namespace=victims[0]["namespace"]))
            (alone,) = predictor.read(predictor.run([predictor.prepare(picture(seed))], budget=0.5))
            said = ask(seed)
            assert said["label"] == alone.top_k[0].label
            assert said["macs_fraction"] == pytest.approx(alone.macs_fraction)
