"""Hooks of the documentation site (mkdocs.yml)."""

from __future__ import annotations

import inspect
import posixpath
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import click


def on_startup(**_event: Any) -> None:
    """Help texts as Markdown: examples are code, and pages that they name are links."""
    from pipeline.cli import cli

    for command in _commands(cli):
        text = re.sub(r"\x08\n((?:.+\n?)+)", r"```text\n\1\n```\n", inspect.cleandoc(command.help or ""))
        command.help = re.sub(r"docs/([\w-]+\.md)", r"[docs/\1](../\1)", text)


def _commands(command: click.Command) -> Iterator[click.Command]:
    """A command and those below it."""
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from _commands(child)


def on_page_markdown(markdown: str, *, page: Any, **_event: Any) -> str:
    """Links out of `docs/`: README is the home page; of other files of the repository the text remains."""

    def rewrite(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if target == "README.md":
            return f"[{link[1]}]({posixpath.relpath('docs/index.md', posixpath.dirname('docs/' + page.file.src_uri))})"
        return link[0] if target.startswith("docs/") else link[1]

    return re.sub(r"\[([^\]]+)\]\((\.\.?/[^)#]+)\)", rewrite, markdown)
