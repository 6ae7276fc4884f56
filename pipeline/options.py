"""Options that several commands share, and the group that they stand in."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from pipeline.console import Console
from pipeline.plotting import picture_path
from pipeline.project import context
from storage.errors import UserError, display_path

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from pipeline.project.schema import TeacherEntry
    from precompute.request import PrecomputeRequest


Words = tuple[str, ...]  # an option that may be repeated


def together(*options: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Several options as one decorator; help lists them in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def option(flag: str, metavar: str | None, text: str, *name: str, **settings: Any) -> Callable[..., Any]:
    """An option of a command; help shows its default. The command gets it by `name`, else by that of the flag."""
    return click.option(flag, *name, metavar=metavar, help=text, show_default="default" in settings, **settings)


# As every command has them; `main` reads `--debug`.
common = together(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr."),
    click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."),
)


# For shards as single words: the shell took a pattern apart.
QUOTES = "Several shards are one pattern in quotes, which keep the shell off: 'train-{000000..000009}.tar'"


class Hinted(click.types.StringParamType):
    """Text; where it is missing, a hint says where to get it."""

    def __init__(self, hint: str) -> None:
        self.hint = hint

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:  # noqa: ARG002 - click's
        """The hint."""
        return self.hint


def missing(name: str) -> click.MissingParameter:
    """The error that an option of the running command is missing, where only some calls need it."""
    command = click.get_current_context().command
    return click.MissingParameter(param=next(param for param in command.params if param.name == name))


def typed(names: Container[str]) -> str | None:
    """The first flag of the command line among the running command's options of these names; None without one."""
    context = click.get_current_context()
    options = (param for param in context.command.params if param.name in names)
    given = (o for o in options if context.get_parameter_source(str(o.name)) == ParameterSource.COMMANDLINE)
    return next((option.opts[0] for option in given), None)


def shards(*names: str, help: str, required: bool = True, labels: bool = False) -> Callable[..., Any]:  # noqa: A002 - as click.option
    """Shards, as many as are given; `labels` says that they must have labels."""
    cut = "They are cut off by `pipeline pack … --val-fraction 0.1`"
    origin = cut if "--val" in names else "`pipeline pack` makes them"
    origin += " from one folder of images per class, or from a CSV with the columns path and label" if labels else ""
    return click.option(
        *names,
        multiple=True,
        required=required,
        metavar="SHARDS",
        type=Hinted(f"{origin}; a project file may name them too: pipeline init FOLDER"),
        help=f"{help} Patterns with braces and *; separate several with ::, or repeat the option.",
    )


