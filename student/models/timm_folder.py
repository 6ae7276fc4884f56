"""A run's folder as timm loads it, in one line: `timm.create_model("local-dir:RUN", pretrained=True)`."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from timm.models._hub import save_config_for_hf

from storage.objects.atomic import atomic_write
from storage.views.policy import policy
from student.models.build import create
from student.run_dir import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from student.models.files import StudentDescription

# What timm's record of a model says of the network; the rest of it is about weights that timm has.
_OF_THE_NETWORK = ("architecture", "fixed_input_size", "min_input_size", "first_conv", "classifier")


def link_for_timm(run: Path, student: str, description: StudentDescription) -> None:
    """Write `config.json`, and `model.safetensors` as a link to the student's file in the same folder.

    A file system without links gets a copy.

    Args:
        run: the folder.
        student: name of the file with the weights.
        description: of a student that timm alone builds.
    """
    save_config(run / CONFIG, description)
    with atomic_write(run / WEIGHTS) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(student)
        except (OSError, NotImplementedError):
            shutil.copyfile(run / student, temporary)


def save_config(path: Path, description: StudentDescription) -> None:
    """Write timm's `config.json`: how the student is built, fed and read.

    Dropout rates are left out, as by timm itself: whoever trains it further says them.
    """
    model: Any = create(description.model, description.arguments)
    (framing, fraction), *_ = policy(description.evaluation, description.img_size).operations
    model.pretrained_cfg = {
        **{name: value for name, value in model.pretrained_cfg.items() if name in _OF_THE_NETWORK},
        "input_size": (3, description.img_size, description.img_size),
        "mean": description.mean,
        "std": description.std,
        "interpolation": "bicubic",
        "crop_pct": fraction[0] if framing == "short" else 1.0,
        "crop_mode": "center" if framing == "short" else "squash",
    }
    arguments = {name: value for name, value in description.arguments.items() if "drop" not in name}
    with atomic_write(path) as temporary:
        save_config_for_hf(model, temporary, {"label_names": description.classes}, arguments)
