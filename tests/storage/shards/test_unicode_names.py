"""Names that look alike are alike: crème is crème, whether its è is one sign (NFC) or two (NFD, as macOS writes)."""

from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from storage.errors import IdentityError, UserError
from storage.objects.weights_file import WeightsFile
from storage.shards.classes import classes_of, require_classes
from storage.shards.pack import pack
from storage.shards.shard import open_shards
from student import settings as config
from student.alignment.rules import align_classes
from student.alignment.student_spec import StudentSpec
from student.evaluation.ensemble import Classifier, ensemble_predictions
from student.models.build import build_student
from student.models.files import StudentDescription, load_student, save_student
from tests.manifests import stored
from tests.storage.helpers import by_us, class_folders, picture

if TYPE_CHECKING:
    from pathlib import Path

NFC = ["br\u00fbl\u00e9e", "cr\u00e8me"]
NFD = [unicodedata.normalize("NFD", name) for name in NFC]
assert NFC != NFD


def listed(folder: Path, names: list[str]) -> str:
    """A shard's place beside a class list."""
    folder.mkdir()
    (folder / "classes.json").write_text(json.dumps(names))
    return str(folder / "x.tar")


@pytest.mark.parametrize(("here", "there"), [(NFC, NFD), (NFD, NFC)])
def test_class_lists_in_two_spellings_are_one(tmp_path, here, there):
    a, b = listed(tmp_path / "a", here), listed(tmp_path / "b", there)
    assert classes_of([a, b]) == NFC
    require_classes([a], there)
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", {"classes": json.dumps(here)})
    assert WeightsFile(tmp_path / "w.safetensors").classes == tuple(NFC)
    with pytest.raises(IdentityError):
        require_classes([a], there[::-1])


def test_a_list_with_one_name_in_both_spellings_is_not_distinct(tmp_path):
    with pytest.raises(UserError, match="distinct"):
        classes_of([listed(tmp_path / "a", [NFC[0], NFD[0]])])


@pytest.mark.parametrize(("teacher", "student"), [(NFC, NFD), (NFD, NFC)])
def test_a_teacher_and_a_student_of_two_spellings_meet(teacher, student):
    given = stored("logits", [2], teacher={"classes": teacher})
    shape = StudentSpec(1, 1, 1, (), classes=2, names=tuple(student))
    assert "the same names" in str(align_classes("kd", given, shape, same_classes=False))


def test_pack_takes_a_list_in_another_spelling_and_refuses_two_spellings_of_a_class(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps(NFC))
    (tmp_path / "i.png").write_bytes(picture(0))
    (tmp_path / "list.csv").write_text(f"path,label\ni.png,{NFD[1]}\n")
    made = pack(str(tmp_path / "list.csv"), str(tmp_path / "out" / "x.tar")).train
    ((_, members),) = by_us(*made)
    assert members["cls"] == b"1"
    both = class_folders(tmp_path / "both", {NFC[0]: 1, NFD[0]: 1})
    if len(list(both.iterdir())) == 2:  # where the file system tells them apart
        with pytest.raises(UserError, match="the same name in different Unicode forms"):
            pack(str(both), str(tmp_path / "other" / "x.tar"))


def test_a_student_is_evaluated_on_shards_of_another_spelling(tmp_path):
    folder = class_folders(tmp_path / "images", dict.fromkeys(NFD, 2))
    made = pack(str(folder), str(tmp_path / "x.tar")).train
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 3}
    settings = config.StudentConfig(model="vit_tiny_patch16_224", **sizes)
    model, arguments = build_student(settings, 2)
    half = (0.5, 0.5, 0.5)
    for names in (NFC, NFD):
        about = StudentDescription(
            model=settings.model,
            arguments=arguments,
            img_size=32,
            mean=half,
            std=half,
            classes=tuple(names),
            evaluation="short(1)|center",
        )
        save_student(tmp_path / "s.safetensors", model, about)
        loaded, read = load_student(tmp_path / "s.safetensors")
        assert read.classes == tuple(NFC)
        found = ensemble_predictions([Classifier(name="s", model=loaded, about=read)], open_shards(made))
        assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
