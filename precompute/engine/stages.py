"""One reading of a shard in overlapping stages: read and render ahead, run, encode and write behind. No torch here.

While the session runs one view, the next blocks are read and rendered and the last one is written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import IdentityError, UserError, setting
from storage.store.attempts import Attempt
from storage.store.banks import BankView, read_views, view_rows
from storage.store.markers import Marker, Task
from storage.store.quantize import HalfOverflow
from storage.views.draw import draw_view, settle
from storage.views.mixing import mix_images
from storage.views.render import BadImage, decode, render, renderer, signature
from storage.views.view import COLUMNS, INVALID, View

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image

    from precompute.engine.session import Session
    from precompute.engine.tasks import ShardTask, TargetOutput
    from storage.shards.shard import Shard
    from storage.shards.tar import Sample

LARGE_BLOCK = 64 << 20  # bytes of a block's images from which on only one block at a time is read ahead
WRITES = 2  # views that wait to be written while the session goes on


class TooWide(Exception):
    """A target's scales do not fit f16."""

    def __init__(self, view: int, target: str) -> None:
        super().__init__(view, target)
        self.view, self.target = view, target


@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """A block that was read and rendered: what the session sees of each view, and what the bank keeps of new ones."""

    samples: range
    pixels: dict[int, np.ndarray]  # view -> uint8 [n, S, S, 3], mixed
    drawn: dict[int, list[View]]
    signatures: dict[int, np.ndarray]
    valid: np.ndarray  # bool [n]


