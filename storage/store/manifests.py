"""Manifests of banks, teachers and targets: checked when they are read, and used as what they are here."""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, StringConstraints, field_validator, model_validator

from storage.errors import DamageError, UserError
from storage.objects import json_record, record_schema
from storage.objects.network_names import runs_nothing
from storage.objects.record_schema import LARGEST, Count, Id, Schema, Several, Sha256, Size, Three
from storage.store import codecs
from storage.store.native_maps import Matrix, NativeMaps
from storage.views.policy import OPERATIONS_VERSION, policy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Text = Annotated[str, StringConstraints(max_length=10_000)]
Weight = Annotated[float, Field(ge=-4, le=4)]  # of a resizing matrix
Antialias = bool | Literal["all"]


class Identity(Schema):
    """What makes two banks, teachers or targets the same one."""

    @property
    def digest(self) -> str:
        """Sha256 of it."""
        return json_record.digest_of(self.plain())


class Manifest(Schema):
    """What all manifests say."""

    KIND: ClassVar[str]
    format: Literal[1]
    id: Id
    identity: Identity


class BankIdentity(Identity):
    """What makes two banks the same bank: see `storage.views.policy.Policy`."""

    line: Text
    size: int
    seed: int | None
    block: Literal[64]
    operations: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _policy(self) -> Self:
        if self.operations > OPERATIONS_VERSION:  # a newer version's line; who wants views of it is told so
            return self
        try:
            policy(self.line, self.size, self.seed or 0)
        except UserError as error:
            raise ValueError(f"line, size and seed: expected those of a view policy, found {error.message}") from None
        return self


class BankManifest(Manifest):
    """A bank's manifest."""

    KIND = "bank"
    kind: Literal["bank"]
    identity: BankIdentity
    policy: Id
    columns: Several[Text]


class TeacherIdentity(Identity):
    """What makes two teachers the same teacher; `prefix` and `tap modules` are said of networks outside timm alone."""

    model: Text
    arguments: dict[str, Any]
    weights_sha256: Annotated[str, Field(alias="weights sha256", max_length=100)]
    weights_key: Annotated[Text | None, Field(alias="weights key")] = None
    input_size: Annotated[int, Field(alias="input size", ge=1, le=1 << 16)]
    mean: Three
    std: Three
    prefix: Several[Text] | None = None
    tap_modules: Annotated[Several[Text], Field(alias="tap modules")] = ()

    @field_validator("model")
    @classmethod
    def _runs_nothing(cls, model: str) -> str:
        return runs_nothing(model)


class Anatomy(Schema):
    """What a network is made of.

    Attributes:
        parameters: their number.
        network: `cnn`, with stages that AAL's readings know; `vit`, whose attention can be read; `onnx` or `other`.
        layers: stages of a CNN, attention layers of a ViT; else 0.
        heads: of a ViT, in each layer.
        prefix: of a ViT, the role of each token before the patches.
        stages: maps that timm's `forward_intermediates` gives; 0 also in what was recorded before they were read.
    """

    parameters: Annotated[int, Field(ge=0)]
    network: Text
    layers: Count
    heads: Size = 1
    prefix: Several[Text] = ()
    stages: Count = 0

    def depth(self, tap: str, at: str) -> int:
        """How many layers or stages a tap can be read of: `tokens` and maps `at` a stage of each of timm's stages."""
        of_stages = tap == "tokens" or (tap == "activations" and at == "stage")
        return self.stages or self.layers if of_stages else self.layers


class TeacherManifest(Manifest, Anatomy):
    """A teacher's manifest."""

    KIND = "teacher"
    kind: Literal["teacher"]
    identity: TeacherIdentity
    weights: Text
    classes: Several[Text] | None


class TargetIdentity(Identity):
    """What makes two targets the same target; what follows `codec` is there where it says something.

    `native` maps are kept on their own sides where these are below the grid. q, k and v in `u8` have a scale for each
    token where `scale` says so; in older stores, they have one for each head.
    """

    teacher: Text
    bank: Id
    tap: Text
    layers: Annotated[Several[Size], Field(min_length=1)] | None
    grid: Size | None
    codec: Text
    at: Text = "norm"
    antialias: Antialias = False
    tensors: Several[Text] = ()
    native: bool = False
    scale: Literal["token"] | None = None

    @property
    def scaled_by_head(self) -> bool:
        """Whether it is of q, k or v in `u8` as older versions kept them."""
        return self.tap in ("q", "k", "v") and self.codec == "u8" and not self.scale

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.layers and len({*self.layers}) < len(self.layers):
            raise ValueError(f"layers: expected each once, found {[*self.layers]}")
        if self.tensors and self.layers and max(self.layers) > len(self.tensors):
            raise ValueError(f"layers: expected at most {len(self.tensors)}, one a tensor, found {max(self.layers)}")
        return self


