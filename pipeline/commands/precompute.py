"""`pipeline precompute` and `pipeline plan`: compute targets for shards into a store, and estimate the cost."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from pipeline.console import Console, show
from pipeline.options import POSITIVE, common, option, precompute_options
from pipeline.project import context
from storage.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from precompute.request import PrecomputeRequest


@click.command()
@precompute_options
@common
def precompute(store: str, requests: dict[str, PrecomputeRequest], as_json: bool) -> None:
    """Run a teacher once over shards and store its targets.

    Run the same command again to resume. Without --teacher, all teachers of the project file run, one after another.

    \b
    pipeline precompute --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    pipeline precompute --teacher vit_tiny --weights vit_tiny.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --target embedding
    """
    from precompute.run import precompute as run
    from storage.store.store import Store

    results, text = {}, []
    with Console() as console:
        for name, request in requests.items():
            results[name] = result = run(Store.create(store), request, console)
            failed = [f"failed: {failure.error}" for failure in result.failures]
            count = f", {len(failed)} failed: run the same command again to retry" if failed else ""
            done = f"{len(result.targets)} target(s) over {len(result.shards)} shard(s){count}: {store}"
            text += [*failed, f"{name}: {done}" if name else done]
    show(results.get("", {"store": store, "teachers": results}), text, as_json)
    if any(result.failures for result in results.values()):
        raise SystemExit(1)


@click.command()
@precompute_options
@option("--measure", "SECONDS", "Maximum time of the trial run; 0 skips it.", type=click.FloatRange(0), default=60)
@option("--train-rate", "N", "Images per second that training should read.", type=POSITIVE, default=1000)
@common
def plan(store: str, requests: dict[str, PrecomputeRequest], measure: float, train_rate: float, as_json: bool) -> None:
    """Estimate the cost of `precompute` with the same flags.

    Prints bytes, objects, hours, and cheaper codecs. For each teacher, the engine runs next to the store for at most a
    minute, and at most a tenth of the estimated time. Temporary files are removed. If the project file names the
    student, `plan` also says which parts of a teacher's architecture it lacks.

    \b
    pipeline plan --teacher mobilenetv2 --weights mobilenetv2.safetensors --shards 'train-{000000..000009}.tar' \\
      --store S --view-policy light --view-size 32 --target activations,grid=8,codec=u8
    """
    from pipeline.inspection.store import plan_lines, sum_lines, sum_of
    from precompute.plan import plan as run

    with Console() as console:
        plans = {name: run(store, request, console, measure, train_rate) for name, request in requests.items()}
    warnings = _missing_parts(requests)
    plans = {name: replace(plan, warnings=[*plan.warnings, *warnings.get(name, ())]) for name, plan in plans.items()}
    if "" in plans:
        show(plans[""], plan_lines(plans[""]), as_json)
        return
    total = sum_of(plans)
    text = [line for name, plan in plans.items() for line in (f"{name}:", *plan_lines(plan))]
    show({"teachers": plans, "sum": total}, [*text, *sum_lines(total)], as_json)


def _missing_parts(requests: Mapping[str, PrecomputeRequest]) -> dict[str, list[str]]:
    """What the project's student lacks of the teachers whose attention is wanted, by the names of the requests."""
    import torch

    from precompute.taps import ATTENTION
    from student.alignment.native_parts import missing_parts
    from student.models.build import architecture, build_student

    teachers = {request.teacher.name: request.teacher.identity for request in requests.values()}
    warnings = {}
    with contextlib.suppress(UserError), torch.device("meta"):  # what is wrong with a student, `train` says
        if (chosen := context.student()) is None:
            return {}
        student, _ = build_student(architecture(chosen, teachers.get(str(chosen.like))), 0)
        for name, request in requests.items():
            teacher = request.teacher
            if not request.targets or any(spec.tap in ATTENTION for spec in request.targets):
                found = missing_parts(student, teacher.identity, teacher.name)
                warnings[name] = [found] if found else []
    return warnings
