"""`miaformer predict`, or `embed`, under kill -9: killed at random, resumed each time, is the file what it would have
been?

    .venv/bin/python benchmarks/kill_predict.py --json benchmarks/results/kill-predict.json
    .venv/bin/python benchmarks/kill_predict.py --command embed --data PICTURES --json FILE

Makes pictures of noise, in tar shards and a parquet file, or takes --data. For each format one run goes through, and
another is killed when a random number of its rows is safe, plus up to 50 ms, and resumed, --kills times. Then .csv,
.jsonl and .npz have to be the same to the byte, .parquet to the row. Prints each kill; exit status 1 says that a file
differs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from miaformer.evaluation import describe_environment

IN_A_SHARD = 1000
FORMATS = {"predict": ["csv", "jsonl", "parquet"], "embed": ["npz", "parquet"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=FORMATS, default="predict")
    parser.add_argument("--model", default="cifar10-small")
    parser.add_argument("--data", nargs="+", metavar="PATH", help="what to classify, instead of noise")
    parser.add_argument("--pictures", type=int, default=10_000, metavar="N", help="of noise (default: 10,000)")
    parser.add_argument("--formats", nargs="+", metavar="F", help="default: all that the command knows")
    parser.add_argument("--kills", type=int, default=5, metavar="N", help="of each format (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        data = args.data or [str(path) for path in noise(work / "noise", args.pictures, args.seed)]
        rows = [trial(args, data, work, name, generator) for name in args.formats or FORMATS[args.command]]
    if args.json is not None:
        environment = describe_environment(torch.device("cpu"), args.seed)
        report = {"command": args.command, "formats": rows, "environment": environment}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {args.json}")
    return 0 if all(row["identical"] for row in rows) else 1


def noise(folder: Path, count: int, seed: int) -> list[Path]:
    """JPEG pictures of 32 x 32 pixels: nine tenths in tar shards, the others in a parquet file."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    generator = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        pixels = generator.integers(0, generator.integers(2, 257), (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        encoded.append(file.getvalue())
    in_tars = count * 9 // 10
    for start in range(0, in_tars, IN_A_SHARD):
        with tarfile.open(folder / f"shard-{start // IN_A_SHARD:03}.tar", "w") as tar:
            for number, content in enumerate(encoded[start : min(start + IN_A_SHARD, in_tars)], start):
                member = tarfile.TarInfo(f"{number:06}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    pyarrow.parquet.write_table(pyarrow.table({"image": encoded[in_tars:]}), folder / "last.parquet")
    return sorted(folder.iterdir())


def trial(args: argparse.Namespace, data: list[str], work: Path, name: str, generator: random.Random) -> dict[str, Any]:
    """One run that goes through and one that is killed, in one format."""
    whole, out = work / f"whole.{name}", work / f"out.{name}"
    start = time.perf_counter()
    status = predict(args, data, whole).wait()
    if status > 1:
        raise SystemExit(status)
    seconds, total = time.perf_counter() - start, count_rows(whole)
    print(f"{name}: {total:,} rows in {seconds:.1f} s, start included", flush=True)
    kills = []
    for target in sorted(generator.randrange(total // 20, total * 19 // 20) for _ in range(args.kills)):
        before = safe_rows(out)
        process = predict(args, data, out, *(["--resume"] if kills else []))
        while safe_rows(out) < max(target, before + 1):
            if process.poll() is not None:
                raise SystemExit(f"it ended with {process.returncode} before row {target:,}")
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        killed = process.wait() == -signal.SIGKILL and not out.exists()
        kills.append({"resumed_after": before, "asked_for": target, "safe": safe_rows(out), "killed": killed})
        print(f"{name}: resumed after {before:,}, killed with {safe_rows(out):,} rows safe", flush=True)
    resumed_status = predict(args, data, out, "--resume").wait()
    identical = resumed_status == status and all(kill["killed"] for kill in kills) and same(whole, out)
    print(f"{name}: {'identical' if identical else 'DIFFERENT'} after {len(kills)} kills", flush=True)
    return {"format": name, "rows": total, "seconds": seconds, "kills": kills, "identical": identical}


def predict(args: argparse.Namespace, data: list[str], out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "miaformer", args.command, args.model, *data, "--out", str(out)]
    options = ["--budget", "0.5", "--device", "cpu", "--threads", str(args.threads), *more]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)


def safe_rows(out: Path) -> int:
    """As the journal of an unfinished run says."""
    journal = out.with_name(f"{out.name}.partial") / "run.jsonl"
    if not journal.exists():
        return 0
    lines = journal.read_bytes().split(b"\n")[:-1]  # what follows the last end of a line was cut short
    return sum(len(json.loads(line)["rows"]) for line in lines[1:])


def count_rows(path: Path) -> int:
    import pyarrow.parquet

    if path.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(path).metadata.num_rows
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return len(arrays["path"]) + len(arrays["failed"])
    return path.read_bytes().count(b"\n") - (path.suffix == ".csv")


def same(one: Path, other: Path) -> bool:
    import pyarrow.parquet

    if one.suffix == ".parquet":
        return pyarrow.parquet.read_table(one).equals(pyarrow.parquet.read_table(other))
    return one.read_bytes() == other.read_bytes()


if __name__ == "__main__":
    raise SystemExit(main())
