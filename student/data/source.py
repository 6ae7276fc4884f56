"""Where a stream's samples come from: shards by themselves, or with the bank and the targets of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from storage.errors import IdentityError, UserError
from storage.shards.index import ShardIndex, cached_index
from storage.shards.tar import without_samples
from storage.store.banks import bank_policy
from storage.store.codecs import Codec
from storage.store.markers import Kind, Task
from storage.store.store import Store
from storage.views.policy import Policy

Check = Callable[[str, ShardIndex], None]


def fresh(urls: Sequence[str], policy: Policy, check: Check) -> tuple[Source, list[int]]:
    """Shards whose views are drawn afresh, and how many samples each has. `check` sees each shard's index."""
    filled, ids, sizes = _recognise(urls, cached_index, check)
    return Source(tuple(filled), tuple(ids), policy), sizes


def _recognise(
    urls: Sequence[str], index_of: Callable[[str], ShardIndex], check: Check
) -> tuple[list[str], list[str], list[int]]:
    """Urls, ids and numbers of samples of the shards that have any; indexes are large, and read again where needed.

    Raises:
        UserError: no shard has samples.
    """
    filled, ids, sizes = [], [], []
    for url in urls:
        index = index_of(url)
        check(url, index)
        if len(index):
            filled.append(url)
            ids.append(index.id)
            sizes.append(len(index))
    if not filled:
        raise without_samples(urls)
    return filled, ids, sizes


def refuse_twice(source: Source) -> None:
    """UserError where two shards hold the same samples."""
    seen: dict[str, str] = {}
    for url, shard in zip(source.urls, source.shards, strict=True):
        if shard in seen:
            raise UserError(f"{url} holds the same samples as {seen[shard]}; give each shard once")
        seen[shard] = url


def stored(
    store: Store, urls: Sequence[str], targets: Sequence[str], bank: str | None, check: Check
) -> tuple[Source, list[int]]:
    """Shards with a bank and targets of a store, and how many samples each has.

    Raises:
        UserError: a shard, target or bank that the store does not have, or targets of several banks.
    """
    known = store.shard_ids()
    fits: dict[str, bool] = {}

    def index_of(url: str) -> ShardIndex:
        recognised = store.recognise(url, known)
        fits[url] = recognised is not None
        return recognised or store.require(url, known)

    filled, ids, sizes = _recognise(urls, index_of, check)
    manifests = {target: store.target(target) for target in targets}
    banks = sorted({manifest.identity.bank for manifest in manifests.values()} | ({bank} if bank else set()))
    if len(banks) != 1:
        raise UserError(
            f"{store.url}: all targets of a training run share one bank, these name {', '.join(banks) or 'none'}"
        )
    about = {id: manifest.identity for id, manifest in store.targets().items()}
    pixels = sorted(id for id, identity in about.items() if (identity.tap, identity.bank) == ("pixels", banks[0]))
    source = Source(
        tuple(filled), tuple(ids), bank_policy(store, banks[0]), store, banks[0], pixels[0] if pixels else None,
        {target: manifest.codec for target, manifest in manifests.items()}, tuple(fits[url] for url in filled),
    )  # fmt: skip
    return source, sizes


def usable_views(
    source: Source, sizes: Sequence[int], wanted: int | None
) -> tuple[Source, int, dict[int, frozenset[int]]]:
    """How many views are used, and the invalid samples of each shard; without pixels that do not cover the views."""
    store, bank = source.store, str(source.bank)
    assert store is not None
    done = store.done()
    each: list[tuple[Kind, str]] = [("target", target) for target in source.targets] or [("bank", bank)]
    count = min(store.views(kind, id, source.shards, done, wanted) for kind, id in each)
    if wanted is not None and wanted > count:
        raise IdentityError(f"{store.url}: bank {bank}", "views of each sample", count, wanted,
                            words=("the store has", "asked for"))  # fmt: skip
    count = wanted or count
    if not count:
        what = next(iter(source.targets), bank)
        raise UserError(f"{store.url}: no view of {what} is there for these shards; run precompute over them first")
    invalid: dict[int, frozenset[int]] = {}
    for n, (shard, size) in enumerate(zip(source.shards, sizes, strict=True)):
        marker = store.marker(Task("bank", bank, shard, 0))
        marker.require(size)
        invalid[n] = frozenset(marker.bank.invalid)
    if source.pixels and not all(
        Task("target", source.pixels, s, view) in done for s in source.shards for view in range(count)
    ):
        source = replace(source, pixels=None)
    return source, count, invalid


@dataclass(frozen=True)
class Source:
    """Where a stream's samples come from; plain data that loader workers receive.

    Attributes:
        urls: the shards.
        shards: their ids.
        policy: of the views.
        store: with the bank and the targets; None for fresh views.
        bank: id of the bank; None for fresh views, whose number is the epoch.
        pixels: id of a target with the view images themselves; they are then read and nothing is decoded.
        targets: target id -> codec.
        stored: whether the store's index fits each file; a tar with other headers is read by its own.
        permute: a control: every sample gets the targets of another one of its block, by a derangement of this seed.
    """

    urls: tuple[str, ...]
    shards: tuple[str, ...]
    policy: Policy
    store: Store | None = None
    bank: str | None = None
    pixels: str | None = None
    targets: Mapping[str, Codec] = field(default_factory=dict, hash=False)
    stored: tuple[bool, ...] = ()
    permute: int | None = None
