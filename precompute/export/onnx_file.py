"""A ready graph with its taps as one graph: view images in, taps out, like an exported teacher's.

Before and after the file's own nodes come two small graphs that PyTorch exports: images prepared as for any teacher,
and maps brought onto their grid. What they give together must be what the file gives by itself.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import numpy as np
import onnx
import torch
from onnx import ModelProto, compose, helper, version_converter
from torch import Tensor, nn

from precompute.engine.session import Session, open_session
from precompute.export.pytorch import (
    CHECKED,
    PARITY,
    Exported,
    TargetDetails,
    compare,
    map_details,
    model_of,
    stripped,
)
from precompute.taps import Tap, TappedTeacher
from precompute.taps.registry import OF_CLASS_TOKEN
from precompute.teachers import onnx_file
from storage.errors import UserError, first_line, setting
from storage.store.manifests import Network

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from precompute.teachers.teacher import Teacher

OLDEST = 13  # operators: those that are used here are the same from this version on
ROWS = 1e-3  # how far the sum of an attention row may be from one
_INNER = "teacher-store/"  # opens the names of what is put around the file's nodes


class InputPreparation(nn.Module):
    """The file's input of view images, prepared as for every teacher."""

    def __init__(self, teacher: Teacher, graph: onnx_file.OnnxGraph, view_size: int) -> None:
        super().__init__()
        self.views = TappedTeacher(
            nn.Identity(), (), view_size, input_size=teacher.input_size, mean=teacher.mean, std=teacher.std
        )
        self.channels_last = graph.channels_last
        self.precision: torch.dtype = getattr(torch, graph.precision)

    def forward(self, images: Tensor) -> Tensor:
        """Normalized `[B, 3, I, I]`, or `[B, I, I, 3]`, of uint8 view images `[B, S, S, 3]`."""
        x = self.views.prepare(images).to(self.precision)
        return x.permute(0, 2, 3, 1) if self.channels_last else x


class OutputTaps(nn.Module):
    """The taps of the file's tensors: maps on their grid, layers stacked, all f32.

    Args:
        taps: in the order of the outputs.
        sides: tensor -> side of its maps, for those that are maps.
    """

    def __init__(self, taps: Sequence[Tap], sides: Mapping[str, int]) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.names = names_of(taps)
        for tap in taps:
            tap.add_matrices(self, (sides[name] for name in tap.chosen) if tap.info.gridded else ())

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The taps, f32 `[B, …]`, of the file's tensors in the order of `names`."""
        by_name = dict(zip(self.names, tensors, strict=True))
        outputs = []
        for tap in self.taps:
            layers = [by_name[name].float() for name in tap.chosen]
            if tap.info.gridded:
                outputs.append(tap.one_tensor(self, layers))
            else:
                outputs.append(torch.stack(layers, 1) if tap.info.layered else layers[0].clone())
        return tuple(outputs)


def names_of(taps: Sequence[Tap]) -> tuple[str, ...]:
    """The names of all tensors that taps read, each once."""
    return tuple(dict.fromkeys(name for tap in taps for name in tap.chosen))


