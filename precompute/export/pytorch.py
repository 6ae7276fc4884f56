"""Export: a teacher with its taps as one ONNX graph, checked on real images before anything is stored."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from precompute.engine.session import open_session
from precompute.taps import Tap, TappedTeacher, check_attention
from precompute.teachers.teacher import Teacher, load_teacher
from storage.errors import UserError, first_line, setting
from storage.memory import return_memory
from storage.store.manifests import Network, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from onnx import ModelProto
    from torch import Tensor, nn
    from torch.onnx import ONNXProgram

    from precompute.engine.tasks import SessionSettings
    from storage.store.native_maps import Matrix

CHECKED = 16  # images that PyTorch and the graph are compared on
_PIECE = 4  # images that PyTorch looks at together: all layers of large teachers take memory
# What to do with a teacher that cannot be exported here.
_HINT = (
    "Export the network by other means, and give that file: "
    f"{setting('teacher', 'model.onnx')} {setting('tap_tensor', 'TAP=TENSOR')}\n"
    f"  {setting('debug', True)} shows the exporter's full output."
)
PARITY = 1e-3  # largest difference of an output ÷ its largest value; 2e-5 is usual on a CPU without TF32


class TargetDetails(TypedDict, total=False):
    """What a target's manifest says of some taps alone; of native maps also their shape once they are decoded."""

    scales: tuple[float, ...]
    stages: tuple[Stage, ...]
    network: Network
    sample_shape: tuple[int, ...]
    resize: dict[str, Matrix]


