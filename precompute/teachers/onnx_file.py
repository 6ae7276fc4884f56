"""Ready graphs: a teacher that is a local `model.onnx`, read, looked at and refused where it cannot be one.

Nothing is run here. The file may be anybody's: what it holds is believed only once it has been run
(precompute/export/onnx_file.py).
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from storage.errors import UserError, did_you_mean, first_line, setting
from storage.objects.state_dict import ONNX_FILE
from storage.store.manifests import Anatomy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from onnx import ModelProto, NodeProto, ValueInfoProto

    from precompute.taps.target_spec import TargetSpec


LARGEST = 2**31 - 1  # bytes; protobuf reads no larger message

SQUASHED = ("Softmax", "Sigmoid")  # operators whose results are probabilities

# Operators that leave values what they are, but for their order, precision and shape.
_SAME = {"Identity", "Cast", "CastLike", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"}
_SAME |= {"QuantizeLinear", "DequantizeLinear"}

PRECISIONS = ("float32", "float16", "float64")


@dataclass(frozen=True, kw_only=True)  # no slots: it caches
class OnnxGraph:
    """A ready graph.

    Attributes:
        path: of the file.
        model: its content, with a free batch, without outputs' and inner tensors' shapes.
        input: name of its one input.
        batch: the batch that the file was made for; None where it is free.
        channels_last: whether it takes `[B, H, W, 3]` and not `[B, 3, H, W]`.
        side: of its square input; None where the file leaves it open.
        precision: of its input.
        outputs: names.
    """

    path: str
    model: ModelProto
    input: str
    batch: int | None
    channels_last: bool
    side: int | None
    precision: str
    outputs: tuple[str, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of all tensors that its nodes give, in their order."""
        return tuple(self._makers)

    @property
    def parameters(self) -> int:
        """How many numbers of its initializers are trained ones, as far as their types tell."""
        from onnx import TensorProto

        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
        return sum(math.prod(t.dims) for t in self.model.graph.initializer if t.data_type in floats)

    def before_squashing(self, name: str) -> tuple[str, str] | None:
        """The operator of `SQUASHED` that gives a tensor's values, and the tensor before it; None where none does."""
        for _ in self._makers:  # no path is longer, whatever the file says
            node = self._makers.get(name)
            if node is None or not node.input:
                return None
            if node.op_type in SQUASHED:
                return node.op_type, node.input[0]
            if node.op_type not in _SAME:
                return None
            name = node.input[0]
        return None

    @functools.cached_property
    def _makers(self) -> dict[str, NodeProto]:
        return {name: node for node in self.model.graph.node for name in node.output if name}


def is_onnx_file(name: str) -> bool:
    """Whether a teacher's name is that of a file with a graph, and not of a network of timm."""
    return name.endswith(".onnx")


def read_graph(path: str) -> OnnxGraph:
    """The graph in a file.

    Raises:
        UserError: it cannot be read, is not an ONNX file, keeps tensors in other files, or does not take one batch of
            square RGB images of floating-point numbers.
    """
    from precompute.engine.session import parsed

    try:
        file = Path(path).expanduser()
        size = file.stat().st_size
        if size > LARGEST:
            raise UserError(f"{path}: it has {size:,} bytes; one ONNX file holds at most {LARGEST:,}")
        model = parsed(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {first_line(error)}", setting=setting("teacher", path)) from None
    except UserError as error:
        raise UserError(f"{path}: {error.message.removeprefix(f'{path}: ')}", hint=error.hint) from None
    if not model.graph.node:
        raise UserError(f"{path}: it is not an ONNX file with a graph")
    weights = {tensor.name for tensor in model.graph.initializer}  # old files list them among the inputs
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs) or "none"
        raise UserError(f"{path}: it has {len(inputs)} inputs ({names}); expected one, a batch of images")
    outputs = tuple(value.name for value in model.graph.output)
    batch, side, last, precision = _input(path, inputs[0])
    for i in reversed(range(len(model.graph.input))):
        if model.graph.input[i].name in weights:
            del model.graph.input[i]
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    first.dim_param = first.dim_param or "batch"
    del model.graph.value_info[:]  # shapes in it may be those of another batch
    return OnnxGraph(
        path=path,
        model=model,
        input=inputs[0].name,
        batch=batch,
        channels_last=last,
        side=side,
        precision=precision,
        outputs=outputs,
    )


