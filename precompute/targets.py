"""Targets: from what people ask for (`class_row,layers=last,codec=f16`) to targets recorded in a store.

A graph is exported once for a teacher and the taps that were asked for together; from then on it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from precompute import ready
from precompute.tasks import Output
from precompute.teachers import Teacher, describe, load
from storage import codecs, records
from storage.codecs import Codec
from storage.errors import DamageError, IdentityError, UserError, nearest
from storage.policies import Policy
from storage.records import Record
from storage.store import Store
from storage.weights import READY

if TYPE_CHECKING:
    from precompute.taps import About, At

# tap -> its codec where none is asked for
_CODECS = {"activations": "u8", "logits": "f32"}
_OPTIONS = ("layers", "grid", "codec", "at", "antialias")


@dataclass(frozen=True)
class Wish:
    """One `--target`: a tap, with layers as they were written, a grid and a codec; of a ready graph its tensors.

    Activations are read `at` a stage's last norm or its last block, and resized with or without `antialias`.
    """

    tap: str
    layers: str | None = None
    grid: int | None = None
    codec: str | None = None
    tensors: tuple[str, ...] = ()
    at: At = "norm"
    antialias: bool = False


def parse(text: str) -> list[Wish]:
    """The wishes in `TAP[,TAP…][,layers=last|1:4+8][,grid=G][,codec=C]`, one for each tap.

    Activations also take `at=norm|block` and `antialias=true|false`.

    Raises:
        UserError: an unknown tap, option or codec, with the nearest known one.
    """
    try:
        return _parse(text)
    except UserError as error:
        raise UserError(f"--target {text}: {error}") from None


def _parse(text: str) -> list[Wish]:
    from precompute.taps import TAPS, check_tap

    parts = [part.strip() for part in text.split(",")]
    taps = [check_tap(part) for part in parts if "=" not in part]
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    for option in options:
        if option not in _OPTIONS:
            raise UserError(f"no option is called {option!r}. {nearest(option, _OPTIONS)}")
    if not taps:
        raise UserError(f"names no tap. {nearest('', TAPS)}")
    grid, at, antialias = _maps(taps, options)
    if "layers" in options and not all(TAPS[tap].layered for tap in taps):
        raise UserError(f"{', '.join(t for t in taps if not TAPS[t].layered)} has no layers to choose")
    codec = options.get("codec")
    if codec is not None:
        for tap in taps:
            codec = codecs.check(codec, TAPS[tap].values)
    return [Wish(tap, options.get("layers"), grid, codec, (), at, antialias) for tap in taps]


def _maps(taps: Sequence[str], options: Mapping[str, str]) -> tuple[int | None, At, bool]:
    """What is said of activations alone: `grid`, `at` and `antialias`."""
    from precompute.taps import POSITIONS

    alone = {"grid": "resized to a grid", "at": "read at a place of their own", "antialias": "resized"}
    for option, what in alone.items():
        if option in options and any(tap != "activations" for tap in taps):
            raise UserError(f"only activations are {what}")
    grid, place, antialias = options.get("grid"), options.get("at", "norm"), options.get("antialias", "false")
    if grid is not None and not re.fullmatch(r"[1-9]\d{0,2}", grid):
        raise UserError(f"grid={grid}: expected a number of patches a side, 1 to 999")
    at = next((known for known in POSITIONS if known == place), None)
    if at is None:
        raise UserError(
            f"at={place}: expected norm (a stage's last normalisation) or block (its last block, "
            "after the residual sum)"
        )
    if antialias not in ("true", "false"):
        raise UserError(f"antialias={antialias}: expected true or false")
    return None if grid is None else int(grid), at, antialias == "true"


def default_codec(tap: str) -> str:
    """The codec of a tap where none is asked for."""
    return _CODECS.get(tap, "f16")


def layer_numbers(text: str | None, count: int, what: str) -> tuple[int, ...]:
    """The layers that `last`, `3`, `1:4` or `1:4+8` names, from 1, ends included; all without a text.

    Raises:
        UserError: not such a text, or a layer that is not there.
    """
    if text is None:
        return tuple(range(1, count + 1))
    numbers: list[int] = []
    for part in text.split("+"):
        match = re.fullmatch(r"(\d{1,9})(?::(\d{1,9}))?", part)
        if part == "last":
            numbers.append(count)
        elif match:
            first, last = int(match[1]), int(match[2] or match[1])
            numbers += range(first, last + 1) if first <= last <= count else [0]  # 0 is refused below
        else:
            raise UserError(f"layers={text}: expected last, a number, a range 1:4, or several joined by +")
    if not numbers or len(set(numbers)) < len(numbers) or not all(1 <= n <= count for n in numbers):
        raise UserError(f"layers={text}: {what} has layers 1 to {count}, each named once")
    return tuple(numbers)


def known_teacher(store: Store, teacher: Teacher) -> Record | None:
    """The teacher's manifest, where the store has it.

    Raises:
        IdentityError: the store knows another teacher under this name.
    """
    if "manifest.json" in store.objects.names(f"teachers/{teacher.name}"):
        return store.add_teacher(teacher.name, teacher.identity, {})  # compares; what is there stays
    return None


def record_teacher(store: Store, teacher: Teacher) -> Record:
    """The teacher's manifest; it is loaded and described the first time.

    Raises:
        IdentityError: the store knows another teacher under this name.
    """
    if known := known_teacher(store, teacher):
        return known
    about = ready.describe(str(teacher.weights)) if teacher.ready else describe(teacher, load(teacher))
    return store.add_teacher(teacher.name, teacher.identity, about)


def defaults(manifest: Record, policy: Policy, grid: int | None = None) -> list[Wish]:
    """What a teacher is asked for when nothing is said: activations of a CNN, class rows and token of a ViT."""
    if manifest["network"] == "cnn":
        return [Wish("activations", grid=grid or max(1, policy.size // 16))]
    if manifest["network"] == "vit" and "class" in manifest["prefix"]:
        return [Wish("class_row"), Wish("class_token")]
    raise UserError(f"teacher {manifest['id']}: nothing is taken from such a network by default; say --target TAP")


def record_targets(
    store: Store,
    teacher: Teacher,
    manifest: Record,
    wishes: Sequence[Wish],
    policy: Policy,
    images: Callable[[], np.ndarray],
    provider: str,
    say: Callable[[str], None],
) -> dict[str, tuple[Output, ...]]:
    """Graph digest -> outputs, for all wishes; they are exported in one graph unless the store knows all of them.

    Args:
        store: where they are recorded.
        teacher: of the targets.
        manifest: of the teacher.
        wishes: what is asked for.
        policy: of the bank.
        images: gives uint8 view images `[n, S, S, 3]` for the checks of a new graph.
        provider: where a new graph is checked.
        say: called with lines for people.
    """
    identities = [_identity(teacher, manifest, wish, policy) for wish in wishes]
    wanted = {_id(teacher, identity): identity for identity in identities}
    known = _known(store, wanted)
    if len(known) < len(wanted):
        # Those that are there are exported again only while nothing was made of them: a run that was killed between
        # two manifests makes the same graph again, and what is complete is not computed twice.
        begun = {task.id for task in store.done()}
        for id in sorted(begun & (wanted.keys() - known.keys())):
            raise DamageError(f"{store.url}/targets/{id}/manifest.json: missing, and there are markers of this target")
        _export(store, teacher, {id: wanted[id] for id in wanted if id not in begun}, policy, images, provider, say)
        known = _known(store, wanted)
    by_graph: dict[str, tuple[Output, ...]] = {}
    for id in wanted:
        output = Output.of(known[id])
        by_graph[known[id]["graph"]] = (*by_graph.get(known[id]["graph"], ()), output)
    return by_graph


def _known(store: Store, ids: Iterable[str]) -> dict[str, Record]:
    """Id -> manifest of those that are recorded. Others are not looked at: somebody may just be adding them."""
    return {id: store.target(id) for id in ids if "manifest.json" in store.objects.names(f"targets/{id}")}


def _identity(teacher: Teacher, manifest: Record, wish: Wish, policy: Policy) -> Record:
    from precompute.taps import TAPS

    layers = None
    if manifest["network"] == READY:
        return _ready_identity(teacher, wish, policy)
    require_kind(manifest["id"], manifest, wish.tap)
    if TAPS[wish.tap].layered and (wish.tap != "tokens" or wish.layers):  # without layers: after the final norm
        layers = list(layer_numbers(wish.layers, manifest["layers"], manifest["id"]))
    return _identity_with(teacher, wish, policy, layers)


def require_kind(name: str, anatomy: Record, tap: str) -> None:
    """Whether a tap is one of this kind of network; what it is made of is looked at when the tap is read.

    Raises:
        UserError: a teacher that is neither a CNN nor a plain ViT, or the other of the two.
    """
    from precompute.taps import VIT

    needs = "vit" if tap in VIT else "cnn" if tap == "activations" else None
    if needs and not anatomy["layers"]:
        raise UserError(f"teacher {name} is neither a CNN with stages nor a plain ViT: no {tap}")
    if needs and anatomy["network"] != needs:
        raise UserError(
            f"teacher {name} is a {anatomy['network']}, {tap} needs a {needs}; what each gives: pipeline teachers NAME"
        )


def _ready_identity(teacher: Teacher, wish: Wish, policy: Policy) -> Record:
    """Of a ready graph: all tensors of the tap too, in order; of which network they are is the teacher's identity."""
    from precompute.taps import TAPS

    if not wish.tensors:
        raise UserError(f"teacher {teacher.name}: no tensor of its graph is named for {wish.tap}")
    if wish.at != "norm":
        raise UserError(f"teacher {teacher.name}: at={wish.at}: of a ready graph --tap says which tensors are read")
    layered = TAPS[wish.tap].layered
    layers = list(layer_numbers(wish.layers, len(wish.tensors), teacher.name)) if layered else None
    return {**_identity_with(teacher, wish, policy, layers), "tensors": list(wish.tensors)}


