"""What is in a store, as plain data and as lines for people."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from storage.store import Store, Task


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
        about = {key: manifest.get(key) for key in ("weights", "network", "layers", "parameters", "classes")}
        result["teachers"][name] = {**manifest["identity"], **about}
    for id, manifest in store.banks().items():
        result["banks"][id] = {**manifest["identity"], **_complete(store, by_id["bank", id])}
    for id, manifest in store.targets().items():
        about = {key: manifest[key] for key in ("teacher", "sample_shape", "axes", "parity")}
        result["targets"][id] = {**manifest["identity"], **about, **_complete(store, by_id["target", id])}
    return result


def _complete(store: Store, tasks: dict[str, list[Task]]) -> dict[str, Any]:
    size = samples = 0
    for several in tasks.values():
        for task in several:
            marker = store.marker(task)
            size += sum(int(array.lengths.sum()) for array in marker.arrays.values())
            samples += next(iter(marker.arrays.values())).shape[0]
    views = sorted({len(several) for several in tasks.values()})
    return {"shards": len(tasks), "views": views[-1] if views else 0, "fewest_views": views[0] if views else 0,
            "view_images": samples, "bytes": size}  # fmt: skip


def size_text(count: float) -> str:
    """Bytes as people say them."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def lines(result: dict[str, Any]) -> list[str]:
    """The same for people."""
    shards = result["shards"]
    text = [f"store {result['store']}: {len(shards)} shard(s), {sum(s['samples'] for s in shards.values()):,} samples"]
    for name, teacher in result["teachers"].items():
        arguments = "".join(f" {key}={value}" for key, value in teacher["arguments"].items())
        text += [
            f"teacher {name}: {teacher['model']}{arguments}, {teacher['parameters']:,} parameters, "
            f"{teacher['network']} with {teacher['layers']} layers, input {teacher['input size']}",
            f"  weights {teacher['weights']} (sha256 {teacher['weights sha256'][:16]})",
        ]
    for id, bank in result["banks"].items():
        text.append(f"bank {id}: {bank['line']}, size {bank['size']}, seed {bank['seed']}; {_progress(bank)}")
    for id, target in result["targets"].items():
        shape = "x".join(map(str, target["sample_shape"]))
        layers = f", layers {target['layers']}" if target["layers"] else ""
        each = f"{size_text(target['bytes'] / target['view_images'])} a view image; " if target["view_images"] else ""
        text.append(f"target {id}: {shape} ({', '.join(target['axes'])}){layers}; {each}{_progress(target)}")
    return text


def _progress(part: dict[str, Any]) -> str:
    fewest = f" (at least {part['fewest_views']})" if part["fewest_views"] != part["views"] else ""
    return f"{part['shards']} shard(s) x {part['views']} view(s){fewest}, {size_text(part['bytes'])}"
