"""The losses by the name that recipes use as `type`."""

from __future__ import annotations

from typing import Any

from student.losses.aal import AALLoss
from student.losses.advit import ADViTLoss
from student.losses.attention_guidance import AttentionGuidanceLoss
from student.losses.attention_transfer import AttentionTransferLoss
from student.losses.base import Loss
from student.losses.compress import CompRessLoss
from student.losses.cross_entropy import CrossEntropyLoss
from student.losses.deit import DeiTLoss
from student.losses.feature_mse import FeatureMSELoss
from student.losses.head_specific import HeadSpecificLoss
from student.losses.projector_alignment import ProjectorAlignmentLoss
from student.losses.seed import SEEDLoss

LOSSES: dict[str, type[Loss[Any]]] = {
    "aal": AALLoss,
    "advit": ADViTLoss,
    "alignment": ProjectorAlignmentLoss,
    "attention": AttentionTransferLoss,
    "compress": CompRessLoss,
    "crossentropy": CrossEntropyLoss,
    "deit": DeiTLoss,
    "features": FeatureMSELoss,
    "guidance": AttentionGuidanceLoss,
    "head_specific": HeadSpecificLoss,
    "seed": SEEDLoss,
}