def _input(path: str, value: ValueInfoProto) -> tuple[int | None, int | None, bool, str]:
    """Batch and side, None where they are free; whether channels come last; the precision."""
    from onnx import TensorProto

    where = f"{path}: its input {value.name}"
    tensor = value.type.tensor_type
    known = value.type.HasField("tensor_type") and tensor.elem_type in TensorProto.DataType.values()
    kind = TensorProto.DataType.Name(tensor.elem_type).lower() if known else "no tensor of a known type"
    precision = {"float": "float32", "double": "float64"}.get(kind, kind)
    if precision not in PRECISIONS:
        raise UserError(f"{where} is {kind}; expected normalized images: {', '.join(PRECISIONS)}")
    dims = [dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim]
    shape = f"[{', '.join(map(str, _sizes(value)))}]"
    if len(dims) != 4:
        raise UserError(f"{where} is {shape}; expected a batch of RGB images, [B, 3, H, W] or [B, H, W, 3]")
    last = dims[1] != 3 and dims[3] == 3
    if not last and dims[1] not in (None, 3):
        raise UserError(f"{where} is {shape}; expected three channels, [B, 3, H, W] or [B, H, W, 3]")
    sides = {side for side in (dims[1:3] if last else dims[2:]) if side is not None}
    if len(sides) > 1:
        raise UserError(f"{where} is {shape}; teachers take only square images")
    return dims[0], next(iter(sides), None), last, precision


def require_tensors(graph: OnnxGraph, names: Sequence[str]) -> None:
    """Raise UserError for a name that no node of the graph gives, with the nearest ones."""
    known = dict.fromkeys(graph.tensors)
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 3, 0.5) or graph.outputs
            raise UserError(f"{graph.path}: no tensor is called {name!r}", hint=did_you_mean(name, close))


def named_outputs(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Tap -> names of its tensors, from texts such as `TAP=TENSOR`.

    Raises:
        UserError: not such a text, or an unknown tap, with the nearest one.
    """
    from precompute.taps import check_tap

    tensors: dict[str, tuple[str, ...]] = {}
    for text in texts:
        tap, equals, tensor = text.partition("=")
        if not equals or not tensor:
            raise UserError("expected TAP=TENSOR, such as logits=output", setting=setting("tap_tensor", text))
        tensors[check_tap(tap)] = (*tensors.get(tap, ()), tensor)
    return tensors


def given_tensors(path: str, tensors: Mapping[str, Sequence[str]], specs: Sequence[TargetSpec]) -> list[TargetSpec]:
    """The targets with the tensors that give their taps.

    Args:
        path: of the ready graph.
        tensors: tap -> names of its tensors, a layer each.
        specs: what is asked for.

    Raises:
        UserError: a tap that a ready graph cannot give, one without tensors, or tensors that the graph lacks.
    """
    from precompute.taps import TAPS, check_tap

    graph = read_graph(path)
    outputs = f"its outputs: {', '.join(graph.outputs) or 'none'}"
    if not tensors:
        general, example = setting("tap_tensor", "TAP=TENSOR"), setting("tap_tensor", f"logits={_logits(graph)}")
        raise UserError(
            f"{path}: a graph does not say what its tensors mean; {outputs}",
            hint=f"Name them by {general}, such as {example}",
        )
    for tap, names in tensors.items():
        if not TAPS[check_tap(tap)].graph:
            raise UserError(
                f"{path}: {tap}: a ready graph gives no q, k and v: it is unknown whether they give the attention that "
                "the network uses",
                hint=f"Name its rows instead (after the softmax): {setting('tap_tensor', 'attention=TENSOR')}",
            )
        if len(names) > 1 and not TAPS[tap].layered:
            raise UserError(f"{path}: {tap} is one tensor, {len(names)} are named: {', '.join(names)}")
        if len(set(names)) < len(names):
            raise UserError(f"{path}: {tap}: a tensor is named twice: {', '.join(names)}")
        require_tensors(graph, names)
    for spec in specs:
        if not tensors.get(spec.tap):
            hint = f"Name one by {setting('tap_tensor', f'{spec.tap}=TENSOR')}"
            raise UserError(f"{path}: {spec.tap} has no tensor; {outputs}", hint=hint)
    return [replace(spec, tensors=tuple(tensors[spec.tap])) for spec in specs]


def _logits(graph: OnnxGraph) -> str:
    """The tensor that is likely to be a classifier's: the first output, or what it is the softmax of."""
    first = (*graph.outputs, "output")[0]
    before = graph.before_squashing(first)
    return before[1] if before else first


def anatomy(path: str) -> Anatomy:
    """What a ready graph is made of, as a teacher: taps say their layers by themselves."""
    return Anatomy(parameters=read_graph(path).parameters, network=ONNX_FILE, layers=0)


def prefix_of(tokens: int) -> list[str] | None:
    """Roles of the prefix tokens beside a square of patches; None where there is no such square."""
    for roles in ([], ["class"], ["class", "distillation"]):
        side = round((tokens - len(roles)) ** 0.5) if tokens > len(roles) else 0
        if side and side * side == tokens - len(roles):
            return roles
    return None


def _sizes(value: ValueInfoProto) -> list[int | str]:
    """Sizes of its axes; the name, or `?`, of those that are open."""
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in value.type.tensor_type.shape.dim]
