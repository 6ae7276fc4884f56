"""Check: do stored targets still say what the teacher says of the same view images?

The teacher is the PyTorch network where its weights are at hand (of a ready graph the file, run by itself), and
otherwise the stored graph; the report says which.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from precompute.engine.session import open_session
from precompute.teachers.teacher import Teacher, untrained_digest
from storage.errors import IdentityError, setting
from storage.objects.network_names import BUILT, TORCHVISION, bare, is_recorded
from storage.objects.state_dict import HUB
from storage.objects.weights_file import WeightsFile, is_random
from storage.store.banks import bank_policy
from storage.store.markers import Task

if TYPE_CHECKING:
    from precompute.taps import Tap
    from storage.shards.shard import Shard
    from storage.store.codecs import Codec
    from storage.store.manifests import TargetManifest, TeacherManifest
    from storage.store.store import Store
    from storage.store.verify import VerifyReport

# Largest difference that counts as the same, ÷ the largest value of the teacher: what the codec rounds (beyond half a
# step of `u4`), and what graphs, processors and optimization levels differ by.
TOLERANCE = {"f32": 1e-3, "f16": 2e-3, "u8": 6e-3, "u4": 2e-3, "log8": 2.5e-2, "topk": 2e-3, "raw": 0.0}
BATCH = 16

Values = Callable[[np.ndarray], dict[str, np.ndarray]]  # view images uint8 [n, S, S, 3] -> target -> f32 [n, …]


class LiveTargets:
    """Compares stored targets with a teacher, sample for sample: a `look` of `storage.store.verify.verify`.

    Args:
        store: whose targets.
        report: where failures are listed, by shard, key and view.
        weights: files of weights; each must be a recorded teacher's.
        say: called with progress lines.

    Raises:
        IdentityError: weights that no recorded teacher has.
    """

    def __init__(
        self, store: Store, report: VerifyReport, weights: Sequence[str], say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.store, self.report, self.say = store, report, say
        self.done, self.teachers, self.targets = store.done(), store.teachers(), store.targets()
        self.files: dict[str, str] = {}  # teacher -> file of its weights
        digests = {name: manifest.identity.weights_sha256 for name, manifest in self.teachers.items()}
        for file in weights:
            digest = WeightsFile(file).digest
            names = [name for name, recorded in digests.items() if recorded == digest]
            if not names:
                known = " or ".join(f"{digest} ({name})" for name, digest in digests.items())
                hint = "Give the file that precompute was given."
                raise IdentityError(setting("weights", file), "sha256", known, digest, hint)
            self.files |= dict.fromkeys(names, file)
        for name in sorted(self.teachers.keys() - self.files.keys()):
            path = self.teachers[name].weights
            if not _at_hand(self.teachers[name]):
                now = ""
            elif is_random(path) or path == BUILT:
                now = untrained_digest(teacher_of(name, self.teachers[name], path))
            else:
                now = WeightsFile(path).digest if Path(path).expanduser().is_file() else ""
            if now == digests[name]:
                self.files[name] = path
        self._values: dict[tuple[str, str], Values] = {}

    def __call__(self, shard: Shard, task: Task, pixels: dict[int, np.ndarray]) -> None:
        """Compare all targets of one bank's view that these samples have."""
        if not pixels:
            return
        tasks = {id: Task("target", id, task.shard, task.view) for id in self.targets}
        ids = [id for id, m in self.targets.items() if m.identity.bank == task.id and tasks[id] in self.done]
        images = np.stack(list(pixels.values()))
        live: dict[str, np.ndarray] = {}
        for teacher in dict.fromkeys(self.targets[id].teacher for id in ids):
            live |= self._teacher(teacher, task.id)(images)
        samples = list(pixels)
        first, stop = samples[0], samples[-1] + 1
        rows = [i - first for i in samples]
        for id in ids:
            codec, compared_with = self.targets[id].codec, self.report.compared_with[self.targets[id].teacher]
            marker = self.store.marker(tasks[id])
            marker.require(len(shard), codec)
            arrays = {name: array.read(first, stop)[rows] for name, array in marker.arrays.items()}
            allowed = TOLERANCE["topk" if codec.name.startswith("topk") else codec.name]
            self.report.targets_compared += len(samples)
            for i, difference in zip(samples, differences(codec, arrays, live[id]), strict=True):
                if not difference <= allowed:
                    self.report.failures.append(
                        f"{shard.url}, key {shard.index.keys[i]}, view {task.view}, target {id}: it differs from the "
                        f"{compared_with} by {difference:.2g} of a map's largest value (allowed for {codec.name}: "
                        f"{allowed:g})"
                    )

    def _teacher(self, name: str, bank: str) -> Values:
        """What gives the values of a teacher's targets over a bank; made once."""
        if (name, bank) not in self._values:
            targets = {id: m for id, m in self.targets.items() if (m.teacher, m.identity.bank) == (name, bank)}
            if all(manifest.graph is None for manifest in targets.values()):
                self.report.compared_with[name] = "view images rendered again"
                self._values[name, bank] = lambda images: dict.fromkeys(targets, images)
            elif name in self.files and _at_hand(self.teachers[name]):
                self._values[name, bank] = self._live(name, bank, targets)
            else:
                self._values[name, bank] = self._graphs(name, targets)
            for id, manifest in targets.items():
                self._check_resizing(id, manifest)
            self.say(f"{name}: compared with the {self.report.compared_with[name]}")
        return self._values[name, bank]

    def _check_resizing(self, id: str, manifest: TargetManifest) -> None:
        """List a target whose manifest resizes native maps otherwise than its identity says."""
        if not manifest.resize:
            return
        from precompute.taps import Tap

        tap = Tap.of(manifest.identity)
        for side, matrix in manifest.resize.items():
            if not np.allclose(np.array(matrix), tap.grid_matrix(int(side)).numpy(), rtol=0, atol=1e-5):
                where = f"{self.store.url}/targets/{id}/manifest.json: resize.{side}"
                self.report.failures.append(f"{where}: it is not the matrix that resizes {side}x{side} to {tap.grid}")

    def _live(self, name: str, bank: str, targets: dict[str, TargetManifest]) -> Values:
        from precompute.taps import Tap

        teacher = teacher_of(name, self.teachers[name], self.files[name])
        taps = {id: Tap.of(manifest.identity) for id, manifest in targets.items()}
        distinct = list(dict.fromkeys(taps.values()))
        reference = "file run by itself" if teacher.ready else "PyTorch teacher"
        run = _reference(teacher, distinct, bank_policy(self.store, bank).size)
        built = f"{bare(teacher.model)} " if self.files[name] == BUILT else ""
        self.report.compared_with[name] = f"{reference} ({built}{self.files[name]})"

        def values(images: np.ndarray) -> dict[str, np.ndarray]:
            parts = [run(images[i : i + BATCH]) for i in range(0, len(images), BATCH)]
            outputs = dict(zip(distinct, map(np.concatenate, zip(*parts, strict=True)), strict=True))
            return {id: outputs[tap] for id, tap in taps.items()}

        return values

    def _graphs(self, name: str, targets: dict[str, TargetManifest]) -> Values:
        made_by = {id: manifest.graph_output for id, manifest in targets.items()}
        sessions = {digest: open_session(self.store.graph(name, digest)) for digest, _ in made_by.values()}
        weights = self.teachers[name].weights
        reason = f"{weights} not found: {setting('weights', 'F')}"
        model = self.teachers[name].identity.model
        if not _at_hand(self.teachers[name]):
            reason = f"its network is the code of {bare(model)}, which runs only if you name it: "
            reason += setting("network", bare(model))
        elif weights == BUILT:
            reason = f"{bare(model)} now builds other weights"
        elif weights == HUB or is_random(weights):
            hub = "torchvision" if model.startswith(TORCHVISION) else "the timm hub"
            reason = f"its weights came from {hub}" if weights == HUB else f"{weights} now gives other weights"
        self.report.compared_with[name] = f"stored graph ({reason})"

        def values(images: np.ndarray) -> dict[str, np.ndarray]:
            outputs = {digest: session.run(images) for digest, session in sessions.items()}
            return {id: outputs[digest][position] for id, (digest, position) in made_by.items()}

        return values


