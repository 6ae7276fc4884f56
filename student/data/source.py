"""Where a stream's samples come from: shards alone, or shards with the bank and the targets of a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    listed = [shards] if isinstance(shards, str) else shards
    if handles := [shard for shard in listed if isinstance(shard, Shard)]:
        yield from handles
        return
    known = store.shard_ids() if store is not None else []
    for url in expand([pattern for pattern in listed if isinstance(pattern, str)]):
        yield store.require(url, known) if store is not None else open_shard(url)


def refuse_twice(shards: Sequence[Shard]) -> None:
    """UserError where two shards hold the same samples."""
    urls: dict[str, str] = {}
    for shard in shards:
        if shard.id in urls:
            raise UserError(f"{shard.url} holds the same samples as {urls[shard.id]}; give each shard once")
        urls[shard.id] = shard.url


def stored(
    store: Store, shards: Sequence[Shard], targets: Sequence[str], bank: str | None, views: int | None
) -> tuple[Source, int, list[list[int]]]:
    """Shards with a bank and targets of a store; how many views are used, and the invalid samples of each shard.

    Raises:
        UserError: a target or bank that the store does not have, or targets of several banks.
        IdentityError: fewer views than were asked for, or a shard that the bank does not have as it is.
        DamageError: a marker is missing or damaged.
    """
    manifests = {target: store.target(target) for target in targets}
    banks = sorted({manifest.identity.bank for manifest in manifests.values()} | ({bank} if bank else set()))
    if len(banks) != 1:
        raise UserError(
            f"{store.url}: all targets of a training run share one bank, these name {', '.join(banks) or 'none'}"
        )
    (bank,) = banks
    policy, ids, done = bank_policy(store, bank), [shard.id for shard in shards], store.done()
    kinds: list[tuple[Kind, str]] = [("target", target) for target in targets] or [("bank", bank)]
    count = min(store.views(kind, id, ids, done, views) for kind, id in kinds)
    if views is not None and views > count:
        words = ("the store has", "asked for")
        raise IdentityError(f"{store.url}: bank {bank}", "views of each sample", count, views, words=words)
    if not count:
        first = next(iter(targets), bank)
        raise UserError(f"{store.url}: no view of {first} is there for these shards; run precompute over them first")
    markers = [store.marker(Task("bank", bank, id, 0)) for id in ids]
    for marker, shard in zip(markers, shards, strict=True):
        marker.require(len(shard))
    known = {id: manifest.identity for id, manifest in store.targets().items()}
    pixels = min((id for id, target in known.items() if (target.tap, target.bank) == ("pixels", bank)), default="")
    covered = {Task("target", pixels, id, view) for id in ids for view in range(count)} <= done
    source = Source(
        shards=tuple(shards),
        policy=policy,
        store=store,
        bank=bank,
        pixels=pixels if covered else None,
        targets={target: manifest.codec for target, manifest in manifests.items()},
    )
    return source, count, [[*marker.bank.invalid] for marker in markers]