class ReferenceRunner:
    """The file run by itself, by ONNX Runtime on the CPU, on images that PyTorch prepared: what it says, unjoined.

    Raises:
        UserError: the file is not what `ready.read` takes, lacks a tensor, or cannot be run.
    """

    def __init__(self, teacher: Teacher, taps: Sequence[Tap], view_size: int) -> None:
        self.path = str(teacher.weights)
        self.taps, self.names = tuple(taps), names_of(taps)
        self.graph = onnx_file.read_graph(self.path)
        onnx_file.require_tensors(self.graph, self.names)
        self.input = InputPreparation(teacher, self.graph, view_size).eval()
        self.model = ModelProto()
        self.model.CopyFrom(self.graph.model)
        del self.model.graph.output[:]
        self.model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names)  # types are inferred
        with _errors_of(self.path):
            self.session: Session = open_session(self.model.SerializeToString(), "cpu")
        self.output: OutputTaps | None = None  # made for the shapes that come

    def tensors(self, images: np.ndarray) -> list[np.ndarray]:
        """The file's tensors, `[n, …]` each, in the order of `names`, of uint8 view images `[n, S, S, 3]`.

        Raises:
            UserError: the file does not take the images, or gives something else for several of them.
        """
        with torch.no_grad():
            pixels = self.input(torch.from_numpy(np.ascontiguousarray(images))).numpy()
        try:
            arrays = self.session.run(pixels)
        except Exception as error:  # onnxruntime's exceptions have no common type; numpy's where batches differ
            shape = [1, *pixels.shape[1:]]
            raise UserError(f"{self.path}: it cannot be run on {len(pixels)} x {shape}: {first_line(error)}") from None
        for name, values in zip(self.names, arrays, strict=True):
            where, shape = f"{self.path}: its tensor {name}", list(getattr(values, "shape", ()))
            if not isinstance(values, np.ndarray) or values.dtype.name not in onnx_file.PRECISIONS:
                kind = values.dtype.name if isinstance(values, np.ndarray) else type(values).__name__
                raise UserError(f"{where} is {kind}; expected floating-point numbers")
            if shape[:1] != [len(images)] or not values.size:
                raise UserError(f"{where} is {shape} for {len(images)} images; expected one row each")
            if not np.isfinite(values).all():
                raise UserError(f"{where}: some of its values are not finite numbers")
        return arrays

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        """The taps, f32 `[n, …]` each. Raises UserError as `tensors`, or for tensors that are not their taps'."""
        tensors = self.tensors(images)
        if self.output is None:
            by_name = dict(zip(self.names, tensors, strict=True))
            for tap in self.taps:
                _require(self.graph, tap, by_name)
            self.output = OutputTaps(self.taps, {n: v.shape[-1] for n, v in by_name.items() if v.ndim == 4}).eval()
        with torch.no_grad():
            return [tap.numpy() for tap in self.output([torch.from_numpy(values) for values in tensors])]

    def require_free_batch(self, images: np.ndarray) -> None:
        """Raise UserError where two images together do not give what each gives by itself."""
        fixed = self.graph.batch
        why = f"; its batch is fixed at {fixed}" if fixed else ""
        hint = "Export it again with a free batch (dynamic axis 0), in evaluation mode."
        mixing = hint if fixed else "Export it again in evaluation mode: its batch is free, but it mixes the images."
        if any(node.op_type.startswith("DynamicQuantize") for node in self.graph.model.graph.node):
            mixing = (
                "It is dynamically quantized, by scales of all images of a batch together: give the file before "
                "quantization, or one that is quantized statically."
            )
        try:
            each = [self.tensors(image[None]) for image in images]
            arrays = self.tensors(images)
        except UserError as error:
            raise UserError(f"{error.message}{why}", hint=hint if fixed else error.hint) from None
        for i, (name, together) in enumerate(zip(self.names, arrays, strict=True)):
            for part, alone in zip(np.split(together, len(images)), (tensors[i] for tensors in each), strict=True):
                same = part.shape == alone.shape
                apart = float(np.abs(part - alone).max() / max(np.abs(alone).max(), 1e-12)) if same else math.inf
                if not apart <= PARITY:
                    raise UserError(
                        f"{self.path}: {name} of two images together differs from that of each alone by {apart:.2g} of "
                        f"the largest value (allowed: {PARITY:g}){why}",
                        hint=mixing,
                    )


def _require(graph: onnx_file.OnnxGraph, tap: Tap, values: Mapping[str, np.ndarray]) -> None:
    """Refuse tensors that cannot be those of a tap."""
    path = graph.path
    shapes = [values[name].shape for name in tap.chosen]
    for name, shape in zip(tap.chosen, shapes, strict=True):
        where = f"{path}: {tap.name}={name}"
        axes = tap.info.graph
        square = axes[-1] != axes[-2] or shape[-1] == shape[-2]
        if len(shape) != len(axes) or not square:
            raise UserError(f"{where}: expected [{', '.join(axes)}], found {list(shape)}")
        error = float(np.abs(values[name].astype(np.float64).sum(-1) - 1).max())
        are_rows = error <= ROWS and values[name].min() >= 0
        if tap.info.values == "rows":
            if not are_rows:
                raise UserError(
                    f"{where}: its rows are no attention: their sums differ from one by up to {error:.2g} (allowed: "
                    f"{ROWS:g}), the smallest value is {values[name].min():.2g}",
                    hint="Name the tensor after the softmax.",
                )
        else:
            _refuse_probabilities(graph, tap.name, name, are_rows and shape[-1] > 1)
    if not tap.info.gridded and len(set(shapes)) > 1:
        raise UserError(f"{path}: {tap.name}: its layers differ: {', '.join(str(list(shape)) for shape in shapes)}")


def _refuse_probabilities(graph: onnx_file.OnnxGraph, tap: str, name: str, are_rows: bool) -> None:
    """Refuse what a softmax or a sigmoid gives where a tap is something else, and name the tensor before it."""
    where, before = f"{graph.path}: {tap}={name}", graph.before_squashing(name)
    hint = "Name the tensor before the softmax."
    if before:
        tensor = setting("tap_tensor", f"{tap}={before[1]}")
        hint = f"Name the tensor before the {before[0].lower()}: {tensor}"
    if tap != "logits":
        hint = "Name another tensor."
    if are_rows:
        message = f"{where}: these are probabilities: none is negative and each row sums to one"
        raise UserError(message, hint=hint)
    if before and tap == "logits":
        raise UserError(f"{where}: these are probabilities, the output of a {before[0].lower()}", hint=hint)


