"""What a recipe says, validated: student, losses with their targets and weights, optimizer, schedule and stream.

Names are timm's where timm has one. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BeforeValidator, Discriminator, Field, model_validator

from student.losses.registry import LOSSES
from student.settings import AttentionCopyConfig, BankChoice, ConfigModel, LossConfig, StudentConfig

if TYPE_CHECKING:
    AnyLossConfig = LossConfig
else:
    AnyLossConfig = Union[tuple(loss.Config for loss in LOSSES.values())]  # noqa: UP007


def _by_name(value: Any) -> Any:
    """A loss's type is its name, unless it says another; a loss that is null is off."""
    if not isinstance(value, dict):
        return value
    losses = {name: config for name, config in value.items() if config is not None}
    return {name: {"type": name, **c} if isinstance(c, dict) else c for name, c in losses.items()}


Name = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]

Losses = Annotated[dict[Name, Annotated[AnyLossConfig, Discriminator("type")]], BeforeValidator(_by_name)]


class OptimConfig(ConfigModel):
    """timm's optimizer and schedule. `lr`, or `lr_base` for `lr_base_size` samples a batch, scaled linearly."""

    opt: str = "adamw"
    lr: float | None = Field(None, gt=0)
    lr_base: float = Field(5e-4, gt=0)
    lr_base_size: int = Field(512, ge=1)
    weight_decay: float = Field(0.05, ge=0)
    sched: Literal["cosine", "step", "multistep", "tanh", "poly"] = "cosine"
    epochs: int = Field(300, ge=1)
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    min_lr: float = Field(1e-5, ge=0)
    clip_grad: float | None = Field(None, gt=0)
    opt_betas: tuple[float, float] | None = None
    layer_decay: float | None = Field(None, gt=0, le=1)
    grad_accum_steps: int = Field(1, ge=1, description="micro-batches that each batch is split into; its size stays")


def _by_id(value: Any) -> Any:
    return {"id": value} if isinstance(value, str) else value


class StreamConfig(ConfigModel):
    """Batches and their order."""

    batch_size: int = Field(128, ge=1)
    workers: int = Field(0, ge=0)
    lanes: int | None = Field(None, ge=1)
    shuffle_blocks: int = Field(4, ge=1)
    views: int | None = Field(None, ge=1)
    memory: float | None = Field(None, gt=0, description="GiB that lanes may hold")
    bank: Annotated[BankChoice, BeforeValidator(_by_id)] = BankChoice()


class ControlConfig(ConfigModel):
    """Controls of a claim: the same run with targets that cannot know the image. One of them at most.

    permute_targets: targets of other images of the same block, by a fixed derangement of this seed.
    mean_targets: every image gets the mean target of the training set.
    """

    permute_targets: int | None = Field(None, ge=0)
    mean_targets: bool = False

    @model_validator(mode="after")
    def _one(self) -> ControlConfig:
        if self.permute_targets is not None and self.mean_targets:
            raise ValueError("permute_targets and mean_targets are both given; choose one")
        return self


class PrecisionConfig(ConfigModel):
    """How the student is computed.

    amp_dtype: `none` is float32; `auto` takes what the device computes natively, and a resumed run keeps it.
    fused_attn: `auto` is unfused for bfloat16 on a CPU, else fused.
    """

    amp_dtype: Literal["auto", "none", "bfloat16", "float16"] = "none"
    fused_attn: Literal["auto"] | bool = "auto"
    torchcompile: bool = False


class Recipe(ConfigModel):
    """A whole recipe."""

    student: StudentConfig = StudentConfig()
    losses: Losses
    attention_copy: AttentionCopyConfig | None = None
    optim: OptimConfig = OptimConfig()
    model_ema_decay: float | None = Field(None, gt=0, lt=1, description="of the averaged student; None: none is kept")
    stream: StreamConfig = StreamConfig()
    control: ControlConfig = ControlConfig()
    precision: PrecisionConfig = PrecisionConfig()
    val_interval: int = Field(1, ge=1, description="epochs between evaluations; the last one is always evaluated")
    checkpoint_interval: int | None = Field(None, ge=1, description="steps between checkpoints within an epoch")
    tensorboard: bool = False
    seed: int = Field(0, ge=0, lt=2**31)
