"""The engine: runs an exported graph over the blocks of one shard and writes what it gives. No torch here.

`run_task` is everything that happens to one shard for one graph: read, decode, render, run, encode, write, mark. It
needs nothing but its arguments, so that any process anywhere can run it; the markers in the store are the truth.
The stages overlap: while the session runs one view, the next blocks are read and rendered and the last one is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from precompute.session import Session
from storage import codecs
from storage.banks import BankView, bank_policy, read_views, rows_of
from storage.codecs import Codec
from storage.errors import IdentityError, UserError
from storage.markers import Attempt, Marker, Task
from storage.policies import Policy
from storage.records import Record
from storage.shards import BLOCK, ShardIndex, build_index, read_samples
from storage.store import Store
from storage.tars import Sample
from storage.views import COLUMNS, INVALID, BadImage, View, decode, draw, mixed, render, renderer, settle, signature

BUFFERS = 512 << 20  # bytes of targets in the making; views beyond it wait for another pass over the shard
LARGE_BLOCK = 64 << 20  # bytes of a block's images from which on only one block at a time is read ahead
WRITES = 2  # views that wait to be written while the session goes on


@dataclass(frozen=True)
class Output:
    """A target, and which of the graph's outputs makes it; None where it is the view images themselves."""

    target: str
    position: int | None
    codec: Codec

    @classmethod
    def of(cls, manifest: Record) -> Output:
        """From a target's manifest."""
        return cls(manifest["id"], manifest["output"], Codec.of(manifest))


@dataclass(frozen=True)
class ShardTask:
    """One shard and one graph, with all targets of it that are wanted: plain data.

    Attributes:
        store: where everything is kept.
        url: of the shard.
        bank: id of the bank.
        teacher: name of the teacher, for messages.
        graph: digest of the teacher's graph.
        outputs: the targets.
        views: how many, from 0.
        bad_images: whether an image that cannot be decoded fails the shard or is left out.
        known: ids of shards with the file's stem that the store knew when the run began.
    """

    store: Store
    url: str
    bank: str
    teacher: str
    graph: str
    outputs: tuple[Output, ...]
    views: int
    bad_images: Literal["fail", "skip"] = "fail"
    known: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a task."""

    shard: str
    samples: int
    written: int = 0  # (target, view) pairs
    rendered: int = 0  # view images that the task had to make
    invalid: tuple[str, ...] = ()
    settings: Record = dataclasses.field(default_factory=dict, hash=False)


# Told (view images done since the last call, those of the whole task) while it goes on; may raise to stop it.
Report = Callable[[int, int], None]


def known_index(store: Store, url: str, known: Sequence[str]) -> ShardIndex:
    """The index of a shard; made, and kept in the store, where it is none of the `known` ones."""
    index = store.recognise(url, known)
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
    wanted: dict[int, list[Output]] = {}
    for view in range(task.views):
        bank: Marker | None = None
        for output in task.outputs:
            target = Task("target", output.target, shard, view)
            marker = store.find(target)
            if marker:  # only now: the bank's marker is there before the target's
                bank = bank or store.find(Task("bank", task.bank, shard, view))
                if bank and bank.views_digest == marker.content["bank_views"]:
                    continue
                store.discard(marker)
            wanted.setdefault(view, []).append(output)
    return wanted


def run_task(
    task: ShardTask, open_session: Callable[[], Session], threads: int, report: Report = lambda done, todo: None
) -> Outcome:
    """Make all missing targets of one shard.

    Args:
        task: what is wanted.
        open_session: gives a session of the task's graph; called only where something is to be run.
        threads: that decode and render.
        report: see `Report`.

    Raises:
        UserError: an image that cannot be rendered (unless they are skipped), a teacher's output that is not finite.
        IdentityError: the shard, or the pixels of views that a bank has already, are not what they were.
        OSError: reading or writing failed; the task may be tried again.
    """
    index = known_index(task.store, task.url, task.known)
    wanted = missing(task, index.id)
    todo = len(wanted) * len(index)
    report(0, todo)
    if not wanted:
        return Outcome(index.id, len(index))
    runs = any(output.position is not None for outputs in wanted.values() for output in outputs)
    session = open_session() if runs else None
    images = 4 * 2 * 3 * bank_policy(task.store, task.bank).size ** 2 * BLOCK  # four blocks on their way, mixed or not
    a_view = images + sum(max(output.codec.sample_bytes * BLOCK, 16 << 20) for output in task.outputs)
    views = sorted(wanted)
    step = max(1, BUFFERS // a_view)
    invalid: tuple[str, ...] = ()
    for start in range(0, len(views), step):
        some = {view: wanted[view] for view in views[start : start + step]}
        wide: frozenset[tuple[int, str]] = frozenset()
        while True:
            try:
                invalid = _Pass(task, index, some, session, threads, lambda n: report(n, todo), wide).run()
                break
            except _TooWide as error:  # rare: all is made again, this view of the target with f32 scales
                wide |= {(error.view, error.target)}
    written = sum(map(len, wanted.values()))
    return Outcome(index.id, len(index), written, todo, invalid, session.settings if session else {})


class _TooWide(Exception):
    """A target's scales do not fit f16."""

    def __init__(self, view: int, target: str) -> None:
        super().__init__(view, target)
        self.view, self.target = view, target