def _identity_with(teacher: Teacher, wish: Wish, policy: Policy, layers: list[int] | None) -> Record:
    grid = wish.grid
    if wish.tap == "activations" and grid is None:
        grid = max(1, policy.size // 16)
    codec = wish.codec or default_codec(wish.tap)
    # Keys that are left out mean what older stores had: their ids stay.
    variant = {**({"at": wish.at} if wish.at != "norm" else {}), **({"antialias": "all"} if wish.antialias else {})}
    return {
        "teacher": teacher.id, "bank": policy.bank, "tap": wish.tap, "layers": layers, "grid": grid, "codec": codec,
        **variant,
    }  # fmt: skip


def _id(teacher: Teacher, identity: Record) -> str:
    """`{teacher}-{tap}[-block][-antialias][-g{grid}]-{codec}-{hash8}`."""
    words = [teacher.name, identity["tap"], *([identity["at"]] if "at" in identity else [])]
    words += ["antialias"] * ("antialias" in identity)
    words += [f"g{identity['grid']}"] if identity["grid"] else []
    return "-".join([*words, identity["codec"], records.digest_of(identity)[:8]])


def _export(
    store: Store,
    teacher: Teacher,
    wanted: dict[str, Record],
    policy: Policy,
    images: Callable[[], np.ndarray],
    provider: str,
    say: Callable[[str], None],
) -> None:
    from precompute.taps import TAPS, Tap

    taps = {id: Tap.of(identity) for id, identity in wanted.items()}
    distinct = list(dict.fromkeys(taps.values()))
    say(f"exporting {teacher.name} ({teacher.model}) with {', '.join(tap.name for tap in distinct)}")
    if teacher.ready:
        from precompute.joined import export_ready as export
    else:
        from precompute.export import export
    other = "the file run by itself" if teacher.ready else "PyTorch"
    exported = export(teacher, distinct, policy.size, images(), provider)
    graph = store.add_graph(teacher.name, exported.graph)
    for tap, parity in zip(distinct, exported.parity, strict=True):
        say(f"  graph against {other}, {tap.name}: largest difference {parity:.1e} of the largest value")
    if exported.attention_error is not None:
        say(f"  attention from the tapped q and k against the network's: {exported.attention_error:.1e}")
    for id, identity in wanted.items():
        position = distinct.index(taps[id])
        tapped = TAPS[identity["tap"]]
        names = dict.fromkeys([identity["codec"], *codecs.fitting(tapped.values)])
        about = {
            "teacher": teacher.name,
            "graph": graph,
            "output": position,
            "sample_shape": list(exported.shapes[position]),
            "maps": tapped.maps,
            "values": tapped.values,
            "parity": exported.parity[position],
            "attention_error": exported.attention_error,
            "codec_errors": {name: _codec_error(name, tapped, exported.values[position]) for name in names},
            "session": exported.session,
            **exported.details[position],
        }
        store.add_target(id, identity, about)


def _codec_error(name: str, tap: About, values: np.ndarray) -> dict[str, float] | None:
    """What a codec costs on a real block; None where it cannot hold the values."""
    try:
        return Codec(name, values.shape[1:], tap.maps, tap.axes, tap.values).error(values)
    except UserError:
        return None


def record_pixels(store: Store, policy: Policy) -> Output:
    """The target of the view images themselves, of the pseudo-teacher `views`: nothing has to be decoded again."""
    identity = {
        "teacher": "views", "bank": policy.bank, "tap": "pixels", "layers": None, "grid": None, "codec": "raw",
    }  # fmt: skip
    id = f"views-pixels-raw-{records.digest_of(identity)[:8]}"
    about: Record = {
        "teacher": "views", "graph": None, "output": None, "sample_shape": [policy.size, policy.size, 3], "maps": 2,
        "axes": ["y", "x", "channel"], "values": "plain", "parity": None, "attention_error": None, "codec_errors": {},
        "session": {},
    }  # fmt: skip
    return Output.of(store.add_target(id, identity, about))


def choose_policy(
    store: Store, wanted: Policy, given: set[str], alike: set[str], exactly: Callable[[], set[str]], new_bank: bool
) -> Policy:
    """The policy of this run: what is not given comes from the bank that the shards have already.

    Args:
        store: with its banks.
        wanted: policy, size and seed, given or by default.
        given: which of `line`, `size` and `seed` were given.
        alike: ids of known shards that these may be, by their names.
        exactly: gives those that they are; it reads every file, so it is called only where it matters.
        new_bank: another bank beside the one that is there is wanted.

    Raises:
        IdentityError: the shards have views of another policy, size or seed, and no new bank was asked for.
    """
    from storage.banks import policy_of

    done = [task for task in store.done() if task.kind == "bank" and task.shard in alike]
    there = sorted({task.id for task in done})
    if not there or wanted.bank in there or new_bank:
        return wanted
    ids = exactly()
    there = sorted({task.id for task in done if task.shard in ids})
    if not there:
        return wanted
    found: list[tuple[str, object, object]] = []
    fitting: list[Policy] = []
    for id in there:
        policy = policy_of(store.bank(id))
        differs: list[tuple[str, object, object]] = [
            (field, getattr(policy, field), getattr(wanted, field))
            for field in ("line", "size", "seed")
            if field in given
            and getattr(policy, field) != getattr(wanted, field)
            and (field != "seed" or policy.random)
        ]
        if not differs:
            fitting.append(policy)
        found = found or differs
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise UserError(
            f"{store.url}: these shards have views in {len(fitting)} banks: {', '.join(p.bank for p in fitting)}; say "
            "which one by --view-policy, --view-size and --seed"
        )
    names = {"line": "view policy", "size": "view size", "seed": "seed"}
    field, expected, mine = found[0]
    raise IdentityError(
        f"{store.url}: bank {there[0]}", names[field], expected, mine,
        "All targets of a training run are of the same views, those of one bank. Leave the flag out to use the ones "
        "that are there, or make others beside them: --new-bank",
        ("the store has", "asked for"),
    )  # fmt: skip