def _reference(teacher: Teacher, taps: Sequence[Tap], view_size: int) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Gives the taps, f32 `[n, …]` each, of view images uint8 `[n, S, S, 3]`: by PyTorch, or a ready graph's file."""
    if teacher.ready:
        from precompute.export.onnx_file import ReferenceRunner

        return ReferenceRunner(teacher, taps, view_size)
    import torch

    from precompute.export.pytorch import live_teacher

    module = live_teacher(teacher, taps, view_size)

    def run(images: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            return [output.numpy() for output in module(torch.from_numpy(images))]

    return run


def differences(codec: Codec, arrays: dict[str, np.ndarray], live: np.ndarray) -> np.ndarray:
    """Largest difference of a map between stored and live values, for each sample, f64 [n].

    In each map ÷ its largest value, or a fiftieth of the largest of all where it is smaller: what graphs differ by goes
    by the values that a layer adds up. Native maps are compared on their own sides. Of `topk` the logits that were
    kept, and the mass of all others, absolutely.
    """
    apart = np.zeros(len(live))
    parts = codec.split(live)
    if codec.name.startswith("topk"):
        index = arrays["index"].astype(np.int64)
        exact = np.exp(live.astype(np.float64) - live.max(-1, keepdims=True))
        exact /= exact.sum(-1, keepdims=True)
        rest = 1 - np.take_along_axis(exact, index, -1).sum(-1)
        apart = np.abs(rest - arrays["rest"][..., 0]).reshape(len(live), -1).max(1)
        stored, parts = {"data": arrays["data"]}, {"data": np.take_along_axis(live, index, -1)}
    else:
        stored = codec.values_of(arrays)
    for name, values in parts.items():
        axes = tuple(range(values.ndim - codec.maps, values.ndim))
        largest = np.abs(values).max(axes)
        floor = max(float(largest.max()) / 50, 1e-12)
        difference = np.abs(stored[name].astype(np.float64) - values)
        if codec.name == "u4":  # its steps are large: what is beyond half of one counts
            difference = np.maximum(difference - codec.steps(arrays)[name] / 2, 0)
        each = difference.max(axes) / np.maximum(largest, floor)
        apart = np.maximum(apart, each.reshape(len(live), -1).max(1))
    return apart


def _at_hand(manifest: TeacherManifest) -> bool:
    """Whether a teacher's network can be made without code that a store names and the user does not."""
    model = manifest.identity.model
    if not is_recorded(model):
        return True
    from precompute.taps import given

    return given(model) is not None


def teacher_of(name: str, manifest: TeacherManifest, weights: str) -> Teacher:
    """A recorded teacher with a file of its weights."""
    about = manifest.identity
    return Teacher(
        name=name,
        model=about.model,
        arguments=about.arguments,
        weights=None if weights == BUILT else weights,
        digest=about.weights_sha256,
        input_size=about.input_size,
        mean=about.mean,
        std=about.std,
        weights_key=about.weights_key,
        prefix=about.prefix,
        tap_modules=about.tap_modules,
    )
