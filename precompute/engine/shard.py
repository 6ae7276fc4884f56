"""The engine: runs an exported graph over the blocks of one shard and writes what it gives. No torch here.

`run_task` is everything that happens to one shard for one graph: read, decode, render, run, encode, write, mark. It
needs nothing but its arguments, so that any process anywhere can run it; the markers in the store are the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from precompute.engine.session import Session
from precompute.engine.stages import ShardPass, TooWide
from precompute.engine.tasks import OnDecodeError, Outcome, ReportProgress, ShardTask, TargetOutput
from storage.constants import BLOCK
from storage.errors import UserError
from storage.shards.index import ShardIndex, build_index, read_samples
from storage.shards.tar import require_whole
from storage.store.banks import bank_policy
from storage.store.markers import Marker, Task
from storage.store.store import Store
from storage.views.draw import draw_view, settle
from storage.views.mixing import mix_images
from storage.views.policy import Policy
from storage.views.render import BadImage, decode, render
from storage.views.view import INVALID

BUFFERS = 512 << 20  # bytes of targets in the making; views beyond it wait for another pass over the shard


def known_index(store: Store, url: str, known: Sequence[str], on_decode_error: OnDecodeError) -> ShardIndex:
    """The index of a shard; made, and kept in the store, where it is none of the `known` ones.

    One without samples is not kept: there is nothing in it that a store could know.

    Raises:
        UserError: as `build_index`; keys make no sample, unless those are skipped.
    """
    index = store.recognise(url, known)
    if index is None:
        index = build_index(url)
        if len(index) and (on_decode_error == "skip" or not index.left_out):
            store.add_index(index, url)
    if on_decode_error == "fail":
        require_whole(url, index.left_out)
    return index


def missing(task: ShardTask, index: ShardIndex) -> dict[int, list[TargetOutput]]:
    """View -> outputs of a task that have no marker yet.

    A damaged marker counts as none. So does one that was made from other views than the bank has now, or from views
    whose own marker is gone: it is removed.
    """
    store, shard, samples = task.store, index.id, len(index)
    wanted: dict[int, list[TargetOutput]] = {}
    for view in range(task.views):
        bank: Marker | None = None
        for output in task.outputs:
            target = Task("target", output.target, shard, view)
            marker = store.find(target, samples, output.codec)
            if marker:  # only now: the bank's marker is there before the target's
                bank = bank or store.find(Task("bank", task.bank, shard, view), samples)
                if bank and bank.bank.views_digest == marker.target.bank_views:
                    continue
                store.discard(marker)
            wanted.setdefault(view, []).append(output)
    return wanted


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
    index = known_index(task.store, task.url, task.known, task.on_decode_error)
    if not len(index):
        report(0, 0)
        return Outcome(shard=index.id, samples=0, left_out=index.left_out)
    wanted = missing(task, index)
    todo = len(wanted) * len(index)
    report(0, todo)
    if not wanted:
        return Outcome(shard=index.id, samples=len(index), left_out=index.left_out)
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
                invalid = ShardPass(task, index, some, session, threads, lambda n: report(n, todo), wide).run()
                break
            except TooWide as error:  # rare: all is made again, this view of the target with f32 scales
                wide |= {(error.view, error.target)}
    return Outcome(
        shard=index.id,
        samples=len(index),
        written=sum(map(len, wanted.values())),
        rendered=todo,
        invalid=invalid,
        settings=session.settings if session else {},
        left_out=index.left_out,
    )


def block_views(url: str, index: ShardIndex, policy: Policy, number: int = 0) -> np.ndarray:
    """A block's images in view 0, uint8 [n, S, S, 3], n >= 2: what an exported graph is checked on.

    Invalid images are skipped, and nothing is mixed with them.
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
        views.append(draw_view(policy, sample.key, 0, image.size, i, block))
        pixels.append(render(image, views[-1], policy.size))
    whole = [
        mix_images(own, pixels[view.mix.partner - block.start], view.mix) if view.mix else own
        for view, own in zip(settle(views, block), pixels, strict=True)
        if view.valid
    ]
    if not whole:
        raise UserError(f"{url}: none of the {len(block)} images of its block {number} can be decoded")
    return np.stack(whole if len(whole) > 1 else whole * 2)
