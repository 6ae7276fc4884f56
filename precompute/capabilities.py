"""What a network could give, without its weights: taps, shapes and bytes, as the command `teachers` shows them.

Each tap is read as precompute reads it, of a network on the meta device, which takes no memory and no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from precompute.export.pytorch import map_details, read_taps, require_size
from precompute.record_targets import require_kind, usual_at
from precompute.results import GraphInput, GraphOffers, TapOffer, TeacherOffers
from precompute.taps import (
    ATTENTION,
    TAPS,
    Tap,
    TappedTeacher,
    adapt,
    attention_layers,
    create_timm_model,
    takes_image_size,
)
from precompute.teachers.onnx_file import _sizes, prefix_of, read_graph
from precompute.teachers.teacher import about_weights, anatomy, require_outside, require_said, resolve, sized
from storage.errors import UserError
from storage.objects.network_names import outside_timm
from storage.objects.state_dict import ONNX_FILE
from storage.store.codecs import Codec
from storage.store.manifests import native_maps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from storage.store.manifests import Anatomy


def offers_of(
    name: str,
    input_size: int | None = None,
    grid: int = 14,
    *,
    prefix: Sequence[str] | None = None,
    tap_modules: Sequence[str] = (),
) -> TeacherOffers:
    """What a teacher, by its short name or any timm name, can give, and what each tap would take.

    Args:
        name: a short name or any timm name.
        input_size: of its square input; by default that of its weights.
        grid: side of a CNN's activation maps.
        prefix: of a network outside timm, as in `find_teacher`.
        tap_modules: likewise.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, size, network = bare(name, input_size, prefix=prefix, tap_modules=tap_modules)
    require_size(network, size, f"{name}: {model}")
    about, parts = about_weights(model, name, sized(model, size)), anatomy(network, size)
    taps, refused, at = {}, {}, usual_at(parts, tap_modules)
    for tap, info in TAPS.items():
        try:
            read = Tap(tap, grid=grid if info.gridded else None, at=at, native=info.gridded)
            codec = _codec(network, parts, read, size, name)
        except UserError as error:
            refused[tap] = error.message
            continue
        taps[tap] = TapOffer(shape=codec.shape, codec=codec.name, bytes=codec.sample_bytes)
    return TeacherOffers(
        teacher=name,
        model=model,
        input_size=size,
        mean=about.mean,
        std=about.std,
        parameters=parts.parameters,
        network=parts.network,
        layers=parts.layers,
        stages=parts.depth("activations", at),
        taps=taps,
        refused=refused,
    )


def bare(
    name: str,
    input_size: int | None = None,
    device: str = "meta",
    *,
    prefix: Sequence[str] | None = None,
    tap_modules: Sequence[str] = (),
) -> tuple[str, int, nn.Module]:
    """timm's name, input size and network of a teacher, without its weights.

    Args:
        name: a short name or any timm name.
        input_size: of its square input; by default that of its weights.
        device: where its parameters are; on `meta` they take no memory and no time.
        prefix: of a network outside timm, as in `find_teacher`.
        tap_modules: likewise.

    Raises:
        UserError: an unknown name, or a size that the network does not take.
    """
    model, own = resolve(name)
    require_outside(model, prefix, tap_modules)
    size = input_size or own or about_weights(model, name, sized(model, input_size)).size
    outside = outside_timm(model)
    if outside:
        require_said(name, input_size=size)
    size = size or 224
    arguments = {"img_size": size} if takes_image_size(model) else {}
    with torch.device("cpu" if outside else device):  # a user's function may do anything, such as read a file
        network = create_timm_model(model, arguments, owner=f"teacher {name}")
    if outside:
        adapt(network, size=size, owner=f"teacher {name}", prefix=prefix, tap_modules=tap_modules).to(device)
    return model, size, network.eval()


def _codec(network: nn.Module, parts: Anatomy, tap: Tap, size: int, name: str) -> Codec:
    """How what a tap gives of one image is kept by default. Raises UserError where precompute refuses it."""
    if tap.name in ATTENTION:
        attention_layers(network, size)  # raises with the reason
    require_kind(name, parts, tap.name, tap.at)
    module = TappedTeacher(network, [tap], size, input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3).to("meta").eval()
    (output,), _ = read_taps(module, torch.zeros(2, size, size, 3, dtype=torch.uint8, device="meta"), name)
    shape, native, info = tuple(output.shape[1:]), None, tap.info
    if tap.native:
        details = map_details(tap, module.stages(tap))
        shape = details["sample_shape"]
        native = native_maps(shape[-1], details["stages"], details["resize"])
    return Codec(info.codec, shape, info.maps, axes=info.axes, values=info.values, native=native)


def onnx_offers_of(path: str) -> GraphOffers:
    """What a ready graph has, by the shapes that its file tells: nothing is run.

    Raises:
        UserError: as `read_graph`.
    """
    from onnx import shape_inference

    graph = read_graph(path)
    try:
        inferred = shape_inference.infer_shapes(graph.model, data_prop=True).graph
    except Exception:  # it raises many kinds on what it cannot read; shapes are then unknown
        inferred = graph.model.graph
    shapes = {value.name: _sizes(value) for value in (*inferred.value_info, *inferred.output)}
    tensors: dict[str, list[str]] = {}
    for name in graph.tensors:
        for tap in _fitting(shapes.get(name, []), (graph.before_squashing(name) or ("",))[0]):
            tensors.setdefault(tap, []).append(name)
    return GraphOffers(
        teacher=path,
        model=ONNX_FILE,
        input=GraphInput(name=graph.input, shape=_sizes(graph.model.graph.input[0]), precision=graph.precision),
        parameters=graph.parameters,
        outputs={name: shapes.get(name, []) for name in graph.outputs},
        tensors=tensors,
    )


def _fitting(shape: Sequence[int | str], squashed: str) -> list[str]:
    """Taps that a tensor of this shape may give: its first axis is the batch, which is open, and the others are not."""
    numbers = [int(size) for size in shape[1:] if isinstance(size, int)]
    if len(numbers) < len(shape) - 1 or isinstance(shape[0] if shape else 0, int):
        return []
    if len(numbers) == 1:
        return [] if squashed else ["logits", "embedding", "class_token"]
    if len(numbers) == 2 and prefix_of(numbers[0]) is not None and numbers[0] > 3:
        return ["tokens"]
    if len(numbers) == 3 and numbers[1] == numbers[2] > 1:
        return ["attention"] if squashed == "Softmax" else ["activations"]
    return []
