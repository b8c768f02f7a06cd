"""Fills the tables of README and docs from benchmarks/results, so that no figure there is typed by hand.

    .venv/bin/python benchmarks/tables.py            # write them
    .venv/bin/python benchmarks/tables.py --check    # exit status 1 where one is out of date

A table stands between `<!-- table NAME FILE ... -->` and `<!-- end -->`; NAME is a function below, FILE lies in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miaformer.lab.corruptions import mean_rows
from miaformer.reports.comparison_rows import COLUMNS, OURS, written

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CARD = "src/miaformer/model/bundled/cifar10-small/README.md"
PAGES = ("README.md", "docs/gain.md", "docs/speed.md", "docs/results.md", "docs/robustness.md", CARD)

Report = dict[str, Any]
ALL_GRAINS = "blocks, heads, tokens"


def speed(report: Report, name: str) -> str:
    """Every row of `miaformer bench`."""
    head = ("dtype", "batch", "engine", "grains", "budget", "MACs (± between images)", "time", "efficiency")
    rows = [
        (
            row["dtype"],
            row["batch"],
            row["engine"],
            ALL_GRAINS if row["grains"] == "all" else row["grains"],
            "everything" if row["budget"] == 1 else f"{row['budget']:g}",
            f"{row['macs_fraction']:.3f} ± {row['macs_fraction_std']:.3f}",
            f"{row['time_fraction']:.2f}",
            f"**{row['efficiency']:.2f}**",
            f"{row['best_time_fraction']:.2f} ({row['best_dense_engine']})",
        )
        for row in report["rows"]
    ]
    return f"`{_command(report)}` ([JSON](../benchmarks/results/{name}))\n\n" + _table(
        (*head, "time / best dense"), rows
    )


def speed_summary(report: Report, name: str) -> str:
    """The eager rows, with those after `prepack()` in brackets."""
    packed = {(r["batch"], r["grains"], r["budget"]): r for r in report["rows"] if r["engine"] == "packed"}
    rows = []
    for row in report["rows"]:
        if row["engine"] != "eager":
            continue
        other = packed[row["batch"], row["grains"], row["budget"]]
        grains = ALL_GRAINS if row["grains"] == "all" else f"{row['grains']} alone"
        rows.append(
            (
                row["batch"],
                "everything" if row["budget"] == 1 else grains,
                f"{row['macs_fraction']:.2f}",
                f"{row['time_fraction']:.2f} ({other['time_fraction']:.2f})",
                f"{row['efficiency']:.2f} ({other['efficiency']:.2f})",
            )
        )
    made = _table(("batch", "grains", "MACs", "time", "efficiency"), rows)
    return f"{made}\n\nFrom `{_command(report)}` ([JSON](benchmarks/results/{name}))."


def onnx_agreement(report: Report, name: str) -> str:
    rows = [
        (
            f"{row['budget']:g}",
            f"{row['macs_fraction']:.3f} ± {row['macs_fraction_std']:.3f}",
            f"{100 * row['differing_share']:.1f} %",
            f"{row['logits_difference']:.0e}",
        )
        for row in report["rows"]
    ]
    head = (
        *("budget", "MACs (± between images)", "images whose decisions differ"),
        "relative difference of the other images' logits",
    )
    command = f"`{report['command']}` ([JSON](../benchmarks/results/{name})), {report['pictures']} images"
    return f"{command}\n\n{_table(head, rows)}"


def under_attack(report: Report, name: str) -> str:
    """What is right after each attack and those before it. Beside NAME, attack-MODEL-EPS.json, lie its other radii
    and the static model's.
    """
    about = {"adaptive": "adaptive at 0.5 of the MACs", "backbone": "static"}
    rows = []
    for eps in (1, 2, 4, 8):
        for model, words in about.items():
            other = json.loads((RESULTS / f"attack-{model}-{eps}.json").read_text())
            found = {row["attack"]: row for row in other["rows"] if row["target"] == model}
            right = (f"{100 * found[attack]['robust']:.1f}" for attack in ("fgsm", "pgd", "adaptive"))
            file = f"[JSON](../benchmarks/results/attack-{model}-{eps}.json)"
            rows.append(
                (f"{eps}/255", words, f"{100 * found['worst']['clean']:.1f}", *right, _robust(found["worst"]), file)
            )
    head = ("radius", "model", "clean, %", "FGSM", "then PGD", "then adaptive", "worst, % (95 %)", "")
    return f"`{_command(report)}`\n\n{_table(head, rows)}"


def carried_over(report: Report, name: str) -> str:
    """What PGD does to sub-networks, made on the static model and made on themselves. Those whose decisions are drawn
    lie beside NAME.
    """
    about = {
        "backbone": "everything",
        "adaptive": "what controllers decide, 0.5 of the MACs",
        "static": "their mean decisions, for every image",
        "random": "as much of everything, at random",
        "sampled": "what controllers decide, drawn",
    }
    drawn = name.replace(".json", "-drawn.json")
    found: dict[str, dict[str, Any]] = {}
    for row in [*report["rows"], *json.loads((RESULTS / drawn).read_text())["rows"]]:
        found.setdefault(row["target"], {})[row["attack"]] = row
    rows = []
    for target, words in about.items():
        own, carried = found[target].get("pgd"), found[target].get("transfer", found[target].get("pgd"))
        clean = f"{100 * carried['clean']:.1f}"
        rows.append((words, clean, _robust(carried), "" if own is None else _robust(own)))
    head = ("executed", "clean, %", "PGD made on the static model, % (95 %)", "made on itself")
    files = f"[JSON](../benchmarks/results/{name}), [drawn](../benchmarks/results/{drawn})"
    return f"`{_command(report)}` ({files})\n\n{_table(head, rows)}"


def withstood(report: Report, name: str) -> str:
    """What is right after each attack and those before it, AutoAttack the last. Beside NAME, which is the adaptive
    model's, lie the static one's and the one's that draws its decisions.
    """
    about = {"backbone": "static", "adaptive": "adaptive at 0.5 of the MACs", "sampled": "the same, decisions drawn"}
    attacks = ("fgsm", "pgd", "adaptive", "transfer", "autoattack")
    rows = []
    for model, words in about.items():
        file = name.replace("adaptive", model)
        other = json.loads((RESULTS / file).read_text())
        found = {row["attack"]: row for row in other["rows"]}
        right = (f"{100 * found[one]['robust']:.1f}" if one in found else "" for one in attacks)
        clean = f"{100 * found['worst']['clean']:.1f}"
        link = f"[JSON](../benchmarks/results/{file})"
        rows.append((words, other["steps"], clean, *right, _robust(found["worst"]), link))
    head = ("model", "steps", "clean, %", "FGSM", "then PGD", "then adaptive", "then carried over", "then AutoAttack")
    return f"`{_command(report)}`\n\n{_table((*head, 'worst, % (95 %)', ''), rows)}"


def corrupted(report: Report, name: str) -> str:
    """Accuracy, and MACs where images differ in them, by corruption: means over severities."""
    means = mean_rows(report["corruptions"])
    asked = list(dict.fromkeys((row["policy"], row["budget"]) for row in means))
    found = {(row["corruption"], row["policy"], row["budget"]): row for row in means}

    def cell(corruption: str, policy: str, budget: float | None) -> str:
        row = found[corruption, policy, budget]
        accuracy = f"{100 * row['accuracy']:.1f}"
        return accuracy if policy == "dense" else f"{accuracy} ({row['macs_fraction']:.3f})"

    rows = [
        (f"**{one}**" if one == "mean" else one.replace("_", " "), *(cell(one, *column) for column in asked))
        for one in dict.fromkeys(row["corruption"] for row in means)
    ]
    head = ("", *(policy if budget is None else f"{policy}, {budget:g}" for policy, budget in asked))
    return f"`{_command(report)}` ([JSON](../benchmarks/results/{name}))\n\n{_table(head, rows)}"


def _robust(row: dict[str, Any]) -> str:
    low, high = (f"{100 * end:.1f}" for end in row["robust_interval"])
    return f"{100 * row['robust']:.1f} ({low}, {high})"


def compute_attacks(report: Report, name: str) -> str:
    """What attacks on compute reach. Those that keep the class lie beside NAME."""
    kept = name.replace(".json", "-kept.json")
    rows = [
        (
            f"a patch of {100 * row['patch_area']:.0f} % of the area, one for all" if row["eps"] is None
            else f"every pixel by {255 * row['eps']:.0f}/255, image by image",
            "wanted" if row["attack"].endswith("-kept") else "",
            *(f"{row[f'macs_fraction_{which}']:.3f}" for which in ("clean", "attacked", "max")),
            *(f"{100 * row[which]:.1f}" for which in ("clean", "robust")),
        )
        for row in [*report["rows"], *json.loads((RESULTS / kept).read_text())["rows"]]
    ]  # fmt: skip
    head = ("changed", "class kept", "MACs before", "after", "the most expensive image", "right before, %", "after")
    files = f"[JSON](../benchmarks/results/{name}), [class kept](../benchmarks/results/{kept})"
    return f"`{_command(report)}` ({files})\n\n{_table(head, rows)}"


def comparison(report: Report, name: str) -> str:
    """Every row of `miaformer compare`, budget by budget."""
    order = written(report["rows"], report["differences"])
    rows = [(f"**{method}**" if method == OURS else method, *cells) for _, (method, *cells) in order]
    return f"`{_command(report)}` ([JSON](../benchmarks/results/{name}))\n\n{_table(COLUMNS, rows)}"


METHODS = {
    "learned": "**ours**",
    "static": "static: the same decisions for every image",
    "random": "random: as much compute as ours, chosen at random",
    "dense": "dense, trained further for the same epochs",
    "backbone": "dense, fine-tuned only",
    "shallow": "shallow ViTs: the first blocks, trained further",
    "cls-attention": "EViT's criterion: tokens by class attention",
    "top-tokens": "DynamicViT: tokens by trained scorers",
    "merging": "ToMe, fine-tuned",
    "merging-free": "ToMe, without training",
    "exits": "early exits by confidence",
    "even-exits": "ours without controllers: evenly spread tokens, early exit by confidence",
    "resolution": "lower input resolution, fine-tuned",
    "resolution-free": "lower input resolution, without training",
    "resolution-looks": "a smaller image first, a larger one if not confident",
    "int8": "int8 (ONNX Runtime), without training",
}


MET = 0.01  # MACs fractions that differ from a budget by more than this are printed
MACS_IN_BRACKETS = f"In brackets: MACs that differ from the budget by more than {MET:g}"


def _accuracy_at(row: dict[str, Any], budget: float) -> str:
    """Accuracy in per cent, with the MACs fraction where it is not the budget."""
    accuracy, macs = f"{100 * row['accuracy']:.1f}", row["macs_fraction"]
    return accuracy if abs(macs - budget) <= MET else f"{accuracy} (at {macs:.2f})"


def by_budget(report: Report, name: str) -> str:
    """Accuracy by method and budget; a method without budgets appears where its MACs are near one."""
    budgets = sorted({row["budget"] for row in report["rows"] if row["budget"] is not None})
    equal = report["at_equal_accuracy"]

    def cell(method: str, budget: float) -> str:
        for row in report["rows"]:
            if row["name"] != method:
                continue
            is_near = row["budget"] is None and method != "dense" and abs(row["macs_fraction"] - budget) < 0.06
            if row["budget"] == budget or is_near:
                return _accuracy_at(row, budget)
        return ""

    dense = next(row for row in report["rows"] if row["name"] == "dense")
    rows = [
        (
            METHODS.get(method, method),
            *(cell(method, budget) for budget in budgets),
            f"{100 * dense['accuracy']:.1f}" if method == "dense" else "",
            f"{equal[method]:.2f}" if method in equal else "",
        )
        for method in dict.fromkeys(row["name"] for row in report["rows"])
    ]
    head = ("method", *(f"{budget:g}" for budget in budgets), "1", "MACs for half a point of loss")
    about = f"Accuracy in per cent by budget, {report['num_images']:,} test images. {MACS_IN_BRACKETS}"
    return f"{about}; `{_command(report)}`\n\n{_table(head, rows)}"


ONE_POINT = 0.01  # of accuracy


def baselines(report: Report, name: str, link: str = "../benchmarks/results/") -> str:
    """A comparison on a pretrained backbone: accuracy by budget, and what one point of accuracy buys in MACs and in
    milliseconds, each method on its fastest engine.
    """
    budgets = sorted({row["budget"] for row in report["rows"] if row["budget"] is not None})
    methods = list(dict.fromkeys(row["name"] for row in report["rows"]))
    own = {method: [row for row in report["rows"] if row["name"] == method] for method in methods}
    dense = max((own[name][0] for name in ("dense", "backbone") if name in own), key=lambda row: row["accuracy"])
    sizes = sorted({size for row in report["rows"] for size in row.get("times", {})}, key=int)
    rows = [
        (
            METHODS.get(method, method),
            *(_within_budget(own[method], budget) for budget in budgets),
            _percent(own[method][0]["accuracy"])[:-2] if method in ("dense", "backbone", "int8") else "",
            _macs_below(report["one_point_below"], method),
            *(_fastest(own[method], size, dense["accuracy"] - ONE_POINT) for size in sizes),
            _minutes(report, method),
        )
        for method in methods
    ]
    head = (
        *("method", *(f"{budget:g}" for budget in budgets), "1", "MACs for one point of loss"),
        *(f"ms at batch {size}" for size in sizes),
        "adaptation, core minutes",
    )
    about = (
        f"Accuracy in per cent by budget, {report['num_images']:,} test images; a method without budgets appears at "
        f"its largest setting within each budget. {MACS_IN_BRACKETS}. MACs for one point of loss: the MACs at which "
        "accuracy is one point below dense, with the 95 % interval"
    )
    if sizes:
        about += (
            ". Milliseconds per batch: for the fastest setting that loses less than one point, on its fastest engine; "
            "in brackets the fraction of the dense model's time on the dense model's own fastest engine, and the engine"
        )
    return f"{about}; `{_command(report)}` ([JSON]({link}{name}))\n\n{_table(head, rows)}"


def baselines_readme(report: Report, name: str) -> str:
    """The same in the README."""
    return baselines(report, name, "benchmarks/results/")


def _within_budget(rows: list[dict[str, Any]], budget: float) -> str:
    """Accuracy at a budget; of a method without budgets, at its largest setting within it."""
    for row in rows:
        if row["budget"] == budget:
            return _accuracy_at(row, budget)
    within = [row for row in rows if row["budget"] is None and row["macs_fraction"] <= budget + 0.005]
    return _accuracy_at(max(within, key=lambda row: row["macs_fraction"]), budget) if within else ""


def _macs_below(found: dict[str, Any], method: str) -> str:
    one = found.get("methods", {}).get(method)
    return "" if one is None else f"{one['macs_fraction']:.2f} ({one['interval'][0]:.2f}, {one['interval'][1]:.2f})"


def _fastest(rows: list[dict[str, Any]], size: str, least_accuracy: float) -> str:
    """Of the settings that are accurate enough the fastest at a batch size."""
    timed = [row["times"][size] for row in rows if row["accuracy"] >= least_accuracy and size in row.get("times", {})]
    if not timed:
        return ""
    best = min(timed, key=lambda time: time["fraction"])
    return f"{best['ms']:.1f} ({best['fraction']:.2f}, {best['engine']})"


def _minutes(report: Report, method: str) -> str:
    found = report.get("adaptation", {}).get("learned" if method in ("static", "random") else method)
    return "" if found is None else f"{found['minutes']:.0f}"


def card(report: Report, name: str) -> str:
    """Of the bundled model, which is seed 0 of ours."""
    rows = [
        (f"{row['budget']:g}", f"{row['macs_fraction']:.3f}", f"{100 * row['accuracy_by_seed'][0]:.1f} %")
        for row in sorted(report["rows"], key=lambda row: row["budget"] or 2.0)
        if row["name"] == "learned"
    ]
    dense = next(row for row in report["rows"] if row["name"] == "dense")
    rows.append(
        (
            "dense backbone, trained further for the same epochs",
            f"{dense['macs_fraction']:.3f}",
            _percent(dense["accuracy"]),
        )
    )
    images = f"{report['num_images']:,} test images of CIFAR-10 stored as JPEG"
    return f"{images}, MACs as a fraction of the backbone's:\n\n{_table(('budget', 'MACs', 'accuracy'), rows)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seeds(report: Report, name: str) -> str:
    """Of our method: each seed, and how spending follows difficulty."""
    follows = {at["budget"]: at for at in report["adaptivity"]}
    rows = [
        (
            f"{row['budget']:g}",
            f"{row['macs_fraction']:.3f} ± {row['macs_fraction_std']:.3f}",
            ", ".join(f"{100 * one:.2f}" for one in row["accuracy_by_seed"]),
            f"{follows[row['budget']]['loss']:+.2f}",
            f"{follows[row['budget']]['margin']:+.2f}",
        )
        for row in sorted(report["rows"], key=lambda row: row["budget"] or 2.0)
        if row["name"] == "learned"
    ]
    head = (
        "budget",
        "MACs (± between images)",
        "accuracy of each seed, %",
        "rank correlation of MACs with loss",
        "with minus the margin",
    )
    return _table(head, rows)


def ablations(report: Report, name: str) -> str:
    """What each part is worth, of one seed: accuracy, and at each budget by how much the whole is ahead."""
    budgets = sorted({row["budget"] for row in report["rows"] if row["budget"] is not None})
    gaps = {(gap["over"], gap["budget"]): gap for gap in report["differences"]}
    found = {(row["name"], row["budget"]): row for row in report["rows"]}

    def cell(method: str, budget: float) -> str:
        if (method, budget) not in found:
            return ""
        accuracy = f"{100 * found[method, budget]['accuracy']:.1f}"
        gap = gaps.get((method, budget))
        if gap is None:
            return f"**{accuracy}**"
        low, high = (f"{100 * end:+.1f}" for end in gap["interval"])
        return f"{accuracy} ({low}, {high})"

    methods = [
        name for name in dict.fromkeys(row["name"] for row in report["rows"]) if name not in ("static", "random")
    ]
    rows = [(method, *(cell(method, budget) for budget in budgets)) for method in methods]
    head = ("", *(f"{budget:g}" for budget in budgets))
    return (
        f"`{_command(report)}` ([JSON](../benchmarks/results/{name})); in brackets the 95 % "
        f"interval of the lead of `learned`, in points\n\n{_table(head, rows)}"
    )


def digits(report: Report, name: str) -> str:
    """Learned against static and random decisions on digits, means over seeds."""
    mean = report["mean"]
    points = {(p["policy"], p["budget"]): p for p in mean["points"]}
    rows = []
    for budget in sorted({budget for _, budget in points}):
        learned, static, random = (points[policy, budget] for policy in ("learned", "static", "random"))
        most = f"{learned['macs_fraction_p95']:.2f}, {learned['macs_fraction_max']:.2f}"
        spent = f"{learned['macs_fraction']:.3f}, {most}"
        accuracies = (f"{100 * point['accuracy']:.1f} %" for point in (static, random))
        rows.append((f"{budget:g}", f"**{100 * learned['accuracy']:.1f} %**", *accuracies, spent))
    head = (
        *("budget", "learned", "static: the same decisions for every image", "random"),
        "MACs, learned: mean, 95th percentile, maximum",
    )
    images = report["seeds"][0]["num_images"]
    return (
        f"Recipe `digits`, mean of {mean['seeds']} seeds, test split ({images} images); dense "
        f"{100 * mean['dense_accuracy']:.1f} %. MACs include the controllers\n"
        f"({100 * mean['controllers_macs_fraction']:.2f} % of the backbone's at most).\n\n{_table(head, rows)}\n\n"
        "Rank correlation of an image's MACs with the dense model's loss on it: "
        f"{mean['spearman_difficulty_macs']:.2f}. All from `.venv/bin/python benchmarks/digits.py`\n"
        f"([JSON](benchmarks/results/{name}), with machine, versions and commit)."
    )


TABLES: dict[str, Callable[[Report, str], str]] = {
    made.__name__: made
    for made in (
        speed,
        speed_summary,
        onnx_agreement,
        under_attack,
        carried_over,
        withstood,
        corrupted,
        compute_attacks,
        comparison,
        by_budget,
        baselines,
        baselines_readme,
        card,
        seeds,
        ablations,
        digits,
    )
}


def _command(report: Report) -> str:
    """What was called, without what it wrote and where pictures lay."""
    command = str(report["environment"]["command"]).split(" --json")[0]
    command = re.sub(r"--data \S*imagenette\S*", "--data IMAGENETTE", command)
    command = re.sub(r"--data \S*imagenet-sample\S*", "--data PICTURES", command)
    return re.sub(r"--data \S*cifar10\S*", "--data CIFAR10", command)


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def filled(page: str) -> str:
    """The page with every table made anew."""

    def make(found: re.Match[str]) -> str:
        name, file = found["name"], found["file"]
        report = json.loads((RESULTS / file).read_text())
        return f"<!-- table {name} {file} -->\n{TABLES[name](report, file)}\n<!-- end -->"

    return re.sub(r"<!-- table (?P<name>\w+) (?P<file>\S+) -->.*?<!-- end -->", make, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 where a table is out of date"
    )
    args = parser.parse_args()
    stale = []
    for path in (ROOT / name for name in PAGES):
        if not path.exists():
            continue
        page = path.read_text()
        made = filled(page)
        if made != page:
            stale.append(path.name)
            if not args.check:
                path.write_text(made)
    print(f"out of date: {', '.join(stale)}" if stale else "all tables are up to date")
    if args.check and stale:
        sys.exit(1)


if __name__ == "__main__":
    main()
