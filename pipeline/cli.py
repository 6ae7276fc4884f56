"""The command line. Everything heavy is imported inside the command that needs it: `--help` answers at once."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import click

from pipeline.commands.aal_links import aal_links
from pipeline.commands.bench import bench
from pipeline.commands.demo import demo
from pipeline.commands.evaluate import evaluate
from pipeline.commands.export import export
from pipeline.commands.fit_teacher import fit_teacher
from pipeline.commands.init import init
from pipeline.commands.inspect import inspect
from pipeline.commands.pack import pack
from pipeline.commands.precompute import plan, precompute
from pipeline.commands.predict import predict
from pipeline.commands.recipes import recipes
from pipeline.commands.teachers import teachers
from pipeline.commands.train import train
from pipeline.commands.verify import verify
from pipeline.messages import as_flags
from pipeline.options import QUOTES
from storage.errors import DamageError, UserError, display_path, first_line


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="teacher-store")
def cli() -> None:
    """Run a pretrained teacher once over image shards, store its outputs, and train students from them.

    \b
    pipeline init photos
    pipeline pack photos
    pipeline precompute --teacher vit_tiny
    pipeline train --recipe advit-l1 --out run
    pipeline evaluate accuracy run
    """


for command in (init, pack, teachers, recipes, plan, precompute, verify, inspect):
    cli.add_command(command)
for command in (fit_teacher, train, evaluate, predict, aal_links, export, demo, bench):
    cli.add_command(command)


# What mends an error of the system.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free up space there and run the same command again"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a path that you can read and write"),
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR), "give another path"),
}
_INTERRUPTED = "interrupted; completed work is kept (precompute: run the same command again to resume; train: --resume)"
_DAMAGED = "\n  `pipeline verify --store DIR` lists everything that is damaged, and how to recompute it."


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: schedulers of clusters send it before they kill."""


def _terminate(_number: int, _frame: object) -> None:
    raise _Terminated


def main(arguments: list[str] | None = None) -> None:
    """Run a command as the command line does.

    Args:
        arguments: the words after `pipeline`; None for those of this process.

    Raises:
        SystemExit: always: with 0, 1 for what a user can fix, 2 for usage, 130 and 143 after SIGINT and SIGTERM.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    debug, as_json = "--debug" in words, "--json" in words
    try:
        status = cli.main(args=words, prog_name="pipeline", standalone_mode=False)
        raise SystemExit(status if isinstance(status, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.ctx.get_help())
        raise SystemExit(2) from None
    except click.UsageError as error:
        if error.message.startswith("Got unexpected extra argument") and ".tar" in error.message:
            error = click.UsageError(f"{error.message}. {QUOTES}", error.ctx)
        if os.environ.get("RANK", "0") == "0":
            error.show()
            if as_json:
                print(json.dumps({"error": error.format_message()}))
        else:  # torchrun's first process says the same; once it has, torchrun ends this one
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(60)
        raise SystemExit(2) from None
    except (click.Abort, KeyboardInterrupt) as error:
        status = 143 if isinstance(error.__cause__ or error, _Terminated) else 130
        _fail(_INTERRUPTED, as_json, status)
    except BrokenPipeError:
        raise SystemExit(1) from None
    except Exception as error:
        if debug:
            raise
        _fail(_explanation(error), as_json, 1)


def _explanation(error: Exception) -> str:
    """What was wrong, and what to do."""
    if isinstance(error, UserError | click.ClickException):
        return f"{error}{_DAMAGED if isinstance(error, DamageError) and not error.hint else ''}"
    if isinstance(error, OSError):
        where = display_path(Path(error.filename)) if isinstance(error.filename, str) else "input or output"
        advice = _ADVICE.get(error.errno or 0, "fix it and run the same command again")
        return f"{where}: {first_line(error)}; {advice}"
    return f"internal error: {first_line(error, kind=True)}\n  Run it again with --debug and report the output."


def _fail(text: str, as_json: bool, status: int) -> None:
    text = as_flags(text)
    print(f"error: {text}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": text}))
    raise SystemExit(status) from None