@dataclass
class _Block:
    """A block that was read and rendered: what the session sees of each view, and what the bank keeps of new ones."""

    block: range
    keys: list[str]
    pixels: dict[int, np.ndarray]  # view -> uint8 [n, S, S, 3], mixed
    drawn: dict[int, list[View]]
    signatures: dict[int, np.ndarray]
    valid: np.ndarray  # bool [n]


class _Pass:
    """One reading of a shard that makes several views; (view, target) in `wide` keep their scales in f32.

    Each view by itself: what is made of it must not depend on the views that happen to be made beside it.
    """

    def __init__(
        self,
        task: ShardTask,
        index: ShardIndex,
        wanted: dict[int, list[Output]],
        session: Session | None,
        threads: int,
        say: Callable[[int], None],
        wide: frozenset[tuple[int, str]] = frozenset(),
    ) -> None:
        self.wide = wide
        self.task, self.index, self.wanted, self.session, self.say = task, index, wanted, session, say
        self.threads = threads
        self.policy: Policy = bank_policy(task.store, task.bank)
        self.known: dict[int, Marker] = {}
        self.fresh: dict[int, Attempt] = {}
        self.attempts: dict[tuple[int, str], Attempt] = {}
        self.invalid: set[int] = set()

    def run(self) -> tuple[str, ...]:
        """Read, render, run, write and mark; the keys of samples that are marked invalid."""
        try:
            self._open()
            self._stages()
            self._mark()
        except BaseException:
            for attempt in (*self.fresh.values(), *self.attempts.values()):
                with contextlib.suppress(OSError):  # what stays is garbage; the first error is the one to tell
                    attempt.abandon()
            raise
        return tuple(self.index.keys[i] for i in sorted(self.invalid))

    def _open(self) -> None:
        store, shard = self.task.store, self.index.id
        for view, outputs in self.wanted.items():
            bank = Task("bank", self.task.bank, shard, view)
            marker = store.find(bank)
            if marker:
                self.known[view] = marker
            else:
                attempt = self.fresh[view] = Attempt(store, bank, len(self.index))
                attempt.array("parameters", (len(COLUMNS),), "float64", ["column"])
                attempt.array("signatures", (1,), "uint32", ["column"])
            for output in outputs:
                attempt = Attempt(store, Task("target", output.target, shard, view), len(self.index))
                self.attempts[view, output.target] = attempt
                for name, part in output.codec.layout(wide=(view, output.target) in self.wide).items():
                    attempt.array(name, part.shape, part.dtype, part.axes)
        if self.fresh and not self.known and 0 not in self.fresh:
            # Views that the shard has already are replayed beside the new ones: one bank, one kind of pixels.
            marker = store.find(Task("bank", self.task.bank, shard, 0))
            if marker:
                self.known[0] = marker

    def _stages(self) -> None:
        """Blocks are prepared ahead by threads, run here in order, and written by one thread in the same order."""
        blocks = deque(range(self.index.blocks))
        mean = self.index.summary.bytes / self.index.blocks
        ahead = 1 if mean > LARGE_BLOCK else 2
        with (
            ThreadPoolExecutor(self.threads, "render") as renderers,
            ThreadPoolExecutor(ahead, "prepare") as preparers,
            ThreadPoolExecutor(1, "write") as writer,
        ):
            prepared: deque[Future[_Block]] = deque()
            writing: deque[tuple[Future[None], int]] = deque()
            try:
                while blocks or prepared:
                    while blocks and len(prepared) < ahead:
                        prepared.append(preparers.submit(self._prepare, blocks.popleft(), renderers))
                    block = prepared.popleft().result()
                    if blocks:  # before the session begins, so that it has company
                        prepared.append(preparers.submit(self._prepare, blocks.popleft(), renderers))
                    writing.append((writer.submit(self._write_bank, block), 0))
                    for view, outputs in self.wanted.items():
                        runs = any(output.position is not None for output in outputs)
                        values = self.session.run(block.pixels[view]) if runs and self.session else []
                        writing.append((writer.submit(self._write, view, values, block), len(block.keys)))
                        while len(writing) > WRITES:
                            self._wrote(*writing.popleft())
                while writing:
                    self._wrote(*writing.popleft())
            finally:  # after an error nothing new is begun; the pools wait for what is under way
                for pool in (preparers, renderers, writer):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _wrote(self, future: Future[None], count: int) -> None:
        future.result()
        if count:
            self.say(count)

    # ---------------------------------------------------------------------------------------- reading and rendering

    def _prepare(self, number: int, renderers: ThreadPoolExecutor) -> _Block:
        """Read and render a block. Each original is decoded once and dropped: photographs are large."""
        block = self.index.block(number)
        samples = read_samples(self.task.url, self.index, block)
        known = {view: read_views(marker, block.start, block.stop) for view, marker in self.known.items()}
        jobs = [
            renderers.submit(self._render, i, sample, known, block)
            for i, sample in zip(block, samples, strict=True)
        ]  # fmt: skip
        rendered = [job.result() for job in jobs]
        valid = np.array([bool(images) for images, _ in rendered])
        side = self.policy.size
        blank = np.zeros((side, side, 3), np.uint8)
        drawn = {view: settle([views.get(view, INVALID) for _, views in rendered], block) for view in self.fresh}
        signatures, pixels = {}, {}
        for view in self.wanted:
            own = [images.get(view, blank) for images, _ in rendered]
            if view in self.fresh:
                sums = [signature(image) if ok else 0 for image, ok in zip(own, valid, strict=True)]
                signatures[view] = np.array(sums, np.uint32)[:, None]
            views = drawn[view] if view in drawn else [known[view].view(i) for i in range(len(block))]
            mixes = [v.mix for v in views]
            pixels[view] = np.stack([
                mixed(image, own[mix.partner - block.start], mix) if mix else image
                for image, mix in zip(own, mixes, strict=True)
            ])  # fmt: skip
        return _Block(block, [sample.key for sample in samples], pixels, drawn, signatures, valid)

    def _render(
        self, i: int, sample: Sample, known: dict[int, BankView], block: range
    ) -> tuple[dict[int, np.ndarray], dict[int, View]]:
        """View -> pixels of one sample before mixing, none where it is invalid; view -> what was drawn for new ones."""
        image = self._decode(sample)
        pixels: dict[int, np.ndarray] = {}
        drawn: dict[int, View] = {}
        for view, there in known.items():
            replayed = self._replay(view, there, i - block.start, sample, image)
            if replayed is not None:
                pixels[view] = replayed
        if image is not None:
            for view in self.fresh:
                drawn[view] = draw(self.policy, sample.key, view, image.size, i, block)
                pixels[view] = render(image, drawn[view], self.policy.size)
        return pixels, drawn

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

    def _decode(self, sample: Sample) -> Image.Image | None:
        try:
            return decode(sample.image)
        except BadImage as error:
            if self.task.bad_images == "fail":
                raise UserError(
                    f"{self.task.url}: key {sample.key!r}: {error}\n  Mend or remove the image, or leave such images "
                    "out of training: --bad-images skip"
                ) from None
            return None

    # ------------------------------------------------------------------------------------------------------ writing

    def _write_bank(self, block: _Block) -> None:
        self.invalid.update(i for i, valid in zip(block.block, block.valid, strict=True) if not valid)
        for view, attempt in self.fresh.items():
            attempt.arrays["parameters"].append(rows_of(block.drawn[view]))
            attempt.arrays["signatures"].append(block.signatures[view])

    def _write(self, view: int, values: list[np.ndarray], block: _Block) -> None:
        for output in self.wanted[view]:
            of_view = block.pixels[view] if output.position is None else values[output.position]
            if output.position is not None:
                self._check_finite(view, output, of_view, block)
                if not block.valid.all():  # what a teacher makes of no image means nothing
                    of_view = np.where(block.valid[(..., *(None,) * (of_view.ndim - 1))], of_view, 0)
            try:
                arrays = output.codec.encode(of_view, wide=(view, output.target) in self.wide)
            except codecs.HalfOverflow:
                raise _TooWide(view, output.target) from None
            except UserError as error:
                where = f"{self.task.url}: keys {block.keys[0]!r} to {block.keys[-1]!r}, view {view}"
                raise UserError(f"{where}: {output.target}: {error}") from None
            for name, array in arrays.items():
                self.attempts[view, output.target].arrays[name].append(array)

    def _check_finite(self, view: int, output: Output, values: np.ndarray, block: _Block) -> None:
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1) & block.valid
        if bad.any():
            key = block.keys[int(np.argmax(bad))]
            raise UserError(
                f"{self.task.url}: key {key!r}, view {view}: the teacher {self.task.teacher!r} gives values that are "
                f"not finite in {output.target}; nothing of this shard was kept"
            )

    def _mark(self) -> None:
        """The bank's marker first: a target's marker names the digest of its views."""
        summary = dataclasses.asdict(self.index.summary)
        for view, attempt in self.fresh.items():
            mine = attempt.commit({"summary": summary, "invalid": sorted(self.invalid), "renderer": renderer()})
            if mine.content["attempt"] != attempt.name:
                self._agree(view, attempt, mine)
            self.known[view] = mine
        made: dict[str, Any] = {"renderer": renderer(), **(self.session.settings if self.session else {})}
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


def block_views(url: str, index: ShardIndex, policy: Policy, number: int = 0) -> np.ndarray:
    """A block's images in view 0, uint8 [n, S, S, 3], n >= 2: what an exported graph is checked on.

    Invalid images are left out, and nothing is mixed with them.
    """
    block = index.block(number)
    views, pixels = [], []
    for i, sample in zip(block, read_samples(url, index, block), strict=True):
        try:
            image = decode(sample.image)
        except BadImage:
            views.append(INVALID)
            pixels.append(np.zeros(0, np.uint8))
            continue
        views.append(draw(policy, sample.key, 0, image.size, i, block))
        pixels.append(render(image, views[-1], policy.size))
    whole = [
        mixed(own, pixels[view.mix.partner - block.start], view.mix) if view.mix else own
        for view, own in zip(settle(views, block), pixels, strict=True)
        if view.valid
    ]
    if not whole:
        raise UserError(f"{url}: none of the {len(block)} images of its block {number} can be decoded")
    return np.stack(whole if len(whole) > 1 else whole * 2)
