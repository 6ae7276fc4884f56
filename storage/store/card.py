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
values = zarr.open_array("{folder}/" + marker["attempt"] + "/{array}", mode="r")[:]
```
"""

_MORE = (
    "An array `data_7` has maps that are stored at 7×7, and the codec `u4` packs two values into a byte. The page on "
    "the store's format in the documentation of teacher-store has a reader of every codec."
)


def card(store: Store) -> str:
    """The card's text, Markdown."""
    done = store.done()
    teachers, banks, targets = store.teachers(), store.banks(), store.targets()
    views = Counter((task.kind, task.id) for task in done)
    shards = {id: len({task.shard for task in done if task.id == id}) for id in (*banks, *targets)}
    lines = ["# A teacher store", "", "Targets of pretrained teachers over stored views of image shards.", ""]
    rows: list[tuple[object, ...]] = []
    for name, teacher in teachers.items():
        identity, weights = teacher.identity, Path(teacher.weights).name
        network = " ".join([identity.model, *(f"{k}={v}" for k, v in identity.arguments.items())])
        mean_std = f"{list(identity.mean)}, {list(identity.std)}"
        rows.append((name, network, weights, identity.weights_sha256[:12], identity.input_size, mean_std))
    lines += _table("Teachers", ["name", "network", "weights", "sha256", "input", "mean, std"], rows)
    lines += ["Licences of weights and images are those of their sources; none is recorded here.", ""]
    rows = []
    for id, bank in banks.items():
        policy = f"`{bank.identity.line}`".replace("|", "\\|")
        rows.append((id, policy, bank.identity.size, bank.identity.seed, shards[id], views["bank", id]))
    lines += _table("Banks", ["bank", "policy", "size", "seed", "shards", "views in all"], rows)
    rows = []
    for id, target in targets.items():
        sides = f", stored at {target.sides}" if target.sides else ""
        sample = f"{'×'.join(map(str, target.sample_shape))} ({', '.join(target.axes)}){sides}"
        layers, codec = list(target.identity.layers or ()) or "", target.identity.codec
        error = target.codec_errors.get(codec)
        cost = f"{error.relative:.2g}, {error.cosine:.6f}" if error else ""
        rows.append((id, sample, layers, codec, cost, shards[id], views["target", id]))
    columns = ["target", "one sample", "layers", "codec", "its relative error, cosine", "shards", "views in all"]
    lines += _table("Targets", columns, rows)
    if example := next((task for task in sorted(done) if task.kind == "target"), None):
        array = next(iter(targets[example.id].codec.layout()))
        lines += [_READING.format(marker=example.name, folder=example.folder, array=array), ""]
        if any(target.sides or target.identity.codec == "u4" for target in targets.values()):
            lines += [_MORE, ""]
    return "\n".join(lines)


def _table(title: str, columns: list[str], rows: list[tuple[object, ...]]) -> list[str]:
    """The lines of a section that holds a table, with an empty one at its end."""
    head, *body = (f"| {' | '.join(map(str, row))} |" for row in (columns, *rows))
    return [f"## {title}", "", head, "|---" * len(columns) + "|", *body, ""]
