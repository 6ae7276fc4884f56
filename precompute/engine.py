"""The engine: runs an exported graph over the blocks of one shard and writes what it gives. No torch here.

`run_task` is everything that happens to one shard for one graph: read, decode, render, run, encode, write, mark. It
needs nothing but its arguments, so that any process anywhere can run it; the markers in the store are the truth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from storage import codecs
from storage.banks import BankView, bank_policy, read_views, rows_of
from storage.errors import IdentityError, UserError
from storage.policies import Policy
from storage.records import Record
from storage.shards import BLOCK, ShardIndex, build_index, read_samples
from storage.store import Attempt, Marker, Store, Task
from storage.tars import Sample
from storage.views import COLUMNS, INVALID, BadImage, View, decode, draw, render, renderer, signature

BATCH = 16  # more is slower on a CPU and takes memory; outputs do not depend on it
BUFFERS = 512 << 20  # bytes of targets in the making; views beyond it wait for another pass over the shard
OPTIMISATION = "all"


class Session:
    """One ONNX Runtime session, and what it really runs on."""

    def __init__(self, session: Any, provider: str) -> None:
        self._session = session
        self.settings: Record = {
            "provider": provider, "precision": "float32", "optimisation": OPTIMISATION, "tf32": False,
        }  # fmt: skip

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs, f32 `[n, …]` each, of uint8 images `[n, S, S, 3]`."""
        parts = [self._session.run(None, {"images": images[i : i + BATCH]}) for i in range(0, len(images), BATCH)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def open_session(graph: bytes, provider: str = "auto", threads: int | None = None) -> Session:
    """A session on a provider: `cpu`, `cuda`, or `auto` for CUDA where it works and else the CPU.

    Raises:
        UserError: onnxruntime is not installed, the graph is not one, or CUDA was asked for and cannot be had.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed: pip install 'teacher-store[cpu]' (or [gpu])") from None
    onnxruntime.set_default_logger_severity(3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    names = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
    cuda = (names["cuda"], {"use_tf32": "0"})
    have_cuda = names["cuda"] in onnxruntime.get_available_providers()
    if provider == "cuda" and not have_cuda:
        raise UserError("--provider cuda: this onnxruntime has no CUDA; pip install 'teacher-store[gpu]', or use auto")
    wanted: list[Any] = [cuda] if have_cuda and provider in ("cuda", "auto") else []
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[*wanted, names["cpu"]])
    except Exception as error:  # onnxruntime's exceptions have no common type
        raise UserError(f"the teacher's graph cannot be run: {str(error).splitlines()[0]}") from None
    used = "cuda" if session.get_providers()[0] == names["cuda"] else "cpu"
    if provider == "cuda" and used != "cuda":
        raise UserError("--provider cuda: onnxruntime fell back to the CPU; look at its CUDA libraries, or use auto")
    return Session(session, used)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Output:
    """A target that a graph's output makes."""

    target: str
    position: int  # among the graph's outputs
    codec: str
    maps: int
    shape: tuple[int, ...]  # of one sample
    axes: tuple[str, ...]

    @classmethod
    def of(cls, manifest: Record) -> Output:
        """From a target's manifest."""
        return cls(
            manifest["id"], manifest["output"], manifest["identity"]["codec"], manifest["maps"],
            tuple(manifest["sample_shape"]), tuple(manifest["axes"]),
        )  # fmt: skip

    @property
    def sample_bytes(self) -> int:
        """Bytes that one sample takes at rest."""
        return codecs.sample_bytes(self.codec, self.shape, self.maps)


@dataclass(frozen=True)
class ShardTask:
    """One shard and one graph, with all targets of it that are wanted: plain data."""

    store: Store
    url: str
    bank: str
    teacher: str
    graph: str
    outputs: tuple[Output, ...]
    views: int
    bad_images: Literal["fail", "skip"] = "fail"


@dataclass
class Outcome:
    """What became of a task."""

    shard: str
    samples: int
    written: int = 0  # (target, view) pairs
    invalid: tuple[str, ...] = ()


def known_index(store: Store, url: str) -> ShardIndex:
    """The index of a shard; made, and kept in the store, when this is the first to read it."""
    index = store.recognise(url, store.shard_ids())
    if index is None:
        index = build_index(url)
        store.add_index(index, url)
    return index


def missing(task: ShardTask, shard: str) -> dict[int, list[Output]]:
    """View -> outputs of a task that have no marker yet.

    A damaged marker counts as none. So does one that was made from other views than the bank has now, or from views
    whose own marker is gone: it is removed.
    """
    store = task.store
    done = store.done()
    wanted: dict[int, list[Output]] = {}
    for view in range(task.views):
        bank: Marker | None = None
        for output in task.outputs:
            target = Task("target", output.target, shard, view)
            marker = store.find(target) if target in done else None
            if marker:  # only now: the bank's marker is there before the target's
                bank = bank or store.find(Task("bank", task.bank, shard, view))
                if bank and bank.views_digest == marker.content["bank_views"]:
                    continue
                store.objects.remove(f"done/{target.name}")
            wanted.setdefault(view, []).append(output)
    return wanted


def run_task(task: ShardTask, session: Session, say: Callable[[int], None] = lambda samples: None) -> Outcome:
    """Make all missing targets of one shard.

    Args:
        task: what is wanted.
        session: of the task's graph.
        say: called with the number of view images done since the last call.

    Raises:
        UserError: an image that cannot be rendered (unless they are skipped), a teacher's output that is not finite.
        IdentityError: the shard, or the pixels of views that a bank has already, are not what they were.
    """
    index = known_index(task.store, task.url)
    outcome = Outcome(index.id, len(index))
    wanted = missing(task, index.id)
    a_view = max(1, sum(max(output.sample_bytes * BLOCK, 16 << 20) for output in task.outputs))
    views = sorted(wanted)
    step = max(1, BUFFERS // a_view)
    for start in range(0, len(views), step):
        some = {view: wanted[view] for view in views[start : start + step]}
        wide: frozenset[str] = frozenset()
        while True:
            try:
                outcome.invalid = _Pass(task, index, some, session, say, wide).run()
                break
            except _TooWide as error:  # rare: the views of this target are made again with f32 scales
                wide |= {error.target}
        outcome.written += sum(map(len, some.values()))
    return outcome


class _TooWide(Exception):
    """A target's scales do not fit f16."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.target = target


class _Pass:
    """One reading of a shard that makes several views; targets in `wide` keep their scales in f32."""

    def __init__(
        self,
        task: ShardTask,
        index: ShardIndex,
        wanted: dict[int, list[Output]],
        session: Session,
        say: Callable[[int], None],
        wide: frozenset[str] = frozenset(),
    ) -> None:
        self.wide = wide
        self.task, self.index, self.wanted, self.session, self.say = task, index, wanted, session, say
        self.policy: Policy = bank_policy(task.store, task.bank)
        self.known: dict[int, Marker] = {}
        self.fresh: dict[int, Attempt] = {}
        self.attempts: dict[tuple[int, str], Attempt] = {}
        self.invalid: set[int] = set()

    def run(self) -> tuple[str, ...]:
        """Read, render, run, write and mark; the keys of samples that are marked invalid."""
        try:
            self._open()
            for number in range(self.index.blocks):
                self._block(number)
            self._mark()
        except BaseException:
            for attempt in (*self.fresh.values(), *self.attempts.values()):
                with contextlib.suppress(OSError):  # what stays is garbage; the first error is the one to tell
                    attempt.abandon()
            raise
        return tuple(self.index.keys[i] for i in sorted(self.invalid))

    def _open(self) -> None:
        store, shard = self.task.store, self.index.id
        done = store.done()
        for view, outputs in self.wanted.items():
            bank = Task("bank", self.task.bank, shard, view)
            marker = store.find(bank) if bank in done else None
            if marker:
                self.known[view] = marker
            else:
                attempt = self.fresh[view] = Attempt(store, bank, len(self.index))
                attempt.array("parameters", (len(COLUMNS),), "float64", ["column"])
                attempt.array("signatures", (1,), "uint32", ["column"])
            for output in outputs:
                attempt = Attempt(store, Task("target", output.target, shard, view), len(self.index))
                self.attempts[view, output.target] = attempt
                wide = output.target in self.wide
                layout = codecs.layout(output.codec, output.shape, output.maps, wide=wide)
                for name, (dtype, shape) in layout.items():
                    axes = output.axes if name == "data" else (*output.axes[: len(shape) - 1], "scale_offset")
                    attempt.array(name, shape, dtype, axes)

        if self.fresh and not self.known:
            # Views that the shard has already are replayed beside the new ones: one bank, one kind of pixels.
            older = [t for t in done if t.kind == "bank" and t.id == self.task.bank and t.shard == shard]
            marker = store.find(min(older)) if older else None
            if marker:
                self.known[marker.task.view] = marker

    def _block(self, number: int) -> None:
        block = self.index.block(number)
        samples = read_samples(self.task.url, self.index, block)
        pixels = self._render(block, samples)
        for view, outputs in self.wanted.items():
            values = self.session.run(pixels[view])
            for output in outputs:
                self._write(view, output, values[output.position], samples)
            self.say(len(block))

    def _render(self, block: range, samples: list[Sample]) -> dict[int, np.ndarray]:
        """View -> the block's images, uint8 [n, S, S, 3]; black where an image is invalid.

        Each original is decoded once and dropped before the next one: photographs are large.
        """
        side = self.policy.size
        pixels = {view: np.zeros((len(block), side, side, 3), np.uint8) for view in self.wanted}
        known = {view: read_views(marker, block.start, block.stop) for view, marker in self.known.items()}
        drawn: dict[int, list[View]] = {view: [] for view in self.fresh}
        signatures = {view: np.zeros((len(block), 1), np.uint32) for view in self.fresh}
        for i, sample in enumerate(samples):
            image = self._decode(block.start + i, sample)
            for view, there in known.items():
                replayed = self._replay(view, there, i, sample, image)
                if replayed is not None and view in pixels:
                    pixels[view][i] = replayed
            for view, views in drawn.items():
                views.append(draw(self.policy, sample.key, view, image.size) if image else INVALID)
                if image:
                    pixels[view][i] = render(image, views[-1], side)
                    signatures[view][i] = signature(pixels[view][i])
        for view, attempt in self.fresh.items():
            attempt.arrays["parameters"].append(rows_of(drawn[view]))
            attempt.arrays["signatures"].append(signatures[view])
        return pixels

    def _replay(
        self, view: int, there: BankView, i: int, sample: Sample, image: Image.Image | None
    ) -> np.ndarray | None:
        where = f"{self.task.url}, view {view}"
        if there.view(i).valid != (image is not None):
            said = ("invalid", "valid")
            raise IdentityError(
                f"{where}, key {sample.key}", "image", said[there.view(i).valid], said[image is not None]
            )
        return there.replay(i, sample, image, self.policy.size, where) if image else None

    def _decode(self, i: int, sample: Sample) -> Image.Image | None:
        try:
            return decode(sample.image)
        except BadImage as error:
            if self.task.bad_images == "fail":
                raise UserError(
                    f"{self.task.url}: key {sample.key!r}: {error}\n  Mend or remove the image, or leave such images "
                    "out of training: --bad-images skip"
                ) from None
            self.invalid.add(i)
            return None

    def _write(self, view: int, output: Output, values: np.ndarray, samples: list[Sample]) -> None:
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1)
        if bad.any():
            key = samples[int(np.argmax(bad))].key
            raise UserError(
                f"{self.task.url}: key {key!r}, view {view}: the teacher {self.task.teacher!r} gives values that are "
                f"not finite in {output.target}; nothing of this shard was kept"
            )
        wide = output.target in self.wide
        try:
            arrays = codecs.encode(output.codec, values, output.maps, wide=wide)
        except codecs.HalfOverflow:
            raise _TooWide(output.target) from None
        for name, array in arrays.items():
            self.attempts[view, output.target].arrays[name].append(array)

    def _mark(self) -> None:
        """The bank's marker first: a target's marker names the digest of its views."""
        import onnxruntime

        summary = dataclasses.asdict(self.index.summary)
        for view, attempt in self.fresh.items():
            mine = attempt.commit({"summary": summary, "invalid": sorted(self.invalid), "renderer": renderer()})
            if mine.content["attempt"] != attempt.name:
                self._agree(view, attempt, mine)
            self.known[view] = mine
        made = {"onnxruntime": onnxruntime.__version__, **self.session.settings, "renderer": renderer()}
        for (view, _), attempt in self.attempts.items():
            attempt.commit({"bank_views": self.known[view].views_digest, "made": made})

    def _agree(self, view: int, attempt: Attempt, other: Marker) -> None:
        """Somebody else drew this view at the same time: it must be the same view."""
        mine = [entry["checksums"] for entry in attempt.entries.values()]
        theirs = [other.content["arrays"][name]["checksums"] for name in attempt.entries]
        if mine != theirs:
            raise IdentityError(
                f"{self.task.url}, view {view}", "checksums of the bank's parameters and signatures", theirs, mine,
                "Another run drew other views of this shard at the same time; run precompute again.",
            )  # fmt: skip


def one_view(url: str, index: ShardIndex, policy: Policy) -> np.ndarray:
    """The first block's images in view 0, uint8 [n, S, S, 3], n >= 2: what an exported graph is checked on."""
    pixels = []
    for sample in read_samples(url, index, index.block(0)):
        try:
            image = decode(sample.image)
        except BadImage:
            continue
        pixels.append(render(image, draw(policy, sample.key, 0, image.size), policy.size))
    if not pixels:
        raise UserError(f"{url}: none of the first {BLOCK} images can be decoded")
    return np.stack(pixels if len(pixels) > 1 else pixels * 2)[:BATCH]
