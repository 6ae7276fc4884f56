"""One reading of a shard in overlapping stages: read and render ahead, run, encode and write behind. No torch here.

While the session runs one view, the next blocks are read and rendered and the last one is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import IdentityError, UserError, setting
from storage.store import codecs
from storage.store.attempts import Attempt
from storage.store.banks import BankView, read_views, view_rows
from storage.store.markers import Marker, Task
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

    block: range
    keys: list[str]
    pixels: dict[int, np.ndarray]  # view -> uint8 [n, S, S, 3], mixed
    drawn: dict[int, list[View]]
    signatures: dict[int, np.ndarray]
    valid: np.ndarray  # bool [n]


class ShardPass:
    """One reading of a shard that makes several views; (view, target) in `wide` keep their scales in f32.

    Each view by itself: what is made of it must not depend on the views that happen to be made beside it.
    """

    def __init__(
        self,
        task: ShardTask,
        shard: Shard,
        wanted: dict[int, list[TargetOutput]],
        *,
        session: Session | None,
        threads: int,
        say: Callable[[int], None],
        wide: frozenset[tuple[int, str]] = frozenset(),
    ) -> None:
        self.wide = wide
        self.task, self.shard, self.wanted, self.session, self.say = task, shard, wanted, session, say
        self.threads = threads
        self.policy = task.policy
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
        return tuple(self.shard.index.keys[i] for i in sorted(self.invalid))

    def _open(self) -> None:
        store, shard, samples = self.task.store, self.shard.id, len(self.shard)
        for view, outputs in self.wanted.items():
            bank = Task("bank", self.policy.bank, shard, view)
            marker = store.find(bank, samples)
            if marker:
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
        if self.fresh and not self.known and 0 not in self.fresh:
            # Views that the shard has already are replayed beside the new ones: one bank, one kind of pixels.
            marker = store.find(Task("bank", self.policy.bank, shard, 0), samples)
            if marker:
                self.known[0] = marker

    def _stages(self) -> None:
        """Blocks are prepared ahead by threads, run here in order, and written by one thread in the same order."""
        count = self.shard.index.blocks
        blocks, mean = deque(range(count)), self.shard.summary.bytes / count
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
        block = self.shard.index.block(number)
        samples = self.shard.read(block)
        known = {view: read_views(marker, block.start, block.stop) for view, marker in self.known.items()}
        rendered = [*renderers.map(functools.partial(self._render, known, block), block, samples)]
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
            views = drawn[view] if view in drawn else [known[view].view(i) for i in block]
            pairs = zip(own, (drawn_view.mix for drawn_view in views), strict=True)
            mixed = [mix_images(image, own[mix.partner - block.start], mix) if mix else image for image, mix in pairs]
            pixels[view] = np.stack(mixed)
        return _Block(
            block=block,
            keys=[sample.key for sample in samples],
            pixels=pixels,
            drawn=drawn,
            signatures=signatures,
            valid=valid,
        )

    def _render(
        self, known: dict[int, BankView], block: range, i: int, sample: Sample
    ) -> tuple[dict[int, np.ndarray], dict[int, View]]:
        """View -> pixels of one sample before mixing, none where it is invalid; view -> what was drawn for new ones."""
        image = self._decode(sample)
        pixels: dict[int, np.ndarray] = {}
        drawn: dict[int, View] = {}
        for view, bank_view in known.items():
            replayed = self._replay(view, bank_view, i, sample, image)
            if replayed is not None:
                pixels[view] = replayed
        if image is not None:
            for view in self.fresh:
                drawn[view] = draw_view(self.policy, sample.key, view, image.size, i=i, block=block)
                pixels[view] = render(image, drawn[view], self.policy.size)
        return pixels, drawn

    def _replay(
        self, view: int, bank_view: BankView, i: int, sample: Sample, image: Image.Image | None
    ) -> np.ndarray | None:
        where = f"{self.task.url}, view {view}"
        if bank_view.view(i).valid != (image is not None):
            said = ("invalid", "valid")
            raise IdentityError(
                f"{where}, key {sample.key}", "image", said[bank_view.view(i).valid], said[image is not None]
            )
        return bank_view.replay(i, sample, image, self.policy.size, where) if image else None

    def _decode(self, sample: Sample) -> Image.Image | None:
        try:
            return decode(sample.image)
        except BadImage as error:
            if self.task.on_decode_error == "fail":
                skip = setting("on_decode_error", "skip")
                raise UserError(
                    f"{self.task.url}: key {sample.key!r}: {error}",
                    hint=f"Fix or remove the image, or skip such images in training: {skip}",
                ) from None
            return None

    # ------------------------------------------------------------------------------------------------------ writing

    def _write_bank(self, block: _Block) -> None:
        self.invalid.update(i for i, valid in zip(block.block, block.valid, strict=True) if not valid)
        for view, attempt in self.fresh.items():
            attempt.arrays["parameters"].append(view_rows(block.drawn[view]))
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
                raise TooWide(view, output.target) from None
            except UserError as error:
                where = f"{self.task.url}: keys {block.keys[0]!r} to {block.keys[-1]!r}, view {view}"
                raise UserError(f"{where}: {output.target}: {error}") from None
            for name, array in arrays.items():
                self.attempts[view, output.target].arrays[name].append(array)

    def _check_finite(self, view: int, output: TargetOutput, values: np.ndarray, block: _Block) -> None:
        bad = ~np.isfinite(values).reshape(len(values), -1).all(1) & block.valid
        if bad.any():
            key = block.keys[int(np.argmax(bad))]
            raise UserError(
                f"{self.task.url}: key {key!r}, view {view}: the teacher {self.task.teacher!r} gives values that are "
                f"not finite in {output.target}; nothing of this shard was kept"
            )

    def _mark(self) -> None:
        """The bank's marker first: a target's marker names the digest of its views."""
        summary = dataclasses.asdict(self.shard.summary)
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
            field = "checksums of the bank's parameters and signatures"
            hint = "Another run drew other views of this shard at the same time. Run precompute again."
            raise IdentityError(f"{self.task.url}, view {view}", field, committed, own, hint)
