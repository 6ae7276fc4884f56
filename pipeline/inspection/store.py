"""What is in a store, as plain data and as lines for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from storage.objects.state_dict import ONNX_FILE
from storage.progress import size_text
from storage.store.markers import Task
from storage.store.store import Store


def inspect(store: Store) -> dict[str, Any]:
    """Teachers, banks and targets with what is complete of each. Raises DamageError."""
    by_id: dict[tuple[str, str], dict[str, list[Task]]] = defaultdict(lambda: defaultdict(list))
    for task in store.done():
        by_id[task.kind, task.id][task.shard].append(task)
    result: dict[str, Any] = {"store": store.url, "shards": {}, "teachers": {}, "banks": {}, "targets": {}}
    for shard in store.shard_ids():
        summary = store.index(shard).summary
        result["shards"][shard] = {"samples": summary.samples, "bytes": summary.bytes, "labelled": summary.labelled}
    for name, manifest in store.teachers().items():
        about = {key: getattr(manifest, key) for key in ("weights", "network", "layers", "parameters", "classes")}
        result["teachers"][name] = {**manifest.identity.plain(), **about}
    for id, bank in store.banks().items():
        result["banks"][id] = {**bank.identity.plain(), **_complete(store, by_id["bank", id])}
    for id, target in store.targets().items():
        about = {"codec_errors": {}, **target.plain()}
        about = {key: about[key] for key in ("teacher", "sample_shape", "axes", "parity", "codec_errors")}
        result["targets"][id] = {**target.identity.plain(), **about, **_complete(store, by_id["target", id])}
    return result


def _complete(store: Store, tasks: dict[str, list[Task]]) -> dict[str, Any]:
    size = samples = 0
    for several in tasks.values():
        for task in several:
            marker = store.marker(task)
            size += sum(array.size for array in marker.arrays.values())
            samples += marker.samples
    views = sorted({len(several) for several in tasks.values()})
    most, fewest = (views[-1], views[0]) if views else (0, 0)
    return {"shards": len(tasks), "views": most, "fewest_views": fewest, "view_images": samples, "bytes": size}


def error_text(error: dict[str, float] | None) -> str:
    """What a codec costs, as people read it; empty where nothing was measured."""
    if not error:
        return ""
    kl = f", KL {error['kl']:.1e} nats" if "kl" in error else ""
    return f"error {100 * error['relative']:.2g} %, cosine {error['cosine']:.6f}{kl}"


def lines(result: dict[str, Any]) -> list[str]:
    """The same for people."""
    shards = result["shards"]
    text = [f"store {result['store']}: {len(shards)} shard(s), {sum(s['samples'] for s in shards.values()):,} samples"]
    for name, teacher in result["teachers"].items():
        arguments = "".join(f" {key}={value}" for key, value in teacher["arguments"].items())
        network = f"{teacher['network']} with {teacher['layers']} layers"
        text += [
            f"teacher {name}: {teacher['model']}{arguments}, {teacher['parameters']:,} parameters, "
            f"{'ready graph' if teacher['model'] == ONNX_FILE else network}, input {teacher['input size']}",
            f"  weights {teacher['weights']} (sha256 {teacher['weights sha256'][:16]})",
        ]
    for id, bank in result["banks"].items():
        text.append(f"bank {id}: {bank['line']}, size {bank['size']}, seed {bank['seed']}; {_progress(bank)}")
    for id, target in result["targets"].items():
        shape = "x".join(map(str, target["sample_shape"]))
        layers = f", layers {target['layers']}" if target["layers"] else ""
        each = f"{size_text(target['bytes'] / target['view_images'])} a view image; " if target["view_images"] else ""
        text.append(f"target {id}: {shape} ({', '.join(target['axes'])}){layers}; {each}{_progress(target)}")
        if error := error_text(target["codec_errors"].get(target["codec"])):
            text.append(f"  codec {target['codec']}: {error}")
    return text


def _progress(part: dict[str, Any]) -> str:
    fewest = f" (at least {part['fewest_views']})" if part["fewest_views"] != part["views"] else ""
    return f"{part['shards']} shard(s) x {part['views']} view(s){fewest}, {size_text(part['bytes'])}"


def plan_lines(result: dict[str, Any]) -> list[str]:
    """A plan for people."""
    new = result["missing"]
    about = f" (the samples of {result['estimated']} shard(s) estimated)" if result["estimated"] else ""
    lines = [
        f"{result['shards']} shard(s), {result['samples']:,} samples{about}, {result['views']} view(s) of "
        f"{result['policy']['line']} at {result['policy']['size']}",
        f"store: {size_text(result['bytes'])} in {result['objects']:,} objects, of which the teacher's graph takes "
        f"{size_text(result['graph_bytes'])}; still to be made: {size_text(new['bytes'])} in {new['objects']:,} "
        f"objects, {new['view_images']:,} view images",
    ]
    for target in result["targets"]:
        lines.append(
            f"target {target['target']}: {size_text(target['bytes_per_view_image'])} a view image, "
            f"{size_text(target['bytes'])} in all{_error(target['error'])}"
        )
        lines += [
            f"  codec={other['codec']}: {size_text(other['bytes'])}{_error(other)}" for other in target["cheaper"]
        ]
    if result["measured"]:
        measured = result["measured"]
        lines.append(
            f"measured {measured['view_images_per_second']:,.0f} view images/s on {measured['workers']} process(es) in "
            f"{measured['seconds']:.0f} s, reading, rendering, session and writing together: what is to be made takes "
            f"{_hours_text(result['hours'])}"
        )
    train = result["training"]
    lines.append(
        f"training at {train['images_per_second']:,.0f} images/s reads {train['targets_mb_per_second']:,.1f} MB/s of "
        f"targets and {train['shards_mb_per_second']:,.1f} MB/s of shards"
    )
    return [*lines, *(f"warning: {warning}" for warning in result["warnings"])]


def sum_of(plans: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """What several teachers take over one store, one after another: what they share counts once."""
    total: dict[str, Any] = {"bytes": 0, "objects": 0, "missing": {"bytes": 0, "objects": 0, "view_images": 0}}
    shared: dict[str, dict[str, Any]] = {}  # bank -> what all of its teachers share
    for plan in plans.values():
        common = plan["shared"]
        if plan["bank"] not in shared or common["bytes"] > shared[plan["bank"]]["bytes"]:
            shared[plan["bank"]] = common
        for key in ("bytes", "objects"):
            total[key] += plan[key] - common[key]
            total["missing"][key] += plan["missing"][key] - common["missing"][key]
        total["missing"]["view_images"] += plan["missing"]["view_images"]
    for common in shared.values():
        for key in ("bytes", "objects"):
            total[key] += common[key]
            total["missing"][key] += common["missing"][key]
    hours = [plan["hours"] for plan in plans.values()]
    return {**total, "hours": None if None in hours else round(sum(hours), 5)}


def sum_lines(total: dict[str, Any]) -> list[str]:
    """The sum of several plans for people."""
    new = total["missing"]
    hours = "" if total["hours"] is None else f"; {_hours_text(total['hours'])}"
    return [
        f"all of them: {size_text(total['bytes'])} in {total['objects']:,} objects; still to be made: "
        f"{size_text(new['bytes'])} in {new['objects']:,} objects, {new['view_images']:,} view images{hours}"
    ]


def _hours_text(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def _error(error: dict[str, float] | None) -> str:
    text = error_text(error)
    return f"; {text}" if text else ""
