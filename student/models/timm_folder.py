"""A run's folder as timm loads it, in one line: `timm.create_model("local-dir:RUN", pretrained=True)`."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import timm

from storage.objects.atomic import atomic_write
from student.run_dir import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from student.models.files import StudentDescription

# What timm's record of a model says of the network; the rest of it is about weights that timm has.
_OF_THE_NETWORK = ("fixed_input_size", "min_input_size", "first_conv", "classifier")


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
    registered, size = timm.get_pretrained_cfg(description.model), description.img_size
    (framing, fraction), *_ = description.evaluation_policy.operations
    pretrained_cfg = {
        **{name: getattr(registered, name) for name in _OF_THE_NETWORK if registered is not None},
        "input_size": (3, size, size),
        "mean": description.mean,
        "std": description.std,
        "interpolation": "bicubic",
        "crop_pct": fraction[0] if framing == "short" else 1.0,
        "crop_mode": "center" if framing == "short" else "squash",
    }
    config = {
        "architecture": description.model.partition(".")[0],
        "num_classes": description.arguments["num_classes"],
        "label_names": description.classes,
        "model_args": {name: value for name, value in description.arguments.items() if "drop" not in name},
        "pretrained_cfg": pretrained_cfg,
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(config, indent=2))