def map_details(tap: Tap, stages: Sequence[tuple[int, str, int, int]]) -> TargetDetails:
    """What is said of maps: the (number, tensor, channels, side) of each stage that they come from."""
    if not tap.native:
        return {"stages": tuple(Stage(stage=n, tap=name, channels=channels) for n, name, channels, _ in stages)}
    stored_sides = [tap.stored_side(side) for *_, side in stages]
    grid = int(tap.grid or 0)
    return {
        "stages": tuple(
            Stage(stage=n, tap=name, channels=channels, side=stored_side)
            for (n, name, channels, _), stored_side in zip(stages, stored_sides, strict=True)
        ),
        "sample_shape": (sum(channels for *_, channels, _ in stages), grid, grid),
        "resize": {
            str(side): tuple(map(tuple, tap.grid_matrix(side).tolist()))
            for side in dict.fromkeys(stored_sides)
            if side < grid
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What is known of a graph's outputs, which are called after the taps' positions: `tap0`, `tap1`, …"""

    taps: tuple[Tap, ...]
    shapes: tuple[tuple[int, ...], ...]
    details: tuple[TargetDetails, ...]
    parity: tuple[float, ...]
    values: tuple[np.ndarray, ...]  # the graph's, of all images that were given
    session: SessionSettings
    attention_error: float | None


def live_teacher(
    teacher: Teacher, taps: Sequence[Tap], view_size: int, network: nn.Module | None = None
) -> TappedTeacher:
    """The PyTorch teacher with its taps: what the graph is made of and checked against.

    Args:
        teacher: which one.
        taps: what is read, in order.
        view_size: S.
        network: of the teacher, where it is loaded already and nothing reads it yet.

    Raises:
        UserError: the network does not take images of this size, or does not have these taps.
    """
    model, size = network if network is not None else load_teacher(teacher), teacher.input_size
    require_size(model, size, f"{teacher.name}: {teacher.model}")
    return TappedTeacher(model, taps, view_size, input_size=size, mean=teacher.mean, std=teacher.std).eval()


def require_size(model: nn.Module, size: int, name: str) -> None:
    """That a network takes square RGB images of a size. Raises UserError."""
    import torch

    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, size, size, device=next(model.parameters()).device))
    except Exception as error:  # networks raise anything
        raise UserError(f"{name} cannot take {size}x{size} RGB images: {first_line(error)}") from None


def read_taps(module: TappedTeacher, views: Tensor, name: str) -> tuple[list[Tensor], float | None]:
    """What a teacher's taps give of view images, and how far attention is from what the network uses, if any is tapped.

    Args:
        module: the teacher with its taps; on the meta device this gives shapes alone.
        views: uint8 `[B, S, S, 3]`, on the same device.
        name: for errors.

    Raises:
        UserError: the tapped q and k are not the attention that the network uses, or a tap gives tensors of other axes.
    """
    import torch

    error = None
    with _one_error(f"{name}: {', '.join(tap.name for tap in module.taps)} cannot be read off it"), torch.no_grad():
        pieces = torch.split(views, _PIECE)
        if module.attention is not None:
            of_pieces = (check_attention(module.model, module.prepare(piece), module.attention) for piece in pieces)
            error = max(of_pieces)
        outputs = [torch.cat(parts) for parts in zip(*map(module, pieces), strict=True)]
        _require_own_logits(module, views, outputs, name)
    for tap, output in zip(module.taps, outputs, strict=True):
        axes = ("value",) if tap.native else tap.info.axes
        if output.ndim != 1 + len(axes):
            raise UserError(
                f"{name}: its {tap.name} has the shape {tuple(output.shape[1:])} for an image; expected "
                f"[{', '.join(axes)}]"
            )
    return outputs, error


def _require_own_logits(module: TappedTeacher, views: Tensor, outputs: Sequence[Tensor], name: str) -> None:
    """That logits which are read with maps of stages are those that the network gives by itself. Raises UserError."""
    if not any(tap.at == "stage" for tap in module.taps if tap.info.gridded):
        return
    for tap, all_logits in zip(module.taps, outputs, strict=True):
        if tap.name == "logits" and not views.is_meta:
            ours, theirs = all_logits[:_PIECE], module.model(module.prepare(views[:_PIECE]))
            error = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))
            if not error <= PARITY:
                raise UserError(
                    f"{name}: its logits differ by {error:.2g} of the largest value when they are read together with "
                    "maps of stages; record them in a run of their own"
                )


def export(
    teacher: Teacher,
    taps: Sequence[Tap],
    view_size: int,
    images: np.ndarray,
    provider: str = "cpu",
    *,
    file: Path,
    network: nn.Module | None = None,
) -> Exported:
    """Export the taps of a teacher to a file and check the graph on real view images.

    The network is taken out of memory before the graph is opened.

    Args:
        teacher: which one.
        taps: what the graph gives, in order.
        view_size: S.
        images: uint8 `[n, S, S, 3]`, n >= 2; the graph is checked on the first of them.
        provider: where the graph is checked, as in `open_session`.
        file: a new ONNX file.
        network: of the teacher, as in `live_teacher`; it is of no use afterwards.

    Raises:
        UserError: the network cannot be exported, the tapped q and k are not the attention that it uses, or the graph's
            outputs differ from PyTorch's; with figures.
    """
    names = [f"tap{i}" for i in range(len(taps))]
    module = live_teacher(teacher, taps, view_size, network)
    try:
        traced = _traced(module, images, teacher.name, names, file)
    except _CannotExport as error:
        raise UserError(first_line(error), hint=_HINT) from error.__cause__
    for parameter in module.model.parameters():
        parameter.data = parameter.new_empty(0)  # the exporter remembers the last network that it saw
    return_memory()
    return _checked(traced, images, provider, teacher.name, file)


def export_student(
    model: nn.Module,
    size: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    images: np.ndarray,
    name: str,
    file: Path,
) -> None:
    """A student as a graph from uint8 view images `images` `[B, S, S, 3]` to `logits` `[B, K]`, checked on the CPU.

    One without a classifier gives its features, `embedding` `[B, D]`.

    Args:
        model: on the CPU, in eval mode.
        size: S.
        mean: of its input.
        std: of its input.
        images: uint8 `[n, S, S, 3]`, n >= 2, real ones.
        name: for errors.
        file: a new ONNX file.

    Raises:
        UserError: it cannot be exported, or what the graph gives differs from PyTorch; with figures.
    """
    gives = "logits" if getattr(model, "num_classes", 1) else "embedding"
    module = TappedTeacher(model, [Tap(gives)], size, input_size=size, mean=mean, std=std).eval()
    _checked(_traced(module, images, name, [gives], file), images, "cpu", name, file)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Traced:
    """What PyTorch says of a module whose graph was written."""

    taps: tuple[Tap, ...]
    values: tuple[np.ndarray, ...]
    details: tuple[TargetDetails, ...]
    attention_error: float | None


def _traced(module: TappedTeacher, images: np.ndarray, name: str, outputs: Sequence[str], file: Path) -> _Traced:
    """Write a module's graph; nothing of the module is kept."""
    import torch

    views = torch.from_numpy(np.ascontiguousarray(images[:CHECKED]))
    tensors, attention_error = read_taps(module, views, name)
    with _one_error(f"{name}: PyTorch cannot export it as an ONNX graph"), file.open("wb") as opened:
        opened.writelines(graph_of(module, views[:2], outputs))
    return _Traced(
        taps=module.taps,
        values=tuple(tensor.numpy() for tensor in tensors),
        details=tuple(_details(module, tap) for tap in module.taps),
        attention_error=attention_error,
    )


def _checked(traced: _Traced, images: np.ndarray, provider: str, name: str, file: Path) -> Exported:
    """Compare a graph with what PyTorch said."""
    session = open_session(file, provider)
    values = session.run(images)
    parity = tuple(compare([output[:CHECKED] for output in values], traced.values, traced.taps, name))
    return Exported(
        taps=traced.taps,
        shapes=tuple(output.shape[1:] for output in traced.values),
        details=traced.details,
        parity=parity,
        values=tuple(values),
        session=session.settings,
        attention_error=traced.attention_error,
    )


class _CannotExport(UserError):
    """A network that PyTorch does not run with its taps, or does not export."""


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Whatever networks and the exporter raise or print is one error, with the first of its causes.

    What they printed is a note of the exception, which a traceback shows.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            yield
    except UserError:
        raise
    except Exception as error:  # networks raise anything, the exporter several at once
        error.add_note(printed.getvalue())
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise _CannotExport(f"{what}: {type(cause).__name__}: {first_line(cause)}") from error


def graph_of(module: TappedTeacher, views: Tensor, outputs: Sequence[str]) -> Iterator[bytes]:
    """A teacher with its taps as an ONNX file of a free batch, in pieces, without what its nodes were traced from.

    Protocol buffers that are written one after another are one: first the graph without weights, then each of them, so
    that no more than one is in memory beside the network's own.
    """
    import onnx_ir
    from onnx import GraphProto, ModelProto

    model = program_of(module, {"images": views}, outputs).model
    weights = dict(model.graph.initializers)
    model.graph.initializers.clear()
    yield stripped(onnx_ir.to_proto(model))
    for name, value in weights.items():
        assert value.const_value is not None
        tensor = onnx_ir.to_proto(value.const_value)
        tensor.name = name
        yield stripped(ModelProto(graph=GraphProto(initializer=[tensor])))
        value.const_value = None  # as it remembers the last graph


def model_of(module: nn.Module, inputs: Mapping[str, Tensor | Sequence[Tensor]], outputs: Sequence[str]) -> ModelProto:
    """A module as an ONNX model; arguments as for `program_of`."""
    return program_of(module, inputs, outputs).model_proto


def program_of(
    module: nn.Module, inputs: Mapping[str, Tensor | Sequence[Tensor]], outputs: Sequence[str]
) -> ONNXProgram:
    """A module as an ONNX model of a free batch, whose weights are still the module's.

    Args:
        module: in eval mode.
        inputs: argument of its forward -> an example of two images or more, or several of them.
        outputs: names of what it gives.
    """
    import torch

    free = {0: torch.export.Dim("batch", min=1, max=65536)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            input_names=[name for name, value in inputs.items() if isinstance(value, torch.Tensor)],
            output_names=list(outputs),
            dynamic_shapes={
                name: free if isinstance(value, torch.Tensor) else [free] * len(value) for name, value in inputs.items()
            },
        )
    assert program is not None
    return program


def stripped(model: ModelProto) -> bytes:
    """The ONNX file's bytes, without the source paths and the like that exporters leave in them."""
    model.doc_string = ""
    del model.metadata_props[:]
    for part in (model.graph, *model.functions):
        part.doc_string = ""
        del part.metadata_props[:]
        del part.value_info[:]
        for node in part.node:
            node.doc_string = ""
            del node.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def compare(
    values: Sequence[np.ndarray], expected: Sequence[np.ndarray], taps: Sequence[Tap], name: str, other: str = "PyTorch"
) -> list[float]:
    """Largest difference between a graph's output and the expected one ÷ the largest value, for each tap.

    Raises:
        UserError: another shape, or more than `PARITY`; `name` and `other` are what errors call the two.
    """
    errors = []
    for tap, ours, theirs in zip(taps, values, expected, strict=True):
        if ours.shape != theirs.shape:
            raise UserError(f"{name}: {tap.name}: the graph gives {ours.shape}, {other} {theirs.shape}")
        errors.append(float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-12)))
        if not errors[-1] <= PARITY:
            raise UserError(
                f"{name}: {tap.name}: the exported graph differs from {other} by {errors[-1]:.2g} of the "
                f"largest value (allowed: {PARITY:g}); nothing was stored"
            )
    return errors


def _details(module: TappedTeacher, tap: Tap) -> TargetDetails:
    if tap.name in ("q", "k"):
        return {"scales": tuple(module.scales(tap))}  # softmax(q·kᵀ·scale) is the layer's attention
    return map_details(tap, module.stages(tap)) if tap.info.gridded else {}