@dataclass(slots=True)
class ShardPass:
    """One reading of a shard that makes several views; (view, target) in `wide` keep their scales in f32.

    Each view by itself: what is made of it must not depend on the views that happen to be made beside it.
    """

    task: ShardTask
    shard: Shard
    targets: dict[int, list[TargetOutput]]  # by view
    session: Session | None
    _: KW_ONLY
    threads: int
    say: Callable[[int], None]
    wide: frozenset[tuple[int, str]]
    known: dict[int, Marker] = field(default_factory=dict, init=False)
    fresh: dict[int, Attempt] = field(default_factory=dict, init=False)
    attempts: dict[tuple[int, str], Attempt] = field(default_factory=dict, init=False)
    invalid: set[int] = field(default_factory=set, init=False)

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
        return tuple(self.shard.index.keys[i] for i in sorted(self.invalid))

    def _open(self) -> None:
        store, shard, samples = self.task.store, self.shard.id, len(self.shard)
        for view, outputs in self.targets.items():
            bank = Task("bank", self.task.policy.bank, shard, view)
            if marker := store.find(bank, samples):
                self.known[view] = marker
            else:
                attempt = self.fresh[view] = Attempt(store, bank, samples)
                attempt.array("parameters", (len(COLUMNS),), "float64", ["column"])
                attempt.array("signatures", (1,), "uint32", ["column"])
            for output in outputs:
                attempt = Attempt(store, Task("target", output.target, shard, view), samples)
                self.attempts[view, output.target] = attempt
                for name, part in output.codec.layout(wide=(view, output.target) in self.wide).items():
                    attempt.array(name, part.shape, part.dtype, part.axes)
        first = Task("bank", self.task.policy.bank, shard, 0)
        # Views that the shard has already are replayed beside the new ones: one bank, one kind of pixels.
        if self.fresh and not self.known and 0 not in self.fresh and (marker := store.find(first, samples)):
            self.known[0] = marker

    def _stages(self) -> None:
        """Blocks are prepared ahead by threads, run here in order, and written by one thread in the same order."""
        count = self.shard.index.blocks
        ahead = 1 if self.shard.summary.bytes / count > LARGE_BLOCK else 2
        with (
            ThreadPoolExecutor(self.threads, "render") as renderers,
            ThreadPoolExecutor(ahead, "prepare") as preparers,
            ThreadPoolExecutor(1, "write") as writer,
        ):
            blocks = iter(range(count))
            prepared: deque[Future[_Block]] = deque()
            writing: deque[Future[int]] = deque()

            def prepare(more: int) -> None:
                for number in itertools.islice(blocks, more):
                    prepared.append(preparers.submit(self._prepare, number, renderers))

            try:
                prepare(ahead)
                while prepared:
                    block = prepared.popleft().result()
                    prepare(1)  # before the session begins, so that it has company
                    writing.append(writer.submit(self._write_bank, block))
                    for view, outputs in self.targets.items():
                        runs = any(output.position is not None for output in outputs)
                        values = self.session.run(block.pixels[view]) if runs and self.session else []
                        writing.append(writer.submit(self._write, view, values, block))
                        self._wait(writing, WRITES)
                self._wait(writing, 0)
            finally:  # after an error nothing new is begun; the pools wait for what is under way
                for pool in (preparers, renderers, writer):
                    pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, writing: deque[Future[int]], left: int) -> None:
        """Until so many views are left to be written."""
        while len(writing) > left:
            if samples := writing.popleft().result():
                self.say(samples)

    # ---------------------------------------------------------------------------------------- reading and rendering

    def _prepare(self, number: int, renderers: ThreadPoolExecutor) -> _Block:
        """Read and render a block. Each original is decoded once and dropped: photographs are large."""
        block = self.shard.index.block(number)
        samples = self.shard.read(block)
        known = {view: read_views(marker, block.start, block.stop) for view, marker in self.known.items()}
        rendered = [*renderers.map(functools.partial(self._render, known, block), block, samples)]
        valid = np.array([bool(images) for images, _ in rendered])
        blank = np.zeros((self.task.policy.size, self.task.policy.size, 3), np.uint8)
        drawn = {view: settle([views.get(view, INVALID) for _, views in rendered], block) for view in self.fresh}
        signatures, pixels = {}, {}
        for view in self.targets:
            own = [images.get(view, blank) for images, _ in rendered]
            if view in self.fresh:
                sums = [signature(image) if ok else 0 for image, ok in zip(own, valid, strict=True)]
                signatures[view] = np.array(sums, np.uint32)[:, None]
            views = drawn[view] if view in drawn else [known[view].view(i) for i in block]
            pairs = zip(own, (drawn_view.mix for drawn_view in views), strict=True)
            mixed = [mix_images(image, own[mix.partner - block.start], mix) if mix else image for image, mix in pairs]
            pixels[view] = np.stack(mixed)
        return _Block(samples=block, pixels=pixels, drawn=drawn, signatures=signatures, valid=valid)

    def _render(
        self, known: dict[int, BankView], block: range, i: int, sample: Sample
    ) -> tuple[dict[int, np.ndarray], dict[int, View]]:
        """View -> pixels of one sample before mixing, none where it is invalid; view -> what was drawn for new ones."""
        image, policy, where = self._decode(sample), self.task.policy, f"{self.task.url}, view"
        for view, stored in known.items():
            if stored.view(i).valid == (image is None):
                expected, found = ("valid", "invalid") if image is None else ("invalid", "valid")
                raise IdentityError(f"{where} {view}, key {sample.key}", "image", expected, found)
        if image is None:
            return {}, {}
        replayed = {v: stored.replay(i, sample, image, policy.size, f"{where} {v}") for v, stored in known.items()}
        drawn = {v: draw_view(policy, sample.key, v, image.size, i=i, block=block) for v in self.fresh}
        return replayed | {v: render(image, view, policy.size) for v, view in drawn.items()}, drawn

    def _decode(self, sample: Sample) -> Image.Image | None:
        try:
            return decode(sample.image)
        except BadImage as error:
            if self.task.on_decode_error == "fail":
                skip = setting("on_decode_error", "skip")
                hint = f"Fix or remove the image, or skip such images in training: {skip}"
                raise UserError(f"{self.task.url}: key {sample.key!r}: {error}", hint=hint) from None
            return None

    # ------------------------------------------------------------------------------------------------------ writing

    def _write_bank(self, block: _Block) -> int:
        self.invalid.update(i for i, valid in zip(block.samples, block.valid, strict=True) if not valid)
        for view, attempt in self.fresh.items():
            attempt.arrays["parameters"].append(view_rows(block.drawn[view]))
            attempt.arrays["signatures"].append(block.signatures[view])
        return 0

    def _write(self, view: int, values: list[np.ndarray], block: _Block) -> int:
        """Write a view's targets; how many samples were written."""
        for output in self.targets[view]:
            if output.position is None:
                of_view = block.pixels[view]
            else:
                of_view = values[output.position]
                self._check_finite(view, output, of_view, block)
                if not block.valid.all():  # what a teacher makes of no image means nothing
                    of_view = np.where(block.valid[(..., *(None,) * (of_view.ndim - 1))], of_view, 0)
            try:
                arrays = output.codec.encode(of_view, wide=(view, output.target) in self.wide)
            except HalfOverflow:
                raise TooWide(view, output.target) from None
            except UserError as error:
                first, last = (self.shard.index.keys[i] for i in (block.samples[0], block.samples[-1]))
                where = f"{self.task.url}: keys {first!r} to {last!r}, view {view}"
                raise UserError(f"{where}: {output.target}: {error}") from None
            for name, array in arrays.items():
                self.attempts[view, output.target].arrays[name].append(array)
        return len(block.samples)

    def _check_finite(self, view: int, output: TargetOutput, values: np.ndarray, block: _Block) -> None:
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1) & block.valid
        if bad.any():
            key = self.shard.index.keys[block.samples[int(np.argmax(bad))]]
            raise UserError(
                f"{self.task.url}: key {key!r}, view {view}: the teacher {self.task.teacher!r} gives values that are "
                f"not finite in {output.target}; nothing of this shard was kept"
            )

    def _mark(self) -> None:
        """The bank's marker first: a target's marker names the digest of its views."""
        summary = self.shard.summary.plain()
        for view, attempt in self.fresh.items():
            marker = attempt.commit({"summary": summary, "invalid": sorted(self.invalid), "renderer": renderer()})
            if marker.record.attempt != attempt.name:
                self._agree(view, attempt, marker)
            self.known[view] = marker
        made: dict[str, Any] = {"renderer": renderer(), **(self.session.settings if self.session else {})}
        for (view, _), attempt in self.attempts.items():
            attempt.commit({"bank_views": self.known[view].bank.views_digest, "made": made})

    def _agree(self, view: int, attempt: Attempt, other: Marker) -> None:
        """Somebody else drew this view at the same time: it must be the same view."""
        own = [array.checksums for array in attempt.entries.values()]
        committed = [other.record.arrays[name].checksums for name in attempt.entries]
        if own != committed:
            what = "checksums of the bank's parameters and signatures"
            hint = "Another run drew other views of this shard at the same time. Run precompute again."
            raise IdentityError(f"{self.task.url}, view {view}", what, committed, own, hint)
