"""What are 8 bits worth, and what is skipping worth on top of them? Dense and adaptive files, in float32 and in 8-bit
integers, in ONNX Runtime and OpenVINO, one image at a time.

    python benchmarks/int8.py --model runs/photos/model --data PHOTOS --json benchmarks/results/int8-NAME.json
    python benchmarks/int8.py --model timm:deit_small_patch16_224 --data PICTURES --json ...

All files are timed in turn on the same images: give the machine nothing else to do. Accuracy is that of the files in
ONNX Runtime on images spread over the test split; a `timm:` model gets controllers drawn at random, and no accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
from numpy.typing import NDArray
from rich.progress import track

import miaformer
from miaformer.data import Batch, build_transform, open_data
from miaformer.data.source import spread
from miaformer.data.unlabelled import read_pictures
from miaformer.evaluation.drawn import draw_controllers
from miaformer.evaluation.environment import describe_environment
from miaformer.evaluation.int8 import calibrated_int8
from miaformer.evaluation.on_data import ordered_batches
from miaformer.evaluation.timing import Race
from miaformer.export import export_onnx, open_session, run_file
from miaformer.export.dense import export_dense, quantize_int8
from miaformer.model.model import MIAFormer

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]  # inputs by name to outputs by name
RUNTIMES = ("onnxruntime", "openvino")
HELD_OUT = 32  # images that controllers are drawn and calibrated on, where there are none of the model's own


@dataclass(frozen=True)
class File:
    path: Path
    precision: str
    adaptive: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a calibrated model, or timm:NAME")
    parser.add_argument("--data", required=True, help="its data set, or for timm:NAME a folder of images")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--images", type=int, default=100, help="that are timed")
    parser.add_argument("--test-images", type=int, help="whose answers are counted (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    drawn = args.model.startswith("timm:")
    if drawn:
        model = miaformer.adapt(timm.create_model(args.model.removeprefix("timm:"))).eval()
        transform = build_transform(model.data_config())
        images = read_pictures(args.data, transform, args.images + HELD_OUT, args.seed)
        images, held_out = images[:-HELD_OUT], images[-HELD_OUT:]
        numbers = torch.arange(HELD_OUT)
        calibration = [Batch(held_out, numbers, numbers)]
        draw_controllers(model, held_out, args.seed)
        miaformer.calibrate(model, calibration, "pictures")
    else:
        model = miaformer.load(args.model).eval()
        calibration = list(ordered_batches(model, open_data(args.data, "calibration")).epoch(0))
        split = open_data(args.data, "test")
        test = ordered_batches(model, spread(split, args.test_images or len(split)))
        images = torch.cat([batch.images for batch in ordered_batches(model, spread(split, args.images)).epoch(0)])
    with tempfile.TemporaryDirectory() as folder:
        print("Exporting, and calibrating the file in 8-bit integers ...")
        files = written(model, calibrated_int8(model, calibration), Path(folder))
        times = timed(files, images.numpy(), args.budgets, args.runtimes, args.threads, args.rounds)
        accuracy = [] if drawn else answers(files, test, args.budgets)
    result = {
        "command": f"python benchmarks/int8.py --model {args.model if drawn else 'MODEL'} --data DATA --threads "
        f"{args.threads} --budgets {' '.join(map(str, args.budgets))} --images {args.images} --rounds {args.rounds}",
        "model": args.model if drawn else Path(args.model).name,
        "controllers": "drawn at random" if drawn else "trained",
        "images": len(images),
        "rounds": args.rounds,
        "rows": times,
        "accuracy": accuracy,
        "environment": describe_environment(torch.device("cpu"), args.seed),
    }
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    print(f"written to {args.json}")


def written(model: MIAFormer, model_int8: MIAFormer, folder: Path) -> list[File]:
    """The four files, of operators that every runtime has."""
    shape = (model.backbone.in_chans, *model.image_size())
    paths = [folder / f"{kind}-{bits}.onnx" for kind in ("dense", "adaptive") for bits in ("float32", "int8")]
    export_dense(model.backbone, paths[0], shape)
    quantize_int8(paths[0], paths[1])
    export_onnx(model, paths[2], standard_ops=True)
    export_onnx(model_int8, paths[3], standard_ops=True, int8=True)
    return [File(path, path.stem.split("-")[1], path.stem.startswith("adaptive")) for path in paths]


def opened(file: File, runtime: str, threads: int) -> Run:
    if runtime == "onnxruntime":
        session = open_session(file.path, threads)
        inputs, names = {one.name for one in session.get_inputs()}, [one.name for one in session.get_outputs()]

        def run(feed: Mapping[str, Array]) -> Mapping[str, Array]:
            values = session.run(names, {name: value for name, value in feed.items() if name in inputs})
            return dict(zip(names, values, strict=True))

        return run
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(str(file.path), "CPU", settings)
    inputs = {name for one in compiled.inputs for name in one.get_names()}

    def infer(feed: Mapping[str, Array]) -> Mapping[str, Array]:
        found = compiled({name: value for name, value in feed.items() if name in inputs})
        return {name: found[one] for one in compiled.outputs for name in one.get_names()}

    return infer


def metadata(file: File) -> dict[str, str]:
    return {one.key: one.value for one in onnx.load(file.path, load_external_data=False).metadata_props}


def answers(files: list[File], test: Any, budgets: list[float]) -> list[dict[str, Any]]:
    """Accuracy in per cent and mean MACs of each file at each budget."""
    runs = [(file, opened(file, "onnxruntime", torch.get_num_threads()), metadata(file)) for file in files]
    asked = [(place, budget) for place, file in enumerate(files) for budget in (budgets if file.adaptive else [1.0])]
    right: dict[tuple[int, float], list[bool]] = {one: [] for one in asked}
    spent: dict[tuple[int, float], list[float]] = {one: [] for one in asked}
    done = 0
    for batch in track(test.epoch(0), description="answers"):
        for image, label in zip(batch.images.numpy(), batch.labels.tolist(), strict=True):
            done += 1
            for place, budget in asked:
                file, run, meta = runs[place]
                found = called(file, run, meta, budget, image[None])
                right[place, budget].append(int(found["logits"].argmax()) == label)
                spent[place, budget].append(fraction(found))
    return [
        {
            **described(files[place], budget),
            "accuracy": 100 * float(np.mean(right[place, budget])),
            "macs_fraction": float(np.mean(spent[place, budget])),
            "test_images": done,
        }
        for place, budget in asked
    ]


def called(file: File, run: Run, meta: Mapping[str, str], budget: float, image: Array) -> Mapping[str, Array]:
    return run_file(run, meta, image, budget) if file.adaptive else run({"images": image})


def fraction(outputs: Mapping[str, Array]) -> float:
    """Of the dense MACs."""
    return float(outputs["macs_fraction"][0]) if "macs_fraction" in outputs else 1.0


def described(file: File, budget: float) -> dict[str, Any]:
    return {"precision": file.precision, "budget": budget if file.adaptive else None}


def timed(
    files: list[File], images: Array, budgets: list[float], runtimes: list[str], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """Milliseconds of an image, and the fraction of the dense file's, of either precision, in the same runtime."""
    calls: list[Callable[[Array], Mapping[str, Array]]] = []
    rows: list[dict[str, Any]] = []
    for runtime in runtimes:
        for file in files:
            run, meta = opened(file, runtime, threads), metadata(file)
            for budget in budgets if file.adaptive else [1.0]:
                calls.append(partial(called, file, run, meta, budget))
                rows.append({"runtime": runtime, **described(file, budget)})
    race = Race(calls, [image[None] for image in images], rehearse=True)
    for _ in track(range(rounds), description="timing"):
        race.sweep()
    of = {(row["runtime"], row["precision"]): place for place, row in enumerate(rows) if row["budget"] is None}
    for place, row in enumerate(rows):
        row["ms"] = race.ms(place)
        row["macs_fraction"] = float(np.mean([fraction(calls[place](image[None])) for image in images]))
        for precision in ("float32", "int8"):
            against = of[row["runtime"], precision]
            row[f"of_dense_{precision}"] = race.fraction(place, against)
            row[f"spread_{precision}"] = race.spread(place, against)
    return rows


def show(result: dict[str, Any]) -> None:
    accuracy = {(one["precision"], one["budget"]): one["accuracy"] for one in result["accuracy"]}
    for row in result["rows"]:
        budget = "dense" if row["budget"] is None else f"{row['budget']:g}"
        found = accuracy.get((row["precision"], row["budget"]))
        print(
            f"{row['runtime']:12s} {row['precision']:8s} {budget:>6s}  "
            f"MACs {row['macs_fraction']:.3f}  {row['ms']:7.2f} ms  "
            f"{row['of_dense_float32']:.2f} of dense float32  {row['of_dense_int8']:.2f} of dense int8"
            + ("" if found is None else f"  {found:.2f} %")
        )


if __name__ == "__main__":
    main()