class Stage(Schema):
    """A stage of a network whose maps are kept.

    Attributes:
        stage: its number, from 1.
        tap: the tensor that they come from.
        channels: how many there are.
        side: of native maps, at rest.
    """

    stage: Count
    tap: Text
    channels: Size
    side: Size | None = None


def native_maps(grid: int, stages: Sequence[Stage], resize: Mapping[str, Matrix]) -> NativeMaps:
    """The sides that maps of stages have at rest, and the matrices that resize them to a grid."""
    sides = tuple((stage.channels, stage.side or grid) for stage in stages)
    matrices = tuple((int(side), matrix) for side, matrix in resize.items())
    return NativeMaps(grid=grid, stages=sides, matrices=matrices)


class Network(Schema):
    """What a target of a ready graph says of the network, in place of the teacher's manifest."""

    layers: Count
    prefix: Several[Text]
    heads: Size = 1


class TargetManifest(Manifest):
    """A target's manifest."""

    KIND = "target"
    kind: Literal["target"]
    identity: TargetIdentity
    teacher: Id
    graph: Sha256 | None
    output: Annotated[int, Field(ge=0, lt=1000)] | None
    sample_shape: Annotated[Several[Size], Field(min_length=1, max_length=6)]
    maps: Annotated[int, Field(ge=1, le=2)]
    axes: Several[Text]
    values: codecs.Values = "plain"
    parity: codecs.Error | None
    attention_error: codecs.Error | None
    codec_errors: dict[Text, codecs.CodecError | None] = Field(default_factory=dict)
    session: dict[str, Any] = Field(default_factory=dict)
    scales: Several[float] = ()
    stages: Several[Stage] = ()
    resize: dict[Text, Several[Several[Weight]]] = Field(default_factory=dict)
    network: Network | None = None

    @property
    def codec(self) -> codecs.Codec:
        """How it is kept."""
        native = native_maps(self.sample_shape[-1], self.stages, self.resize) if self.identity.native else None
        return codecs.Codec(
            self.identity.codec, self.sample_shape, self.maps, axes=self.axes, values=self.values, native=native
        )

    @property
    def sides(self) -> str:
        """Sides of maps at rest where some are below the grid, as text such as `14x14, 7x7`; else empty."""
        sides = dict.fromkeys(stage.side for stage in self.stages if self.resize)
        return ", ".join(f"{side}x{side}" for side in sides)

    @property
    def graph_output(self) -> tuple[str, int]:
        """The graph that makes it, and which of its outputs; no graph makes view images."""
        assert self.graph is not None
        assert self.output is not None
        return self.graph, self.output

    @model_validator(mode="after")
    def _values(self) -> Self:
        shape, identity = self.sample_shape, self.identity
        if len(self.axes) != len(shape) or self.maps > len(shape):
            raise ValueError(f"axes: expected {len(shape)} and at most as many in maps, found {len(self.axes)}")
        if math.prod(shape) * np.dtype(np.float32).itemsize >= LARGEST:
            raise ValueError(f"sample_shape: expected a sample below {LARGEST:,} bytes, found {[*shape]}")
        if self.axes[0] == "layer" and identity.layers and shape[0] != len(identity.layers):
            raise ValueError(f"sample_shape.0: expected {len(identity.layers)} layers, found {shape[0]}")
        if self.stages and shape[0] != sum(stage.channels for stage in self.stages):
            raise ValueError(f"stages: expected {shape[0]} channels in all, as the shape says, found others")
        if self.scales and len(self.scales) != shape[0]:
            raise ValueError(f"scales: expected {shape[0]}, one a layer, found {len(self.scales)}")
        if identity.grid and self.axes[-2:] == ("y", "x") and shape[-2:] != (identity.grid, identity.grid):
            raise ValueError(f"sample_shape: expected a grid of {identity.grid}, found {[*shape[-2:]]}")
        self._require_native()
        scaled = identity.tap in ("q", "k", "v") and identity.codec == "u8"
        if (identity.scale and not scaled) or (scaled and self.maps != (2 if identity.scaled_by_head else 1)):
            raise ValueError(f"maps: expected one scale a token or a head, as the identity says, found {self.maps}")
        if (self.graph is None) != (self.output is None):
            raise ValueError(f"output: expected a number where there is a graph and else null, found {self.output}")
        if identity.codec != "raw":
            try:
                codecs.check_codec(identity.codec)
            except UserError as error:
                message = f"identity.codec: expected a codec, found {identity.codec!r}: {error.message}"
                raise ValueError(message) from None
        return self

    def _require_native(self) -> None:
        """Native maps need a side for each stage, and for each side below the grid a matrix whose rows sum to one."""
        identity, shape = self.identity, self.sample_shape
        grid, sides = shape[-1], {stage.side for stage in self.stages}
        if not identity.native:
            if self.resize or sides - {None}:
                raise ValueError("resize: expected none, as the identity says no native maps")
            return
        if (self.axes, self.maps, self.values) != (("channel", "y", "x"), 2, "plain"):
            raise ValueError(f"axes: expected maps [channel, y, x] where they are native, found {[*self.axes]}")
        if shape[-2:] != (identity.grid, identity.grid) or identity.codec not in ("f32", "f16", "u8", "u4"):
            expected = f"native maps on their grid in f32, f16, u8 or u4, found {[*shape]} in {identity.codec}"
            raise ValueError(f"identity: expected {expected}")
        if not self.stages or not all(side and side <= grid for side in sides):
            raise ValueError(f"stages: expected the side of each stage's maps, at most {grid}, found {sides}")
        below = {str(side) for side in sides if side != grid}
        if {*self.resize} != below:
            raise ValueError(f"resize: expected a matrix for each side of {sorted(below)}, found {sorted(self.resize)}")
        for side, matrix in self.resize.items():
            if (len(matrix), {*map(len, matrix)}) != (grid, {int(side)}):
                raise ValueError(f"resize.{side}: expected {grid} rows of {side} weights, found another matrix")
            if any(abs(math.fsum(row) - 1) > 1e-5 for row in matrix):
                raise ValueError(f"resize.{side}: expected weights that sum to one in each row, found others")


