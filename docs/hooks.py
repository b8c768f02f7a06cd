"""What the site has beyond its pages: the results that they link to, and the command line's own help.

`mkdocs.yml` names this file; mkdocs calls the functions below while it builds.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
CLI_PAGE, CLI_MARK = "reference/cli.md", "<!-- command line -->"


def on_files(files: Files, config: Any) -> Files:
    """Pages link to benchmarks/results, beside docs/: the files become part of the site."""
    for path in sorted((ROOT / RESULTS).glob("*.json")):
        files.append(File.generated(config, f"{RESULTS}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(f"]({up}../{RESULTS}/", f"]({up}{RESULTS}/")
    if page.file.src_uri == CLI_PAGE:
        markdown = markdown.replace(CLI_MARK, command_line_reference())
    return markdown


def command_line_reference() -> str:
    """Every command's description, options and examples as Markdown, from the parsers themselves."""
    from miaformer.cli import build_parser

    parser = build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    about = {choice.dest: choice.help for choice in commands._choices_actions}
    parts = [_prose(parser.description), _options(parser), _prose(parser.epilog)]
    for name, command in commands.choices.items():
        parts += [
            f"## miaformer {name} {{ #{name} }}",
            _sentence(about[name]),
            f"``` {{ .text .wraps }}\n{_usage(command).strip()}\n```",
            _prose(command.description),
            _options(command),
            _prose(command.epilog),
        ]
    return "\n\n".join(part for part in parts if part)


def _usage(parser: argparse.ArgumentParser) -> str:
    """In one line: the page breaks it where it has to."""
    formatter = argparse.HelpFormatter(parser.prog, width=10_000)
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups, prefix="")
    return formatter.format_help()


def _options(parser: argparse.ArgumentParser) -> str:
    """A table for each group of arguments."""
    formatter = argparse.HelpFormatter(parser.prog)
    tables = []
    for group in parser._action_groups:
        told = [action for action in group._group_actions if action.help and action.dest not in ("help", "command")]
        told = [action for action in told if action.help != argparse.SUPPRESS]
        rows = [
            f"| <code>{_escaped(formatter._format_action_invocation(action))}</code> | "
            f"{_escaped(formatter._expand_help(action))} |"
            for action in told
        ]
        if rows:
            tables.append("\n".join([f"| {group.title} | |", "|---|---|", *rows]))
    return "\n\n".join(tables)


def _prose(text: str | None) -> str:
    """Paragraphs as paragraphs; those with a layout of their own as they are."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", (text or "").strip()):
        has_layout = re.search(r"^\s|:$", paragraph, flags=re.MULTILINE)
        parts.append(f"```text\n{paragraph.rstrip()}\n```" if has_layout else _escaped(paragraph))
    return "\n\n".join(part for part in parts if part)


def _sentence(text: str | None) -> str:
    return re.sub(r"^\w", lambda first: first.group().upper(), _escaped(text or "")) + "."


def _escaped(text: str) -> str:
    """Plain text as Markdown, but for what stands between backticks."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for character in "&<>|*_[]{}":
            parts[place] = parts[place].replace(character, f"&#{ord(character)};" if character != "&" else "&amp;")
    return "`".join(parts)
