"""Recording teachers and targets in a store, before anything is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from precompute.engine.tasks import TargetOutput
from precompute.teachers import onnx_file
from precompute.teachers.teacher import anatomy, load_teacher
from storage.errors import DamageError, UserError, call, setting
from storage.memory import return_memory
from storage.objects.network_names import outside_timm
from storage.objects.state_dict import ONNX_FILE
from storage.store.banks import bank_manifest
from storage.store.codecs import codecs_for
from storage.store.manifests import Anatomy, TargetIdentity, TargetManifest, TeacherManifest
from storage.store.markers import FORMAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from torch import nn

    from precompute.export.pytorch import TargetDetails
    from precompute.request import PrecomputeRequest
    from precompute.taps import At
    from precompute.taps.target_spec import TargetSpec
    from precompute.teachers.teacher import Teacher
    from storage.progress import Progress
    from storage.store.codecs import Codec, CodecError
    from storage.store.store import Store
    from storage.views.policy import Policy


def known_teacher(store: Store, teacher: Teacher) -> TeacherManifest | None:
    """The teacher's manifest, where the store has it.

    Raises:
        IdentityError: the store knows another teacher under this name.
    """
    if "manifest.json" in store.objects.names(f"teachers/{teacher.name}"):
        return store.require_same(TeacherManifest, teacher.name, teacher.identity)
    return None


def defaults(manifest: TeacherManifest) -> list[TargetSpec]:
    """What a teacher is asked for when nothing is said: class rows and token of a ViT, activations of others."""
    from precompute.taps import TAPS
    from precompute.taps.target_spec import TargetSpec

    usual = [tap for tap, info in TAPS.items() if manifest.network in info.usual]
    if usual and (manifest.network != "vit" or "class" in manifest.prefix):
        return [TargetSpec(tap) for tap in usual]
    hint = f"Give {setting('target', 'TAP')}"
    raise UserError(f"teacher {manifest.id}: such a network has no default targets", hint=hint)


def record_targets(
    store: Store, request: PrecomputeRequest, policy: Policy, images: Callable[[], np.ndarray], progress: Progress
) -> dict[str, tuple[TargetOutput, ...]]:
    """Record teacher, bank and targets: graph digest -> outputs.

    All targets are exported in one graph unless the store knows all of them.

    Args:
        store: where they are recorded.
        request: teacher, targets, and where a new graph is checked.
        policy: of the bank.
        images: gives uint8 view images `[n, S, S, 3]` for the checks of a new graph.
        progress: told what is exported.

    Raises:
        IdentityError: the store knows another teacher under this name.
        UserError: a target that the teacher cannot give, or a graph that differs from the teacher.
    """
    teacher = request.teacher
    loaded: list[nn.Module] = []
    manifest = known_teacher(store, teacher)
    if manifest is None:
        if teacher.ready:
            parts = onnx_file.anatomy(str(teacher.weights))
        else:
            loaded.append(load_teacher(teacher))
            parts = anatomy(loaded[0], teacher.input_size)
            _require_readable(loaded[0], teacher, parts, request)
        manifest = store.add(teacher.manifest(parts))

    def network() -> nn.Module:
        return loaded.pop() if loaded else load_teacher(teacher)

    store.add(bank_manifest(policy))
    specs = request.targets or defaults(manifest)
    identities = _identities(store, request, manifest, specs, policy, progress.say)
    targets = {target_id(teacher, identity): identity for identity in identities}
    known = _known(store, targets)
    if len(known) < len(targets):
        # Those that are there are exported again only while nothing was made of them: a run that was killed between
        # two manifests makes the same graph again, and what is complete is not computed twice.
        begun = {task.id for task in store.done()}
        for id in sorted(begun & (targets.keys() - known.keys())):
            raise DamageError(f"{store.url}/targets/{id}/manifest.json: missing, and there are markers of this target")
        missing = {id: identity for id, identity in targets.items() if id not in begun}
        _export(store, request, missing, policy, network=network, images=images, say=progress.say)
        known = _known(store, targets)
    by_graph: dict[str, tuple[TargetOutput, ...]] = {}
    for id in targets:
        graph, _ = known[id].graph_output
        by_graph[graph] = (*by_graph.get(graph, ()), TargetOutput.of(known[id]))
    if request.store_views:
        first = next(iter(by_graph))
        by_graph[first] = (*by_graph[first], _record_pixels(store, policy))
    return by_graph


def _require_readable(network: nn.Module, teacher: Teacher, parts: Anatomy, request: PrecomputeRequest) -> None:
    """Say what a network outside timm has to be given besides, before anything is recorded of it."""
    from precompute.taps import TAPS, attention_layers

    if not outside_timm(teacher.model):
        return
    if parts.network != "vit" and any(TAPS[spec.tap].vit for spec in request.targets):
        attention_layers(network, teacher.input_size)  # raises with the reason
    for spec in request.targets:
        at = spec.at or usual_at(parts, teacher.tap_modules)
        require_kind(teacher.name, parts, spec.tap, at)
        if spec.tap == "activations" and at == "stage" and not parts.stages:
            raise _no_maps(teacher.name)


def _identities(
    store: Store,
    request: PrecomputeRequest,
    manifest: TeacherManifest,
    specs: Sequence[TargetSpec],
    policy: Policy,
    say: Callable[[str], None],
) -> list[TargetIdentity]:
    """What the targets of a run are; in the older form where an older version recorded one of them and no newer one."""
    teacher = request.teacher
    forms = [
        tuple(target_identity(teacher, manifest, spec, policy, request.grid, older=older) for older in (False, True))
        for spec in specs
    ]
    ids = [[target_id(teacher, identity) for identity in pair] for pair in forms]
    recorded = {*request.known_targets, *_known(store, [id for pair in ids for id in pair])}
    older = [pair[1] for pair in ids if pair[1] in recorded and pair[0] not in recorded]
    for id in older:
        say(f"continues {id}, which an older version began; {setting('target', 'TAP,native=true')} records native maps")
    return [pair[bool(older) and names[0] not in recorded] for pair, names in zip(forms, ids, strict=True)]


def _known(store: Store, ids: Iterable[str]) -> dict[str, TargetManifest]:
    """Id -> manifest of those that are recorded. Others are not looked at: somebody may just be adding them."""
    return {id: store.target(id) for id in ids if "manifest.json" in store.objects.names(f"targets/{id}")}


def target_identity(
    teacher: Teacher,
    manifest: TeacherManifest,
    spec: TargetSpec,
    policy: Policy,
    grid: int | None = None,
    *,
    older: bool = False,
) -> TargetIdentity:
    """What a target is hashed by; of a ready graph, whose teacher says which network it is, its tensors too.

    Args:
        teacher: of the target.
        manifest: of the teacher.
        spec: what is asked for.
        policy: of the bank.
        grid: side of activations where the spec says none; None for view size / 16.
        older: as older versions kept it where the spec does not say: maps resized, q, k and v scaled by the head.

    Raises:
        UserError: a tap or layers that the teacher does not have.
    """
    from precompute.taps import TAPS
    from precompute.taps.target_spec import layer_numbers

    info = TAPS[spec.tap]
    at = spec.at or usual_at(manifest, teacher.tap_modules)
    if manifest.network != ONNX_FILE:
        require_kind(manifest.id, manifest, spec.tap, at)
    elif not spec.tensors:
        raise UserError(f"teacher {manifest.id}: no tensor of its graph is named for {spec.tap}")
    elif spec.at not in (None, "norm"):
        chosen = f"the tensors of a ready graph are chosen by {setting('tap_tensor', 'TAP=TENSOR')}"
        raise UserError(f"teacher {manifest.id}: at={spec.at}: {chosen}")
    layers = None
    if info.layered and (spec.tap != "tokens" or spec.layers or spec.tensors):  # else after the final norm
        layers = layer_numbers(spec.layers, len(spec.tensors) or manifest.depth(spec.tap, at), manifest.id)
    default = max(1, policy.size // 16) if grid is None else grid
    grid = default if info.gridded and spec.grid is None else spec.grid
    codec = spec.codec or info.codec
    identity = TargetIdentity(teacher=teacher.id, bank=policy.bank, tap=spec.tap, layers=layers, grid=grid, codec=codec)
    # What is left out means what older stores had: their ids stay.
    more: dict[str, object] = {"at": at} if info.gridded and at != "norm" else {}
    more |= {"antialias": "all"} if spec.antialias else {}
    more |= {"native": True} if info.gridded and (not older if spec.native is None else spec.native) else {}
    more |= {"scale": "token"} if identity.scaled_by_head and not older else {}
    return identity.model_copy(update=more | ({"tensors": spec.tensors} if spec.tensors else {}))


def usual_at(anatomy: Anatomy, tap_modules: Sequence[str] = ()) -> At:
    """Where activations are read when nothing is said: as AAL reads them, of networks in which that is defined.

    Where modules are named that give the maps, of these.
    """
    return "norm" if not tap_modules and anatomy.network in ("cnn", ONNX_FILE) else "stage"


def require_kind(name: str, anatomy: Anatomy, tap: str, at: At) -> None:
    """Whether a tap is one of this kind of network; what it is made of is looked at when the tap is read.

    Raises:
        UserError: it is not.
    """
    from precompute.taps import TAPS

    hint = f"{call('teachers', 'NAME')} shows the targets of a teacher."
    if TAPS[tap].vit and anatomy.network != "vit":
        raise UserError(f"teacher {name} has no attention over all tokens of an image", hint=hint)
    if tap == "activations" and at != "stage" and anatomy.network != "cnn":
        message = f"teacher {name}: at={at} needs a CNN with stages of blocks; at=stage reads maps of any network"
        raise UserError(message, hint=hint)
    if tap == "activations" and not anatomy.depth(tap, at):
        raise _no_maps(name)


def _no_maps(name: str) -> UserError:
    """The error that no maps can be read of a teacher."""
    hint = f"Of a network that timm does not have, name the modules that give them: {setting('tap_module', 'NAMES')}"
    return UserError(f"teacher {name}: forward_intermediates gives no square maps of it", hint=hint)


def target_id(teacher: Teacher, identity: TargetIdentity) -> str:
    """`{teacher}-{tap}[-block][-antialias][-g{grid}][-native]-{codec}-{hash8}`."""
    words = [teacher.name, identity.tap, *([identity.at] if identity.at != "norm" else [])]
    words += ["antialias"] if identity.antialias else []
    words += [f"g{identity.grid}"] if identity.grid else []
    words += ["native"] if identity.native else []
    return "-".join([*words, identity.codec, identity.digest[:8]])


def _export(
    store: Store,
    request: PrecomputeRequest,
    targets: dict[str, TargetIdentity],
    policy: Policy,
    *,
    network: Callable[[], nn.Module],
    images: Callable[[], np.ndarray],
    say: Callable[[str], None],
) -> None:
    from precompute.taps import Tap

    teacher = request.teacher
    elsewhere = request.workers is not None or request.dask is not None  # this machine may have no accelerator
    provider = "auto" if elsewhere else request.provider
    taps = {id: Tap.of(identity) for id, identity in targets.items()}
    distinct = list(dict.fromkeys(taps.values()))
    say(f"exporting {teacher.name} ({teacher.model}) with {', '.join(tap.name for tap in distinct)}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "graph.onnx"
        if teacher.ready:
            from precompute.export.onnx_file import export_ready

            other = "the file run by itself"
            exported = export_ready(teacher, distinct, policy.size, images(), provider, file=file)
        else:
            from precompute.export.pytorch import export

            other = "PyTorch"
            exported = export(teacher, distinct, policy.size, images(), provider, file=file, network=network())
        return_memory()  # of the session that checked it
        graph = store.add_graph(teacher.name, file)
    for tap, parity in zip(distinct, exported.parity, strict=True):
        say(f"  graph against {other}, {tap.name}: largest difference {parity:.1e} of the largest value")
    if exported.attention_error is not None:
        say(f"  attention from the tapped q and k against the network's: {exported.attention_error:.1e}")
    for id, identity in targets.items():
        position, info = distinct.index(taps[id]), taps[id].info
        details: TargetDetails = {"sample_shape": exported.shapes[position], **exported.details[position]}
        manifest = TargetManifest(
            format=FORMAT,
            kind="target",
            id=id,
            identity=identity,
            teacher=teacher.name,
            graph=graph,
            output=position,
            maps=2 if identity.scaled_by_head else info.maps,
            axes=info.axes,
            values=info.values,
            parity=exported.parity[position],
            attention_error=exported.attention_error,
            session={**exported.session},
            **details,
        )
        codec, names = manifest.codec, dict.fromkeys([identity.codec, *codecs_for(info.values)])
        others = {name: replace(codec, name=name, maps=info.maps) for name in names} | {codec.name: codec}
        errors = {name: _codec_error(other, exported.values[position]) for name, other in others.items()}
        store.add(manifest.model_copy(update={"codec_errors": errors}))


def _codec_error(codec: Codec, values: np.ndarray) -> CodecError | None:
    """What a codec costs on a real block; None where it cannot hold the values."""
    try:
        return codec.error(values)
    except UserError:
        return None


def _record_pixels(store: Store, policy: Policy) -> TargetOutput:
    """The target of the view images themselves, of the pseudo-teacher `views`: nothing has to be decoded again."""
    identity = TargetIdentity(teacher="views", bank=policy.bank, tap="pixels", layers=None, grid=None, codec="raw")
    manifest = TargetManifest(
        format=FORMAT,
        kind="target",
        id=f"views-pixels-raw-{identity.digest[:8]}",
        identity=identity,
        teacher="views",
        graph=None,
        output=None,
        sample_shape=(policy.size, policy.size, 3),
        maps=2,
        axes=("y", "x", "channel"),
        values="plain",
        parity=None,
        attention_error=None,
        codec_errors={},
        session={},
    )
    return TargetOutput.of(store.add(manifest))
