"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from storage.errors import UserError

if TYPE_CHECKING:
    from precompute.run import Wanted


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json` and `--debug`, as every command has them."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout, everything else on stderr.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped


def shards(*names: str, help: str, required: bool = True) -> Callable[..., Any]:
    """Shards, as many as are given."""
    return click.option(
        *names, multiple=True, required=required, metavar="SHARDS",
        help=f"{help} Braces, * and :: between several; may be repeated.",
    )  # fmt: skip


store = click.option("--store", required=True, metavar="DIR", help="The store: a folder or an fsspec URL.")


_WANTED = (
    click.option("--teacher", required=True, help="A short name (effnet_b3, mobilenetv2, vit_tiny, …) or a timm name."),
    shards("--shards", help="The shards."),
    store,
    click.option(
        "--target", multiple=True, metavar="TAP[,layers=…][,grid=…][,codec=…]",
        help="What to keep: activations, logits, q, k, class_row or class_token; may be repeated. layers=last or "
        "1:4+8, counted from 1; grid=8 for activations; codec=f32, f16, u8, log8 (class_row) or topk20 (logits).",
    ),
    click.option(
        "--view-policy", metavar="P",
        help="none, eval, light, deit, or a line such as 'rrc(0.2,1)|flip'.  [default: deit]",
    ),
    click.option("--view-size", type=int, metavar="N", help="Side of the view images.  [default: 224]"),
    click.option("--view-count", type=click.IntRange(1), metavar="N", help="Views of each image.  [default: 4]"),
    click.option("--seed", type=int, metavar="N", help="Of the views.  [default: 0]"),
    click.option("--new-bank", is_flag=True, help="Make another bank beside the one that these shards have."),
    click.option("--weights", metavar="F", help="A .safetensors or .pth file; without it, timm's hub."),
    click.option("--teacher-arg", multiple=True, metavar="K=V", help="An argument of timm.create_model; repeatable."),
    click.option("--mean", metavar="M", help="Of the teacher's input: one number or three, with commas."),
    click.option("--std", metavar="S", help="Likewise."),
    click.option("--input-size", type=int, metavar="N", help="Side of the teacher's input."),
    click.option("--as", "called", metavar="NAME", help="What the store calls the teacher."),
    click.option(
        "--provider", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True,
        help="Where the teacher runs.",
    ),
    click.option(
        "--bad-images", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
        help="An image that cannot be decoded fails its shard, or is left out of training.",
    ),
    click.option(
        "--materialise-views", is_flag=True,
        help="Keep the view images too: training then decodes nothing, and decoders may change.",
    ),
    click.option("--workers", type=click.IntRange(1), metavar="N", help="Worker processes on this machine."),
    click.option("--dask", metavar="ADDRESS", help="A running scheduler, such as tcp://host:8786."),
)  # fmt: skip


def wanted(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `precompute` and `plan` take: the command is called with `store` and `wanted`."""

    @functools.wraps(command)
    def wrapped(store: str, **flags: Any) -> Any:
        names = inspect.signature(_wanted).parameters
        others = {name: value for name, value in flags.items() if name not in names}
        return command(store=store, wanted=_wanted(**{name: flags[name] for name in names}), **others)

    return functools.reduce(lambda made, option: option(made), reversed(_WANTED), wrapped)


def _wanted(
    teacher: str,
    shards: tuple[str, ...],
    target: tuple[str, ...],
    view_policy: str | None,
    view_size: int | None,
    view_count: int | None,
    seed: int | None,
    new_bank: bool,
    weights: str | None,
    teacher_arg: tuple[str, ...],
    mean: str | None,
    std: str | None,
    input_size: int | None,
    called: str | None,
    provider: str,
    bad_images: Any,
    materialise_views: bool,
    workers: int | None,
    dask: str | None,
) -> Wanted:
    from precompute import teachers
    from precompute.run import Wanted
    from precompute.targets import parse
    from storage.policies import policy
    from storage.shards import expand

    if workers and dask:
        raise UserError("--workers starts processes here, --dask joins others; give one of them")
    urls = expand(shards)
    views = policy("deit" if view_policy is None else view_policy, 224 if view_size is None else view_size, seed or 0)
    wishes = [wish for text in target for wish in parse(text)]
    found = teachers.find(
        teacher, weights=weights, arguments=_arguments(teacher_arg), input_size=input_size,
        mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"), called=called,
    )  # fmt: skip
    named = {"line": view_policy, "size": view_size, "seed": seed}
    given = frozenset(name for name, value in named.items() if value is not None)
    return Wanted(
        urls, found, wishes, views, given, view_count, new_bank, provider, bad_images, materialise_views, workers, dask
    )


def _arguments(pairs: tuple[str, ...]) -> dict[str, Any]:
    import yaml

    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--teacher-arg {pair}: expected name=value")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"--teacher-arg {pair}: the value is not plain YAML: {' '.join(str(error).split())}"
            ) from None
    return found


def _numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} {text}: expected one number or three, separated by commas") from None
