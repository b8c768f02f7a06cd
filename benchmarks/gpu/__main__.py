"""What wants a GPU, in stages of at most nine minutes: python -m benchmarks.gpu STAGE --out DIR (see README.md)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import commands, correct, kernels
from .parts import PART_BYTES, pack, unpack
from .record import OutOfTimeError, Record

STAGES = ("correct", *commands.STAGES)


def main(argv: list[str] | None = None) -> int:
    """0: done; 3: out of time, the same call goes on; 1: something is wrong, which the last line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("stage", choices=(*STAGES, "pack", "unpack"))
    parser.add_argument("--out", type=Path, required=True, help="of a stage: where its JSON goes, and is looked for")
    parser.add_argument("--files", type=Path, default=Path("runs/gpu-files"), help="pictures and weights, unpacked")
    parser.add_argument("--minutes", type=float, default=8.5, help="after which a call ends (default: 8.5)")
    parser.add_argument("--device", default="cuda", help="(default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="the same on small models and few pictures, in minutes")
    parser.add_argument("--part-mb", type=float, default=PART_BYTES / 2**20, help="with pack: of a part")
    parser.add_argument("sources", nargs="*", type=Path, help="with pack: files and folders; with unpack: parts")
    args = parser.parse_intermixed_args(argv)
    if args.stage == "pack":
        for folder in pack(args.sources, args.out, int(args.part_mb * 2**20)):
            print(folder)
        return 0
    if args.stage == "unpack":
        unpack(args.sources, args.out)
        return 0
    device = torch.device(args.device)
    record = Record(args.out, args.stage, device, 60 * args.minutes)
    try:
        if args.stage == "correct":
            correct.run(record, device, args.tiny)
        else:
            commands.run(record, commands.STAGES[args.stage](args.files, args.out, args.device, args.tiny))
            if args.stage == "fast":
                kernels.run(record, device, args.tiny)
    except OutOfTimeError as late:
        print(late)
        return 3
    except (AssertionError, RuntimeError) as wrong:
        print(f"{args.stage}: {type(wrong).__name__}: {wrong}")
        return 1
    finally:
        print(f"To take home: {commands.take_home(args.out, args.stage)}")
    print(f"{args.stage}: done, {len(record.steps)} steps in {args.out / args.stage}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
