"""Where a stream's samples come from: shards alone, or shards with the bank and the targets of a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from storage.errors import IdentityError, UserError
from storage.shards.patterns import expand
from storage.shards.shard import Shard, open_shard
from storage.store.banks import bank_policy
from storage.store.markers import Kind, Task

if TYPE_CHECKING:
    from storage.store.codecs import Codec
    from storage.store.store import Store
    from storage.views.policy import Policy

Shards = str | Sequence[str] | Sequence[Shard]  # patterns, or shards that are open already


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a stream's samples come from; plain data that loader workers receive.

    Attributes:
        shards: those with samples.
        policy: of the views.
        store: with the bank and the targets; None for fresh views.
        bank: id of the bank; None for fresh views, whose number is the epoch.
        pixels: id of a target with the view images themselves; they are then read and nothing is decoded.
        targets: target id -> codec.
        permute: a control: every sample gets the targets of another one of its block, by a derangement of this seed.
    """

    shards: tuple[Shard, ...]
    policy: Policy
    store: Store | None = None
    bank: str | None = None
    pixels: str | None = None
    targets: Mapping[str, Codec] = field(default_factory=dict)
    permute: int | None = None

    @property
    def shard_ids(self) -> tuple[str, ...]:
        """The ids of the shards, in their order."""
        return tuple(shard.id for shard in self.shards)


def opened(shards: Shards, store: Store | None) -> Iterator[Shard]:
    """One shard after another, open: as it lies there, or as one of those that a store knows.

    Raises:
        UserError: as `expand` and `open_shard`.
        IdentityError: a shard that the store does not know, or knows with other content.
    """
    if not isinstance(shards, str) and (handles := [shard for shard in shards if isinstance(shard, Shard)]):
        yield from handles
        return
    urls = expand([shard for shard in ([shards] if isinstance(shards, str) else shards) if isinstance(shard, str)])
    known = store.shard_ids() if store is not None else []
    for url in urls:
        yield store.require(url, known) if store is not None else open_shard(url)


def refuse_twice(shards: Sequence[Shard]) -> None:
    """UserError where two shards hold the same samples."""
    urls: dict[str, str] = {}
    for shard in shards:
        if shard.id in urls:
            raise UserError(f"{shard.url} holds the same samples as {urls[shard.id]}; give each shard once")
        urls[shard.id] = shard.url


def stored(store: Store, shards: Sequence[Shard], targets: Sequence[str], bank: str | None) -> Source:
    """Shards with a bank and targets of a store.

    Raises:
        UserError: a target or bank that the store does not have, or targets of several banks.
    """
    manifests = {target: store.target(target) for target in targets}
    banks = sorted({manifest.identity.bank for manifest in manifests.values()} | ({bank} if bank else set()))
    if len(banks) != 1:
        raise UserError(
            f"{store.url}: all targets of a training run share one bank, these name {', '.join(banks) or 'none'}"
        )
    identities = {id: manifest.identity for id, manifest in store.targets().items()}
    pixels = sorted(id for id, identity in identities.items() if (identity.tap, identity.bank) == ("pixels", banks[0]))
    return Source(
        shards=tuple(shards),
        policy=bank_policy(store, banks[0]),
        store=store,
        bank=banks[0],
        pixels=pixels[0] if pixels else None,
        targets={target: manifest.codec for target, manifest in manifests.items()},
    )


def usable_views(source: Source, wanted: int | None) -> tuple[Source, int, dict[int, frozenset[int]]]:
    """How many views are used, and shard's number -> its invalid samples.

    The source comes back without `pixels` where these do not cover the views.
    """
    store, bank = source.store, source.bank
    assert store is not None
    assert bank is not None
    done = store.done()
    kinds: list[tuple[Kind, str]] = [("target", target) for target in source.targets] or [("bank", bank)]
    count = min(store.views(kind, id, source.shard_ids, done, wanted) for kind, id in kinds)
    if wanted is not None and wanted > count:
        raise IdentityError(
            f"{store.url}: bank {bank}", "views of each sample", count, wanted, words=("the store has", "asked for")
        )
    count = wanted or count
    if not count:
        first = next(iter(source.targets), bank)
        raise UserError(f"{store.url}: no view of {first} is there for these shards; run precompute over them first")
    invalid: dict[int, frozenset[int]] = {}
    for number, shard in enumerate(source.shards):
        marker = store.marker(Task("bank", bank, shard.id, 0))
        marker.require(len(shard))
        invalid[number] = frozenset(marker.bank.invalid)
    if source.pixels and not all(
        Task("target", source.pixels, id, view) in done for id in source.shard_ids for view in range(count)
    ):
        source = replace(source, pixels=None)
    return source, count, invalid