def _details(path: str, tap: Tap, values: Mapping[str, np.ndarray]) -> TargetDetails:
    shape = values[tap.chosen[0]].shape
    if tap.info.gridded:
        numbers = tap.layers or range(1, len(tap.tensors) + 1)
        parts = zip(numbers, tap.chosen, strict=True)
        return map_details(tap, [(n, name, values[name].shape[1], values[name].shape[-1]) for n, name in parts])
    axes = tap.info.graph
    if "N" in axes:
        tokens = shape[axes.index("N")]
        prefix, where = onnx_file.prefix_of(tokens), f"{path}: {tap.name}={tap.chosen[0]}: {tokens} tokens are"
        if prefix is None:
            raise UserError(f"{where} no square of patches, nor one behind a class or a class and a distillation token")
        if tap.name in OF_CLASS_TOKEN and "class" not in prefix:
            raise UserError(f"{where} a square of patches without a class token, so there is no class row")
        heads = {"heads": shape[1]} if "H" in axes else {}
        return {"network": Network(layers=len(tap.tensors), prefix=tuple(prefix), **heads)}
    return {}


def export_ready(
    teacher: Teacher, taps: Sequence[Tap], view_size: int, images: np.ndarray, provider: str = "cpu", *, file: Path
) -> Exported:
    """The taps of a ready graph as one graph in a file, checked on real view images; arguments as for `pytorch.export`.

    Raises:
        UserError: the file cannot be run with any batch, its tensors are not those of their taps, or the joined graph
            gives something else than the file by itself; with figures.
    """
    alone = ReferenceRunner(teacher, taps, view_size)
    views = images[:CHECKED]
    alone.require_free_batch(views[:2])
    expected = alone(views)
    values = dict(zip(alone.names, alone.tensors(views[:2]), strict=True))
    details = tuple(_details(alone.path, tap, values) for tap in alone.taps)
    file.write_bytes(_joined(alone, views[:2]))
    with _errors_of(f"{alone.path}: joined with its taps"):
        session = open_session(file, provider)
        outputs = session.run(images)
    parity = tuple(
        compare([output[:CHECKED] for output in outputs], expected, taps, teacher.name, "the file run by itself")
    )
    return Exported(
        taps=alone.taps,
        shapes=tuple(output.shape[1:] for output in expected),
        details=details,
        parity=parity,
        values=tuple(outputs),
        session=session.settings,
        attention_error=None,
    )


def _joined(alone: ReferenceRunner, views: np.ndarray) -> bytes:
    """The bytes of one graph from `images` to `tap0`, `tap1`, …"""
    assert alone.output is not None
    outputs = [f"tap{i}" for i in range(len(alone.taps))]
    tensors = alone.tensors(views)
    first = model_of(alone.input, {"images": torch.from_numpy(np.ascontiguousarray(views))}, ["pixels"])
    last = model_of(alone.output, {"tensors": [torch.from_numpy(values) for values in tensors]}, outputs)
    with _errors_of(f"{alone.path}: cannot be joined with its taps"):
        model, version = _modern(alone.model)
        renamed = {name: f"{_INNER}file/{name}" for name in ("images", *outputs)}
        _rename(model.graph, renamed)
        names = [renamed.get(name, name) for name in alone.names]
        for part in (first, last):  # what they are made of has not changed since OLDEST
            del part.opset_import[:]
            part.opset_import.append(helper.make_opsetid("", version))
        del model.graph.output[:]
        model.graph.output.extend(
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(values.dtype), [None, *values.shape[1:]]
            )
            for name, values in zip(names, tensors, strict=True)
        )
        for part in (first, model, last):
            part.ir_version = max(first.ir_version, model.ir_version)
            del part.metadata_props[:]
        first = compose.add_prefix(first, f"{_INNER}views/", rename_inputs=False)
        last = compose.add_prefix(last, f"{_INNER}taps/", rename_outputs=False)
        own = renamed.get(alone.graph.input, alone.graph.input)
        whole = compose.merge_models(first, model, [(first.graph.output[0].name, own)])
        pairs = zip(names, (value.name for value in last.graph.input), strict=True)
        whole = compose.merge_models(whole, last, list(pairs))
        imports = {entry.domain: entry.version for entry in whole.opset_import}  # joined, it lists some twice
        del whole.opset_import[:]
        whole.opset_import.extend(helper.make_opsetid(*entry) for entry in imports.items())
    whole.graph.name = "teacher"
    return stripped(whole)


def _modern(model: ModelProto) -> tuple[ModelProto, int]:
    """A copy of a model whose operators are not too old to be joined, and their version."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for entry in copy.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    version = next((int(entry.version) for entry in copy.opset_import if not entry.domain), OLDEST)
    if version < OLDEST:
        try:
            return version_converter.convert_version(copy, OLDEST), OLDEST
        except Exception as error:  # the converter raises many kinds
            raise UserError(
                f"its operators are of version {version} and cannot be converted to {OLDEST} ({first_line(error)})",
                hint=f"Export it again with opset {OLDEST} or newer.",
            ) from None
    return copy, version


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give values of a graph, and of the graphs in its nodes, other names."""
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _rename(inner, names)


@contextlib.contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Whatever the libraries raise about a file is an error of the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # onnx and onnxruntime raise many kinds
        raise UserError(f"{where}: {first_line(error)}") from None