M = TypeVar("M", bound=Manifest)
_COPY = "Copy the file again from where the store came from."


def load(model: type[M], data: bytes, name: str, id: str) -> M:
    """The manifest in a record's bytes; `name` is what errors call it.

    Raises:
        DamageError: it is not the manifest of this bank, teacher or target.
        UserError: a newer version wrote it.
    """
    content = json_record.from_json(data, name)
    if (content.get("kind"), content.get("id")) != (model.KIND, id):
        named = f"{content.get('kind')} {content.get('id')}"
        raise DamageError(f"{name}: damaged: expected the {model.KIND} {id}, found {reprlib.repr(named)}", hint=_COPY)
    record_schema.require_format(content, name)
    return record_schema.checked(model, content, name, _COPY)


def require_id(name: str, manifest: Manifest) -> None:
    """DamageError where the manifest of a bank or a target, `name`, is not the one that its id says."""
    digest = manifest.identity.digest[:8]
    if not manifest.id.endswith(digest):
        raise DamageError(f"{name}: damaged: identity: expected the one that its id says, found {digest}", hint=_COPY)


def require_teacher(name: str, target: TargetManifest, teacher: TeacherManifest) -> None:
    """DamageError where a target's manifest, `name`, is not the one that its id says or does not fit its teacher's."""
    require_id(name, target)
    identity, digest = target.identity, teacher.identity.digest
    wrong = ""
    if identity.teacher != digest:
        expected = f"{digest}, that of teachers/{target.teacher}/manifest.json"
        wrong = f"identity.teacher: expected {expected}, found {identity.teacher}"
    elif identity.layers and not identity.tensors and max(identity.layers) > teacher.layers:
        wrong = f"identity.layers: expected at most {teacher.layers}, found {max(identity.layers)}"
    elif "token" in target.axes:
        tokens = target.sample_shape[target.axes.index("token")]
        if "prefix" not in teacher.model_fields_set or len(teacher.prefix) > tokens:
            wrong = f"teacher: expected one that says which of {tokens} tokens come first, found {target.teacher}"
    if wrong:
        raise DamageError(f"{name}: damaged: {wrong}", hint=_COPY)
