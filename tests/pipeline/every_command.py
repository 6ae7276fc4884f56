"""Every command of the command line, those inside a group too, by the words that call it."""

from __future__ import annotations

import click

from pipeline.cli import cli


def every_command(group: click.Group = cli) -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in group.commands.items():
        inner = every_command(command) if isinstance(command, click.Group) else {}
        found |= {name: command, **{f"{name} {word}": one for word, one in inner.items()}}
    return found