def _named(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":
        raise click.BadParameter("an empty name; give a folder or an fsspec URL", ctx, param)
    return value


store = option(
    "--store",
    "DIR",
    "The store: a folder or an fsspec URL.",
    required=True,
    callback=_named,
    type=Hinted("It is the folder that `pipeline precompute` makes; a project file may name it too."),
)


PATH = click.Path(path_type=Path)
POSITIVE = click.FloatRange(0, min_open=True)


def picture(text: str = "Also draw a picture: .png, .svg or .pdf.") -> Callable[..., Any]:
    """`--out`, the file of a picture; UserError, before anything is computed, where none may be written."""
    return option("--out", "FILE", text, type=PATH, callback=lambda _context, _param, out: out and picture_path(out))


def choice(*names: str, values: Sequence[str], text: str) -> Callable[..., Any]:
    """One of several words; the first is the default."""
    return click.option(*names, type=click.Choice(values), default=values[0], show_default=True, help=text)


def _allowed(_ctx: click.Context, _param: click.Parameter, names: Words) -> None:
    """Run the files that the command line names, so that their networks can be made."""
    if names:
        from precompute.taps import allow_network

        for name in names:
            allow_network(name)


# Whose code may run: a store and a run only say which function made a network.
network = option(
    "--network",
    "FILE.py:FUNCTION",
    "Allow and run the code that builds a network which timm does not have: FILE.py:FUNCTION or MODULE:FUNCTION. "
    "May be repeated.",
    multiple=True,
    expose_value=False,
    callback=_allowed,
)
checkpoint = together(
    choice(
        "--checkpoint",
        values=["last", "best", "ema"],
        text="Which student; `best` was chosen on the validation shards, `ema` is the average.",
    ),
    network,
)
device = option("--device", "D", "auto, cpu, cuda or cuda:N.", default="auto")
copied_store = option(
    "--store", "DIR", "The store with the teacher of a student that copies attention, if it was moved."
)


def arguments_in(pairs: Words) -> dict[str, Any]:
    """The arguments that `--teacher-arg` says, each as NAME=VALUE with a value in YAML."""
    from pipeline.yaml_io import value_in
    from student.settings import number_in

    arguments = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--teacher-arg {pair}: expected name=value")
        arguments[name] = number_in(value_in(text, f"--teacher-arg {pair}"))
    return arguments


def _numbers(_context: click.Context, param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{param.opts[0]} {text}: expected one number or three, separated by commas") from None


def words_in(text: str | None) -> Words:
    """Words that are separated by commas."""
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def roles_in(text: str | None) -> Words | None:
    """The roles that `--prefix` says, none of them by the word `none`; None where it is not given."""
    words = None if text is None else words_in(text)
    return () if words == ("none",) else words


# What a network that timm does not have may not say itself.
OUTSIDE_TIMM = (
    option(
        "--prefix",
        "ROLES",
        "Tokens before the patches of a network that timm does not have: class, distillation, register with commas, or "
        "none.  [default: its num_prefix_tokens]",
        callback=lambda _context, _param, text: roles_in(text),
    ),
    option(
        "--tap-module",
        "NAMES",
        "Modules of such a network whose outputs are its maps, with commas, such as layer3,layer4.",
        "tap_modules",
        callback=lambda _context, _param, text: words_in(text),
    ),
)


# What says more of a teacher, by the names of the arguments of `find_teacher`.
TEACHER_SETTINGS = ("weights", "weights_key", "arguments", "mean", "std", "input_size", "prefix", "tap_modules")
TEACHER = (
    option(
        "--weights",
        "F",
        "A .safetensors or .pth file, which may have prefixes in its names, or transformers' names; "
        "or random:SEED for untrained weights.  [default: timm's hub]",
    ),
    option(
        "--weights-key",
        "KEY",
        "Key of the weights in the file, such as state_dict, or the prefix of their names, such as base_encoder.  "
        "[default: as timm, EMA first]",
    ),
    option(
        "--teacher-arg",
        "K=V",
        "An argument of timm.create_model, or your function; may be repeated.",
        "arguments",
        multiple=True,
        callback=lambda _context, _param, pairs: arguments_in(pairs),
    ),
    option("--mean", "M", "Mean of the teacher's input: one number or three, with commas.", callback=_numbers),
    option(
        "--std", "S", "Standard deviation of the teacher's input: one number or three, with commas.", callback=_numbers
    ),
    option("--input-size", "N", "Side of the teacher's input.", type=int),
    *OUTSIDE_TIMM,
)


_PRECOMPUTE = (
    option(
        "--teacher",
        "NAME",
        "A teacher of the project file, a short name (effnet_b3, mobilenetv2, vit_tiny, …), a timm name, "
        "hf-hub:USER/NAME, local-dir:FOLDER, torchvision/NAME, a ready model.onnx, or a function that gives a network "
        "of your own, FILE.py:FUNCTION or MODULE:FUNCTION; without it, all of the project file.",
    ),
    shards("--shards", help="The shards."),
    store,
    option(
        "--target",
        "TAP[,layers=…][,grid=…][,codec=…]…",
        "Targets to store: activations, logits, embedding, q, k, v, class_row, attention, class_token or tokens; "
        "repeatable. layers=last or 1:4+8, counted from 1; codec=f32, f16, u8, u4, log8 (class_row, attention) or "
        "topk20 (logits); for activations grid=8, at=block (after the residual sum) or at=stage (of any network), "
        "antialias=true, native=false (store maps that are smaller than the grid resized).",
        multiple=True,
    ),
    option(
        "--tap-tensor",
        "TAP=TENSOR",
        "For a model.onnx: the tensor of a tap. Several tensors of one tap are its layers, in order.",
        multiple=True,
    ),
    option("--view-policy", "P", "none, eval, light, deit, or a line such as 'rrc(0.2,1)|flip'.  [default: deit]"),
    option("--view-size", "N", "Side of the view images.  [default: 224]", type=int),
    option("--num-views", "N", "Views of each image.  [default: 4]", type=click.IntRange(1)),
    option("--seed", "N", "Seed of the views.  [default: 0]", type=int),
    option("--new-bank", None, "Create a second bank for these shards.", is_flag=True),
    *TEACHER,
    option("--teacher-name", "NAME", "Name of the teacher in the store."),
    choice("--provider", values=["auto", "cpu", "cuda"], text="Where the teacher runs."),
    choice(
        "--on-decode-error",
        values=["fail", "skip"],
        text="An image that cannot be decoded, or a key without an image, fails its shard, or is skipped in training.",
    ),
    option(
        "--store-views",
        None,
        "Also store the view images: training decodes nothing, and decoders may change.",
        is_flag=True,
    ),
    option("--workers", "N", "Worker processes on this machine.", type=click.IntRange(1)),
    option("--dask", "ADDRESS", "A running scheduler, such as tcp://host:8786."),
    option(
        "--worker-timeout",
        "SECONDS",
        "How long to wait for a first worker to start, and for one to come back once all are gone: more where a batch "
        "system starts them.  [default: 300]",
        type=click.IntRange(1),
    ),
)


# Options of `precompute` and `plan` -> fields of a project file that say them.
_SAID = {
    **{"view_policy": "views.policy", "view_size": "views.size", "num_views": "views.count", "seed": "views.seed"},
    **{name: name for name in ("shards", "store", "provider", "workers", "dask", "worker_timeout")},
}
# What is said about one teacher, and never of several at once.
_OF_ONE = ("target", "tap_tensor", *TEACHER_SETTINGS, "teacher_name")
# Where a file of weights may come from that is not there.
_ADVICE = "`pipeline fit-teacher --teacher NAME --out FILE` makes one from a teacher whose features are stored"


def precompute_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `precompute` and `plan` take: the command is called with `store` and `requests`, by teachers' names.

    The name is empty where `--teacher` names the teacher; without that flag, `requests` has all of the project file.
    """
    own = inspect.signature(command).parameters.keys()

    @functools.wraps(command)
    def wrapped(**flags: Any) -> Any:
        requests = _requests(**{name: value for name, value in flags.items() if name not in own})
        return command(requests=requests, **{name: value for name, value in flags.items() if name in own})

    taken: Callable[..., Any] = together(*_PRECOMPUTE, context.reads(**_SAID))(wrapped)
    return taken


def _requests(teacher: str | None, **flags: Any) -> dict[str, PrecomputeRequest]:
    from pipeline.project.schema import TeacherEntry

    project = context.current()
    entries = project.content.teachers if project else {}
    if teacher is None and not entries:
        raise click.UsageError("Missing option '--teacher'; a project file may name teachers too.")
    if flags["workers"] and flags["dask"]:  # a flag wins over the file
        from_file = [name for name in ("workers", "dask") if not typed((name,))]
        if len(from_file) != 1:
            raise UserError("--workers starts processes here, --dask joins others; give one of them")
        flags[from_file[0]] = None
    if teacher is not None and teacher not in entries:
        try:
            return {"": _request(teacher, TeacherEntry(), "", flags)}
        except UserError as error:
            if project is None or not entries:
                raise
            raise UserError(str(error), hint=f"{project.path} has teachers {', '.join(entries)}.") from None
    assert project is not None
    chosen = list(entries) if teacher is None else [teacher]
    if len(chosen) > 1 and (flag := typed(_OF_ONE)):
        raise UserError(f"{flag} is for one teacher, {project.path} has {', '.join(chosen)}: give --teacher NAME")
    absent = [name for name in chosen if not flags["weights"] and _is_missing(entries[name].weights)]
    if len(absent) < len(chosen):
        for name in absent:
            file = display_path(Path(str(entries[name].weights)))
            click.echo(f"{name} is skipped: {file} does not exist yet; {_ADVICE}", err=True)
        chosen = [name for name in chosen if name not in absent]
    requests = {name: _request(name, entries[name], f"{project.path}: teachers.{name}: ", flags) for name in chosen}
    return requests if teacher is None else {"": requests[teacher]}


def _is_missing(file: str | None) -> bool:
    """Whether a file of weights is not there: a fresh project file names one that is still to be made."""
    from storage.objects.weights_file import is_random

    if is_random(file):
        return False
    try:
        Path(file or "").expanduser().stat()
    except OSError as error:  # others are raised where the file is read
        return isinstance(error, FileNotFoundError)
    return False


def _request(name: str, entry: TeacherEntry, where: str, flags: Mapping[str, Any]) -> PrecomputeRequest:
    """What is asked of one teacher; what no flag says comes from its entry.

    `where` opens the errors of a project's teacher; it is empty for another, whose entry says nothing.
    """
    from precompute.request import PrecomputeRequest
    from precompute.taps.target_spec import parse_target
    from precompute.teachers import onnx_file
    from precompute.teachers.teacher import find_teacher
    from storage.shards.patterns import expand
    from storage.views.policy import policy

    urls = expand(flags["shards"])
    fields = {"line": flags["view_policy"], "size": flags["view_size"], "seed": flags["seed"]}
    said = {field: value for field, value in fields.items() if value is not None}
    views = policy(**{"line": "deit", "size": 224, **said})
    settings = teacher_settings(entry, flags)
    model, teacher_name = entry.teacher or name, flags["teacher_name"] or (name if where else None)
    tensors = {**entry.tap_tensors, **onnx_file.named_outputs(flags["tap_tensor"])}
    try:
        specs = [spec for text in flags["target"] or entry.targets or tensors for spec in parse_target(text)]
        if tensors and not onnx_file.is_onnx_file(model):
            raise UserError(
                f"--tap-tensor names tensors of a ready model.onnx; {model} has taps of its own: --target TAP"
            )
        teacher = find_teacher(model, **settings, teacher_name=teacher_name, say=Console().say)
        if teacher.ready:
            specs = onnx_file.given_tensors(model, tensors, specs)
    except UserError as error:
        if not where:
            raise
        missing = error.setting.startswith("`weights=") and _is_missing(settings["weights"])
        raise UserError(f"{where}{error}", hint=_ADVICE if missing else "") from None
    passed: Words = ("num_views", "new_bank", "provider", "on_decode_error", "store_views")
    passed += ("workers", "dask", "worker_timeout")
    return PrecomputeRequest(
        shards=urls,
        teacher=teacher,
        targets=specs,
        policy=views,
        policy_fields=frozenset(said),
        grid=context.grid(),
        **{name: flags[name] for name in passed if flags[name] is not None},
    )


def teacher_settings(entry: TeacherEntry, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags `TEACHER` say, as arguments of `find_teacher`; what they do not say, a project's entry does."""
    settings = {name: flags[name] for name in TEACHER_SETTINGS}
    recorded = {
        **{name: getattr(entry, name) for name in ("weights", "mean", "std", "input_size", "tap_modules")},
        "weights_key": None if settings["weights"] else entry.weights_key,
        "prefix": None if settings["prefix"] == () else roles_in(entry.prefix),
    }
    settings |= {name: value for name, value in recorded.items() if not settings[name] and value is not None}
    return {**settings, "arguments": {**entry.args, **settings["arguments"]}}
