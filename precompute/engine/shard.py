"""The engine: runs an exported graph over the blocks of one shard and writes what it gives. No torch here.

`run_task` is everything that happens to one shard for one graph: read, decode, render, run, encode, write, mark. It
needs nothing but its arguments, so that any process anywhere can run it; the markers in the store are the truth.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from precompute.engine.stages import ShardPass, TooWide
from precompute.engine.tasks import OnDecodeError, Outcome, ReportProgress, ShardTask, TargetOutput
from storage.constants import BLOCK
from storage.errors import UserError
from storage.shards.index import build_index
from storage.shards.shard import Shard
from storage.shards.tar import require_whole
from storage.store.markers import Marker, Task
from storage.views.draw import draw_view, settle
from storage.views.mixing import mix_images
from storage.views.render import BadImage, decode, render
from storage.views.view import INVALID

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from precompute.engine.session import Session
    from storage.store.store import Store
    from storage.views.policy import Policy

BUFFERS = 512 << 20  # bytes of targets in the making; views beyond it wait for another pass over the shard


def open_for_store(
    store: Store, url: str, known: Sequence[str], on_decode_error: OnDecodeError, opened: Shard | None = None
) -> Shard:
    """A shard of a store; where it is none of the known ones, it is indexed and the index is kept in the store.

    The index of a shard without samples is not kept: there is nothing in it that a store could know.

    Args:
        store: that the shard belongs to.
        url: of the shard.
        known: ids of shards of the store that it may be.
        on_decode_error: whether keys that make no sample fail the shard.
        opened: the shard, where it was opened before.

    Raises:
        UserError: as `build_index`; keys make no sample, unless those are skipped.
    """
    shard = opened if opened is not None else store.recognize(url, known)
    if shard is None:
        index = build_index(url)
        if len(index) and (on_decode_error == "skip" or not index.left_out):
            store.add_index(index, url)
        shard = Shard(url, index, functools.partial(store.index, index.id))
    if on_decode_error == "fail":
        require_whole(url, shard.index.left_out)
    return shard


def _missing(task: ShardTask, shard: Shard) -> dict[int, list[TargetOutput]]:
    """View -> outputs of a task that have no marker yet.

    A damaged marker counts as none. So does one that was made from other views than the bank has now, or from views
    whose own marker is gone: it is removed.
    """
    store, samples = task.store, len(shard)
    missing: dict[int, list[TargetOutput]] = {}
    for view in range(task.views):
        bank: Marker | None = None
        for output in task.outputs:
            marker = store.find(Task("target", output.target, shard.id, view), samples, output.codec)
            if marker:  # only now: the bank's marker is there before the target's
                bank = bank or store.find(Task("bank", task.policy.bank, shard.id, view), samples)
                if bank and bank.bank.views_digest == marker.target.bank_views:
                    continue
                store.discard(marker)
            missing.setdefault(view, []).append(output)
    return missing


def run_task(
    task: ShardTask, open_session: Callable[[], Session], threads: int, report: ReportProgress = lambda *_: None
) -> Outcome:
    """Make all missing targets of one shard.

    Args:
        task: what is wanted.
        open_session: gives a session of the task's graph; called only where something is to be run.
        threads: that decode and render.
        report: see `ReportProgress`.

    Raises:
        UserError: an image that cannot be rendered or a key without one (unless they are skipped), a teacher's output
            that is not finite.
        IdentityError: the shard, or the pixels of views that a bank has already, are not what they were.
        OSError: reading or writing failed; the task may be tried again.
    """
    shard = open_for_store(task.store, task.url, task.known, task.on_decode_error, task.shard)
    left_out = shard.index.left_out
    targets = _missing(task, shard) if len(shard) else {}
    todo = len(targets) * len(shard)
    report(0, todo)
    if not targets:
        return Outcome(shard=shard, left_out=left_out)
    runs = any(output.position is not None for outputs in targets.values() for output in outputs)
    session = open_session() if runs else None
    images = 4 * 2 * 3 * task.policy.size**2 * BLOCK  # four blocks on their way, mixed or not
    a_view = images + sum(max(output.codec.sample_bytes * BLOCK, 16 << 20) for output in task.outputs)
    done = 0

    def say(samples: int) -> None:
        nonlocal done
        done += samples
        report(done, todo)

    views, step = sorted(targets), max(1, BUFFERS // a_view)
    invalid: tuple[str, ...] = ()
    for start in range(0, len(views), step):
        chosen = {view: targets[view] for view in views[start : start + step]}
        wide: frozenset[tuple[int, str]] = frozenset()
        while True:
            try:
                invalid = ShardPass(task, shard, chosen, session, threads=threads, say=say, wide=wide).run()
                break
            except TooWide as error:  # rare: all is made again, this view of the target with f32 scales
                wide |= {(error.view, error.target)}
    written = sum(map(len, targets.values()))
    settings = session.settings if session else {}
    return Outcome(shard=shard, written=written, rendered=todo, invalid=invalid, settings=settings, left_out=left_out)


def block_views(shard: Shard, policy: Policy, number: int = 0) -> np.ndarray:
    """A block's images in view 0, uint8 [n, S, S, 3], n >= 2: what an exported graph is checked on.

    Invalid images are skipped, and nothing is mixed with them.
    """
    block = shard.index.block(number)
    views, pixels = dict.fromkeys(block, INVALID), {}
    for i, sample in zip(block, shard.read(block), strict=True):
        try:
            image = decode(sample.image)
        except BadImage:
            continue
        views[i] = draw_view(policy, sample.key, 0, image.size, i=i, block=block)
        pixels[i] = render(image, views[i], policy.size)
    mixed = [
        mix_images(pixels[i], pixels[view.mix.partner], view.mix) if view.mix else pixels[i]
        for i, view in zip(block, settle(list(views.values()), block), strict=True)
        if view.valid
    ]
    if not mixed:
        raise UserError(f"{shard.url}: none of the {len(block)} images of its block {number} can be decoded")
    return np.stack(mixed if len(mixed) > 1 else mixed * 2)
