"""What is in a store, and what a run will take, as plain data and as lines for people."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from precompute.results import MissingAmount, Plan, PlanSum, SharedAmount
from storage.objects.state_dict import ONNX_FILE
from storage.progress import size_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from storage.objects.json_record import Record
    from storage.objects.record_schema import SummaryRecord
    from storage.store.codecs import CodecError
    from storage.store.manifests import BankManifest, TargetManifest, TeacherManifest
    from storage.store.markers import Task
    from storage.store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """What is complete of a bank or a target: the views of the shard with most, and of the one with fewest."""

    shards: int
    views: int
    fewest_views: int
    view_images: int
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is in a store: manifests by id, and what is complete of each bank and target."""

    store: str
    shards: dict[str, SummaryRecord]
    teachers: dict[str, TeacherManifest]
    banks: dict[str, BankManifest]
    targets: dict[str, TargetManifest]
    complete: dict[str, Complete]

    def plain(self) -> Record:
        """The contents as JSON has them."""
        fields = {
            "shards": ("samples", "bytes", "labelled"),
            "teachers": ("weights", "network", "layers", "parameters", "classes"),
            "banks": (),
            "targets": ("teacher", "sample_shape", "axes", "parity", "codec_errors"),
        }
        content: Record = {"store": self.store}
        for part, names in fields.items():
            content[part] = {
                id: {
                    **(value.identity.plain() if part != "shards" else {}),
                    **{name: getattr(value, name) for name in names},
                    **(asdict(self.complete[id]) if id in self.complete else {}),
                }
                for id, value in getattr(self, part).items()
            }
        return content


def inspect(store: Store) -> Contents:
    """Teachers, banks and targets with what is complete of each. Raises DamageError."""
    tasks: dict[str, list[Task]] = defaultdict(list)
    for task in store.done():
        tasks[task.id].append(task)
    shards = {shard: store.index(shard).summary for shard in store.shard_ids()}
    teachers, banks, targets = store.teachers(), store.banks(), store.targets()
    complete = {id: _complete(store, tasks[id]) for id in (*banks, *targets)}
    return Contents(store=store.url, shards=shards, teachers=teachers, banks=banks, targets=targets, complete=complete)


def _complete(store: Store, tasks: Sequence[Task]) -> Complete:
    markers = [store.marker(task) for task in tasks]
    views = Counter(task.shard for task in tasks)
    return Complete(
        shards=len(views),
        views=max(views.values(), default=0),
        fewest_views=min(views.values(), default=0),
        view_images=sum(marker.samples for marker in markers),
        bytes=sum(array.size for marker in markers for array in marker.arrays.values()),
    )


def _error_text(error: CodecError | None, start: str = "; ") -> str:
    """What a codec costs, as people read it, after some words; empty where nothing was measured."""
    if not error:
        return ""
    kl = f", KL {error.kl:.1e} nats" if "kl" in error.model_fields_set else ""
    gradient = ""
    if error.loss_error is not None and error.gradient_cosine is not None:
        gradient = f", loss {100 * error.loss_error:.2g} %, gradient cosine {error.gradient_cosine:.6f}"
    return f"{start}error {100 * error.relative:.2g} %, cosine {error.cosine:.6f}{kl}{gradient}"


def lines(contents: Contents) -> list[str]:
    """The contents for people."""
    samples = sum(shard.samples for shard in contents.shards.values())
    text = [f"store {contents.store}: {len(contents.shards)} shard(s), {samples:,} samples"]
    for name, teacher in contents.teachers.items():
        about = teacher.identity
        arguments = "".join(f" {key}={value}" for key, value in about.arguments.items())
        network = f"{teacher.network} with {teacher.layers} layers"
        text += [
            f"teacher {name}: {about.model}{arguments}, {teacher.parameters:,} parameters, "
            f"{'ready graph' if about.model == ONNX_FILE else network}, input {about.input_size}",
            f"  weights {teacher.weights} (sha256 {about.weights_sha256[:16]})",
        ]
    for id, bank in contents.banks.items():
        policy = f"{bank.identity.line}, size {bank.identity.size}, seed {bank.identity.seed}"
        text.append(f"bank {id}: {policy}; {_progress(contents.complete[id])}")
    for id, target in contents.targets.items():
        complete, codec = contents.complete[id], target.identity.codec
        shape = "x".join(map(str, target.sample_shape))
        layers = f", layers {[*target.identity.layers]}" if target.identity.layers else ""
        each = f"{size_text(complete.bytes / complete.view_images)} a view image; " if complete.view_images else ""
        sides = f", stored at {target.sides}" if target.sides else ""
        text.append(f"target {id}: {shape} ({', '.join(target.axes)}){sides}{layers}; {each}{_progress(complete)}")
        if error := _error_text(target.codec_errors.get(codec), f"  codec {codec}: "):
            text.append(error)
    return text


