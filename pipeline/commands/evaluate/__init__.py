"""`pipeline evaluate`: a group with one command per measurement, each in its own file."""

from __future__ import annotations

import shlex
from difflib import get_close_matches

import click

from pipeline.commands.evaluate.accuracy import accuracy
from pipeline.commands.evaluate.cost import cost
from pipeline.commands.evaluate.knn import knn
from pipeline.commands.evaluate.linear_probe import linear_probe
from pipeline.commands.evaluate.localize import localize
from pipeline.commands.evaluate.similarity import similarity


class _EvaluateGroup(click.Group):
    """A group that explains the missing command if a run or an option comes first."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Raises click.UsageError: the first word is neither a command nor close to one."""
        first = args[0] if args else ""
        known = first in (*self.commands, *ctx.help_option_names) or get_close_matches(first, self.commands, cutoff=0.5)
        if first and not known and not ctx.resilient_parsing:
            run = "RUN" if first.startswith("-") else shlex.quote(first)
            raise click.UsageError(
                f"`pipeline evaluate` takes what to measure first: {', '.join(self.commands)}; "
                f"try: pipeline evaluate accuracy {run} …",
                ctx,
            )
        return super().parse_args(ctx, args)


@click.group(cls=_EvaluateGroup)
def evaluate() -> None:
    """Evaluate trained students, and teachers.

    There is one command per measurement. RUN can also be a file written by `fit-teacher`. Details: docs/evaluation.md.

    \b
    pipeline evaluate accuracy run --shards train-val-000000.tar
    pipeline evaluate knn run --shards train-val-000000.tar --train-shards 'train-{000000..000009}.tar'
    """


for command in (accuracy, knn, linear_probe, localize, similarity, cost):
    evaluate.add_command(command)
