"""A run as one page: what it is, what it did, its settings and where that was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miaformer.data.files import read_json
from miaformer.reports.comparison import comparison_body, comparison_head, is_comparison
from miaformer.reports.evaluation import evaluation_section, is_evaluation
from miaformer.reports.history import is_history, read_history
from miaformer.reports.measured import is_comparison_directory, read_comparison
from miaformer.reports.page import Markup, document, facts, join, tag
from miaformer.reports.training import settings, training_body, training_head

HOLDS = (
    "give a directory of `miaformer train` (it holds recipe.json and metrics.jsonl) or of `miaformer compare` (it "
    "holds METHOD/seedK/measured.json), or what `compare --json` or `eval --json` wrote"
)


@dataclass(frozen=True)
class Subject:
    """What a report is about."""

    title: str
    head: Markup
    body: Markup
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by what was done there
    model: Path | None = None


def read_subject(path: Path) -> Subject:
    """Raises ValueError, saying what a run is, where nothing of a run is there."""
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory; {HOLDS}")
    if path.is_file():
        report = read_json(path)
        if is_comparison(report):
            with _as_written(path, "compare"):
                return _of_comparison(path.stem, report)
        if is_evaluation(report):
            with _as_written(path, "eval"):
                return _of_evaluation(path.stem, report)
        raise ValueError(f"{path} is no report of a comparison or an evaluation: {HOLDS}")
    if is_history(path):
        run = read_history(path)
        model = path / "model" if run.has_model else None
        title = f"{run.recipe['name']}, training run"
        environments = {"Where it was trained": run.environment} if run.environment else {}
        return Subject(title, training_head(run), join(training_body(run)), run.recipe, environments, model)
    if is_comparison_directory(path):
        measured, missing = read_comparison(path)
        if measured is None:
            raise ValueError(f"{path} holds a comparison of which nothing is measured yet: {'; '.join(missing)}")
        learned = path / "learned" / "seed0" / "model"
        has_model = (learned / "model.safetensors").is_file()
        return _of_comparison(path.name, measured, missing, learned if has_model else None)
    raise ValueError(f"{path} {'holds no run' if any(path.iterdir()) else 'is empty'}: {HOLDS}")


def report_page(subject: Subject, evaluations: Mapping[str, Mapping[str, Any]], more: Iterable[Markup]) -> str:
    """evaluations: of `read_evaluation`, by the names of their files; more: sections before the settings.

    Raises ValueError naming an evaluation that is none.
    """
    sections = [subject.head, subject.body]
    environments = dict(subject.environments)
    for name, report in evaluations.items():
        with _as_written(name, "eval"):
            sections.append(join(evaluation_section(report)))
        environments[f"Where it was evaluated: {name}"] = report.get("environment", {})
    sections += more
    if subject.recipe:
        sections.append(join(settings(subject.recipe)))
    for name, environment in environments.items():
        if environment:
            sections.append(_environment(name, environment))
    return document(subject.title, tag("main", *sections))


def read_evaluation(path: Path) -> dict[str, Any]:
    """Raises ValueError where it is no report of `miaformer eval`."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give what `miaformer eval --json` wrote")
    report = read_json(path)
    if not is_evaluation(report):
        raise ValueError(f"{path} is not what `miaformer eval --json` writes: it has no points beside a dense model")
    return report


def _of_comparison(
    name: str, report: Mapping[str, Any], missing: Sequence[str] = (), model: Path | None = None
) -> Subject:
    head, body = comparison_head(report, missing), join(comparison_body(report))
    return Subject(f"{name}, comparison", head, body, report.get("recipe", {}), _measured_in(report), model)


def _of_evaluation(name: str, report: Mapping[str, Any]) -> Subject:
    head = tag("h1", f"Evaluation: {report.get('model', name)}")
    return Subject(f"{name}, evaluation", head, join(evaluation_section(report)), {}, _measured_in(report))


def _measured_in(report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"Where it was measured": report["environment"]} if report.get("environment") else {}


@contextmanager
def _as_written(path: str | Path, command: str) -> Iterator[None]:
    """Raises ValueError, naming the file, where it lacks what the command writes."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        wrong = f"{type(error).__name__} {error}"
        raise ValueError(f"{path} is not what `miaformer {command} --json` writes ({wrong})") from error


def _environment(name: str, environment: Mapping[str, Any]) -> Markup:
    versions = environment.get("versions", {})
    known = {
        "Device": environment.get("device"),
        "Processor": environment.get("processor"),
        "Threads": environment.get("threads"),
        "Seed": environment.get("seed"),
        "Versions": ", ".join(f"{package} {version}" for package, version in versions.items() if version),
        "Commit": environment.get("git_commit"),
        "Date": environment.get("date"),
    }
    shown = facts({key: value for key, value in known.items() if value not in (None, "")})
    command = environment.get("command")
    return join((tag("h2", name), tag("p", tag("code", command)) if command else None, shown))