def _progress(complete: Complete) -> str:
    fewest = f" (at least {complete.fewest_views})" if complete.fewest_views != complete.views else ""
    return f"{complete.shards} shard(s) x {complete.views} view(s){fewest}, {size_text(complete.bytes)}"


def plan_lines(plan: Plan) -> list[str]:
    """A plan for people."""
    new, train = plan.missing, plan.training
    about = f" (the samples of {plan.estimated} shard(s) estimated)" if plan.estimated else ""
    lines = [
        f"{plan.shards} shard(s), {plan.samples:,} samples{about}, {plan.views} view(s) of {plan.policy.line} at "
        f"{plan.policy.size}",
        f"store: {size_text(plan.bytes)} in {plan.objects:,} objects, of which the teacher's graph takes "
        f"{size_text(plan.graph_bytes)}; still to be made: {size_text(new.bytes)} in {new.objects:,} objects, "
        f"{new.view_images:,} view images",
    ]
    for target in plan.targets:
        lines.append(
            f"target {target.target}: {size_text(target.bytes_per_view_image)} a view image, "
            f"{size_text(target.bytes)} in all{_error_text(target.error)}"
        )
        lines += [f"  codec={other.codec}: {size_text(other.bytes)}{_error_text(other)}" for other in target.cheaper]
    if plan.measured and plan.hours is not None:
        lines.append(
            f"measured {plan.measured.view_images_per_second:,.0f} view images/s on {plan.measured.workers} "
            f"process(es) in {plan.measured.seconds:.0f} s, reading, rendering, session and writing together: what is "
            f"to be made takes {_hours_text(plan.hours)}"
        )
    lines.append(
        f"training at {train.images_per_second:,.0f} images/s reads {train.targets_mb_per_second:,.1f} MB/s of "
        f"targets and {train.shards_mb_per_second:,.1f} MB/s of shards"
    )
    return [*lines, *(f"warning: {warning}" for warning in plan.warnings)]


def sum_of(plans: Mapping[str, Plan]) -> PlanSum:
    """What several teachers take over one store, one after another: what they share counts once."""
    shared: dict[str, SharedAmount] = {}  # bank -> what all of its teachers share
    for plan in plans.values():
        if plan.bank not in shared or plan.shared.bytes > shared[plan.bank].bytes:
            shared[plan.bank] = plan.shared

    def total(field: str) -> int:
        amount = attrgetter(field)
        alone = sum(amount(plan) - amount(plan.shared) for plan in plans.values())
        return int(alone + sum(map(amount, shared.values())))

    images = sum(plan.missing.view_images for plan in plans.values())
    missing = MissingAmount(bytes=total("missing.bytes"), objects=total("missing.objects"), view_images=images)
    each = [plan.hours for plan in plans.values() if plan.hours is not None]
    hours = round(sum(each), 5) if len(each) == len(plans) else None
    return PlanSum(bytes=total("bytes"), objects=total("objects"), missing=missing, hours=hours)


def sum_lines(total: PlanSum) -> list[str]:
    """The sum of several plans for people."""
    new = total.missing
    hours = "" if total.hours is None else f"; {_hours_text(total.hours)}"
    return [
        f"all of them: {size_text(total.bytes)} in {total.objects:,} objects; still to be made: "
        f"{size_text(new.bytes)} in {new.objects:,} objects, {new.view_images:,} view images{hours}"
    ]


def _hours_text(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
