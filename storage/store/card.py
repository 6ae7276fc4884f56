"""The store's card: a README that says what is in a store and how to read it.

It is meant to be published: files of weights are named without their folders, which the teachers' manifests keep.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from storage.store.store import Store

_READING = """## How to read it

`pipeline inspect --store .` lists everything, `pipeline verify --store .` checks every byte. Without this project, with
zarr 3 alone (a missing chunk then reads as zeros, silently; compare with the marker):

```python
import json, zarr
marker = json.load(open("done/{marker}"))
values = zarr.open_array("{folder}/" + marker["attempt"] + "/data", mode="r")[:]
```
"""


def card(store: Store) -> str:
    """The card's text, Markdown."""
    done = store.done()
    teachers, banks, targets = store.teachers(), store.banks(), store.targets()
    views = Counter((task.kind, task.id) for task in done)
    shards = {id: len({task.shard for task in done if task.id == id}) for id in (*banks, *targets)}
    lines = ["# A teacher store", "", "Targets of pretrained teachers over stored views of image shards.", ""]
    lines += [
        "## Teachers",
        "",
        "| name | network | weights | sha256 | input | mean, std |",
        "|---|---|---|---|---|---|",
    ]
    for name, manifest in teachers.items():
        about = manifest.identity
        arguments = "".join(f" {k}={v}" for k, v in about.arguments.items())
        lines.append(
            f"| {name} | {about.model}{arguments} | {Path(manifest.weights).name} | {about.weights_sha256[:12]} | "
            f"{about.input_size} | {list(about.mean)}, {list(about.std)} |"
        )
    lines += ["", "Licences of weights and images are those of their sources; none is recorded here.", ""]
    lines += ["## Banks", "", "| bank | policy | size | seed | shards | views in all |", "|---|---|---|---|---|---|"]
    for id, bank in banks.items():
        line = bank.identity.line.replace("|", "\\|")
        lines.append(
            f"| {id} | `{line}` | {bank.identity.size} | {bank.identity.seed} | {shards[id]} | {views['bank', id]} |"
        )
    lines += [
        "",
        "## Targets",
        "",
        "| target | one sample | layers | codec | its relative error, cosine | shards | views in all |",
        "|---|---|---|---|---|---|---|",
    ]
    for id, target in targets.items():
        shape, layers, codec = "×".join(map(str, target.sample_shape)), target.identity.layers, target.identity.codec
        error = target.codec_errors.get(codec)
        cost = f"{error.relative:.2g}, {error.cosine:.6f}" if error else ""
        lines.append(
            f"| {id} | {shape} ({', '.join(target.axes)}) | {[*layers] if layers else ''} | {codec} | "
            f"{cost} | {shards[id]} | {views['target', id]} |"
        )
    example = next((task for task in sorted(done) if task.kind == "target"), None)
    if example:
        lines += ["", _READING.format(marker=example.name, folder=example.folder)]
    return "\n".join(lines) + "\n"
