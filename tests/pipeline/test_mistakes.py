"""A tour of a newcomer's mistakes through the real command line. Contract 13: each ends in one message that says what
is wrong, where, and what to do; exit status 1, or 2 for usage; no traceback; what was complete stays as it was.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.cli import cli, main
from storage.testing import TINY_CNN, synthetic_image, synthetic_shards
from storage.views import generator
from tests.student.runs import ROOT, STUDENT

SHORT = {
    "@DATA": "--shards 'shard-{000000..000001}.tar' --val shard-000001.tar",
    "@SMALL": " ".join(f"--set {setting}" for setting in STUDENT),
    "@CNN": f"--teacher {TINY_CNN[0]} --weights cnn.safetensors --teacher-arg num_classes=3 --mean 0.5 --std 0.5 "
    + " ".join(f"--teacher-arg '{name}={value}'" for name, value in TINY_CNN[1].items()),
}


class Mistake(NamedTuple):
    """What is typed, and what the message has to say: what, where, and the way out."""

    name: str
    typed: str
    says: tuple[str, ...]
    status: int = 1


# Each once in a process of its own, as people run it; all others in this process, where that is the same.
AS_TYPED = [
    Mistake("a typo in a command", "precompue --store S", ("'precompue'", "Did you mean 'precompute'?"), 2),
    Mistake(
        "class folders in place of shards",
        "precompute --teacher mobilenetv2 --weights cnn.safetensors --shards photos --store new/S",
        ("photos is a folder of class folders (18 images)", "pipeline pack photos photos-000000.tar --val-fraction 0.1",
         "give --shards photos-000000.tar"),
    ),
    Mistake(
        "no way to timm's hub",
        "precompute --teacher mobilenetv2 --shards shard-000000.tar --store new/S --view-size 32",
        ("teacher mobilenetv2_100", "cannot be had from timm's hub", "Give a file: --weights F"),
    ),
    Mistake(
        "training before precompute",
        "train --recipe aal @DATA --store new/S --out new/run @SMALL",
        ("new/S: there is no store here", "`pipeline precompute` makes one"),
    ),
]  # fmt: skip

MISTAKES = [
    # ---------------------------------------------------------------------------------------- words and flags
    Mistake("links of what is no run", "links nowhere", ("nowhere: no links here", "a complete run with an aal loss")),
    Mistake("a typo in an option", "train --recipie aal", ("'--recipie'", "Did you mean '--recipe'?"), 2),
    Mistake("no recipe", "train", ("'--recipe'", "`pipeline recipes` lists them"), 2),
    Mistake(
        "validation shards forgotten", "train --recipe scratch --shards shard-000000.tar --out new/run",
        ("'--val'", "`pipeline pack … --val-fraction 0.1`"), 2,
    ),
    Mistake("shards forgotten", "plan --teacher vit_tiny --store S", ("'--shards'", "`pipeline pack` makes them"), 2),
    Mistake("store forgotten", "inspect", ("'--store'", "the folder that `pipeline precompute` makes"), 2),
    Mistake(
        "new shards without quotes", "pack photos new/t-000000.tar new/t-000001.tar new/t-000002.tar",
        ("a folder or a CSV is packed alone", "one pattern in quotes", "'train-{000000..000009}.tar'"), 2,
    ),
    Mistake(
        "a pattern without quotes", "plan --teacher vit_tiny --store new/S --shards shard-000000.tar shard-000001.tar",
        ("unexpected extra argument (shard-000001.tar)", "one pattern in quotes"), 2,
    ),
    Mistake("names of new shards forgotten", "pack photos", ("name the new shards, such as: pipeline pack photos",), 2),
    Mistake(
        "a word for a number", "precompute --teacher vit_tiny --shards shard-000000.tar --store new/S --view-size big",
        ("'--view-size'", "'big'"), 2,
    ),
    Mistake("a typo in a recipe", "train --recipe all @DATA --out new/run", ("'all'", "Did you mean 'aal'?")),
    Mistake(
        "a recipe file that is not there", "train --recipe my.yaml @DATA --out new/run",
        ("my.yaml: no such recipe file", "pipeline recipes aal > my.yaml"),
    ),
    Mistake(
        "a typo in --set", "train --recipe scratch @DATA --out new/run --set optim.epohcs=3",
        ("optim.epohcs", "Did you mean 'epochs'?"),
    ),
    Mistake(
        "--set with a value of another type", "train --recipe scratch @DATA --out new/run --set stream.batch_size=lots",
        ("stream.batch_size", "valid integer", "'lots'"),
    ),
    Mistake(
        "a setting without its section", "train --recipe scratch @DATA --out new/run --set epochs=3",
        ("--set: epochs: no such setting", "Did you mean 'optim.epochs'?"),
    ),
    Mistake(
        "a section for a setting", "train --recipe scratch @DATA --out new/run --set optim=adam",
        ("optim: should be a mapping of settings (name: value), found 'adam'",),
    ),
    Mistake(
        "--set without a value", "train --recipe scratch @DATA --out new/run --set optim.epochs",
        ("--set optim.epochs", "NAME=VALUE, such as --set optim.epochs=50"),
    ),
    # ---------------------------------------------------------------------------------------- images into shards
    Mistake("a folder that is not there", "pack fotos new/x-000000.tar", ("fotos: no such folder", "a class")),
    Mistake("an empty folder", "pack empty new/x-000000.tar", ("empty: no images found", "empty/CLASS/IMAGE.{jpg,")),
    Mistake(
        "images without class folders", "pack photos/cat new/x-000000.tar",
        ("photos/cat: its 6 images lie in no class folder", "photos/cat/CLASS/IMAGE.{jpg,", "or a CSV"),
    ),
    Mistake(
        "photos of a telephone", "pack heic new/x-000000.tar",
        ("heic/cat: a class folder without images", "1.heic is none of jpg, jpeg, png, webp", "convert it"),
    ),
    Mistake(
        "training and validation images in one folder", "pack parts new/x-000000.tar",
        ("parts: train, val are parts of a data set and no classes", "\n  pipeline pack parts/train train-000000.tar",
         "\n  pipeline pack parts/val val-000000.tar"),
    ),
    Mistake("init on the same", "init parts --out new/p.yaml", ("parts: train, val are parts of a data set",)),
    Mistake("init on photos of a telephone", "init heic --out new/p.yaml", ("heic: neither shards nor images",)),
    Mistake("init on a class without images", "init gap --out new/p.yaml", ("gap/none: a class folder without im",)),
    Mistake("init on one class", "init alone --out new/p.yaml", ("alone: ", "cat is one class alone", "two classes")),
    Mistake("a shard without .tar", "pack photos new/train", ("new/train", "NAME.tar", "'train-{000000..000009}.tar'")),
    Mistake("a star in a new name", "pack photos 'new/t-*.tar'", ("new/t-*.tar", "'train-{000000..000009}.tar'")),
    Mistake("a bench nowhere", "bench --folder nowhere", ("--folder nowhere: no such folder",)),
    Mistake("percent for a fraction", "pack photos new/x.tar --val-fraction 10", ("--val-fraction 10", "0.1 is a")),
    Mistake(
        "more shards than images", "pack photos 'new/x-{000000..000099}.tar'",
        ("18 samples cannot fill 100 shards", "fewer names"),
    ),
    Mistake(
        "a shard that is there", "pack photos shard-000000.tar",
        ("shard-000000.tar: is there already", "Give other names"),
    ),
    Mistake(
        "shards of other classes in one folder", "pack photos x-000000.tar",
        ("./classes.json: is there already with other classes", "such as new/x-000000.tar"),
    ),
    Mistake(
        "a place that cannot be written to", "pack photos shard-000000.tar/x/y-000000.tar",
        ("shard-000000.tar/x", "Not a directory", "give another path"),
    ),
    Mistake("init on an empty folder", "init empty", ("empty: neither shards nor images", "empty/CLASS/IMAGE.{jpg,")),
    Mistake("init on no folder", "init fotos", ("fotos: no such folder", "one folder of images a class")),
    # ---------------------------------------------------------------------------------------- naming shards
    Mistake(
        "a pattern that matches nothing", "train --recipe scratch --shards 'sahrd-*.tar' --val x.tar --out new/run",
        ("sahrd-*.tar: no file matches", "Did you mean 'shard-000000.tar'?"),
    ),
    Mistake(
        "a pattern for more than there is",
        "train --recipe scratch --shards 'shard-{000000..000009}.tar' --val x.tar --out new/run",
        ("shard-000002.tar: no such shard", "2 of its 10 names are there, the last is 'shard-000001.tar': let"),
    ),
    Mistake(
        "shards with a comma", "evaluate run --shards shard-000000.tar,shard-000001.tar",
        ("shard-000000.tar,shard-000001.tar: no such shard", "joined by ::"),
    ),
    Mistake(
        "braces that do not close", "train --recipe scratch --shards 'shard-{0..1.tar' --val x.tar --out new/run",
        ("shard-{0..1.tar", "do not close", "{000000..000009}"),
    ),
    Mistake(
        "an image in place of shards", "evaluate run --shards photos/cat/1.jpg",
        ("photos/cat/1.jpg is an image", "pipeline pack photos photos-000000.tar"),
    ),
    Mistake(
        "one class folder in place of shards", "evaluate run --shards photos/cat",
        ("photos/cat is a folder of images", "pipeline pack photos train-000000.tar"),
    ),
    Mistake(
        "validation shards of other classes",
        "train --recipe scratch --shards shard-000000.tar --val other/val-000000.tar --out new/run @SMALL",
        ("other/classes.json: classes: expected 3 (class0,", "found 5 (class0,", "pipeline pack … --val-fraction"),
    ),
    Mistake(
        "one class alone", "train --recipe scratch --shards one/one.tar --val one/one.tar --out new/run @SMALL",
        ("one/one.tar: one class alone", "pack a folder for each"),
    ),
    # ---------------------------------------------------------------------------------------- teachers and stores
    Mistake(
        "a typo in a teacher", "precompute --teacher mobilnetv2 --shards shard-000000.tar --store new/S",
        ("'mobilnetv2'", "Did you mean 'mobilenetv2'?"),
    ),
    Mistake(
        "weights of another network",
        "precompute --teacher mobilenetv2 --weights vit.safetensors --shards shard-000000.tar --store new/S",
        ("teacher mobilenetv2: vit.safetensors: does not fit", "262 missing", "--teacher-arg NAME=VALUE"),
    ),
    Mistake(
        "weights that are none",
        "precompute --teacher mobilenetv2 --weights photos/cat/1.jpg --shards shard-000000.tar --store new/S",
        ("photos/cat/1.jpg: not a file of weights", "safetensors"),
    ),
    Mistake(
        "weights that are not there",
        "precompute --teacher mobilenetv2 --weights w.safetensors --shards shard-000000.tar --store new/S",
        ("--weights w.safetensors", "No such file"),
    ),
    Mistake(
        "an argument that a teacher does not take",
        "precompute @CNN --teacher-arg chanels=3 --shards shard-000000.tar --store new/S",
        ("teacher resnet10t", "cannot be made", "'chanels'"),
    ),
    Mistake(
        "an input that is no multiple of the patches",
        "precompute --teacher vit_tiny --weights vit.safetensors --input-size 30 --shards shard-000000.tar "
        "--store new/S",
        ("teacher vit_tiny", "30 pixels", "patches of 16", "--input-size 32"),
    ),
    Mistake(
        "attention of a CNN", "precompute @CNN --target attention --shards shard-000000.tar --store new/S",
        ("is a cnn, attention needs a vit", "pipeline teachers NAME"),
    ),
    Mistake(
        "a store that is a folder of photos", "precompute @CNN --shards shard-000000.tar --store photos",
        ("photos: there is something else in this folder", "give a new folder"),
    ),
    Mistake(
        "a store that is a file", "precompute @CNN --shards shard-000000.tar --store shard-000000.tar",
        ("shard-000000.tar: not a folder, so not a store", "--store DIR"),
    ),
    Mistake("a store that is an empty folder", "inspect --store empty", ("empty: there is no store", "precompute")),
    Mistake("an empty name for a store", "inspect --store ''", ("'--store'", "give a folder or an fsspec URL"), 2),
    Mistake(
        "weights with other classes",
        "precompute --teacher resnet10t --weights cnn.safetensors --teacher-arg 'channels=[8,12,16,24]' "
        "--teacher-arg stem_width=8 --shards shard-000000.tar --store new/S",
        ("cnn.safetensors: does not fit resnet10t: fc.weight has shape", "--teacher-arg num_classes=3"),
    ),
    Mistake(
        "a typo in a target", "precompute @CNN --target activation --shards shard-000000.tar --store new/S",
        ("--target activation:", "Did you mean 'activations'?"),
    ),
    Mistake(
        "a codec of another tap", "precompute @CNN --target logits,codec=log8 --shards shard-000000.tar --store new/S",
        ("--target logits,codec=log8:", "class_row, attention; use f32, f16"),
    ),
    Mistake(
        "a store without its root", "inspect --store rootless",
        ("rootless/zarr.json: missing", "the same in all stores: copy it"),
    ),
    Mistake(
        "shards that were not precomputed",
        "train --recipe aal --shards other/val-000000.tar --val other/val-000000.tar --store S --out new/run @SMALL",
        ("other/val-000000.tar: shard: the store S has shard-000000-", "this is val-000000-", "pipeline precompute"),
    ),
    Mistake(
        "views of another size", "precompute @CNN --shards shard-000000.tar --store S --view-size 64 --as another",
        ("S: bank light-32-", "view size: the store has 32, asked for 64", "--new-bank"),
    ),
    Mistake(
        "the name of a recorded teacher for another",
        "precompute @CNN --shards shard-000000.tar --store S --as vit",
        ("teacher 'vit'", "the store has", "asked for", "--as vit-2"),
    ),
    Mistake(
        "a scheduler that does not run", "precompute @CNN --shards shard-000000.tar --store new/S --dask nonsense",
        ("--dask nonsense", "no scheduler answers", "`dask scheduler`"),
    ),
    # ---------------------------------------------------------------------------------------- training
    Mistake(
        "targets without a store", "train --recipe aal @DATA --out new/run @SMALL",
        ("aal needs stored targets (activations)", "--store DIR", "`pipeline precompute --teacher NAME --target"),
    ),
    Mistake(
        "a teacher that has no such target",
        "train --recipe attention-distill @DATA --store S --out new/run @SMALL --set losses.attention.teacher=cnn",
        ("stored q: losses.attention.teacher: asked for cnn, the store has vit", "Take one of these"),
    ),
    Mistake(
        "a student with other patches than the store's grid",
        "train --recipe aal @DATA --store S --out new/run @SMALL --set student.patch_size=8",
        ("patches a side: the student has 4, the store has 8", "activations,grid=4", "--set student.patch_size"),
    ),
    Mistake(
        "shards that have changed since", "train --recipe aal --shards changed/shard-000001.tar --val shard-000001.tar "
        "--store S --out new/run @SMALL",
        ("changed/shard-000001.tar", "are known in this store under other shards", "run `pipeline precompute`"),
    ),
    Mistake(
        "logits of other classes",
        "train --recipe deit-soft --shards five/shard-000000.tar --val five/shard-000001.tar --store S "
        "--out new/run @SMALL --same-classes",
        ("number of classes: the student has 5, the teacher 3", "pipeline fit-teacher"),
    ),
    Mistake(
        "a student without a class token", "train --recipe advit-l1 @DATA --store S --out new/run @SMALL "
        "--set losses.advit.layers=last --set student.model=vit_base_patch16_siglip_gap_224 "
        "--set student.global_pool=avg",
        ("advit: the student has no class token", "take one that has"),
    ),
    Mistake(
        "a typo in the student", "train --recipe scratch @DATA --out new/run @SMALL --set student.model=vit_tiny",
        ("timm has no 'vit_tiny'", "Did you mean 'vit_tiny_patch16_224'?"),
    ),
    Mistake(
        "a CNN for a student", "train --recipe scratch @DATA --out new/run @SMALL --set student.model=resnet18",
        ("student resnet18", "cannot be made", "--set student.model=vit_tiny_patch16_224"),
    ),
    Mistake(
        "an image size that is no multiple of the patches",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.img_size=30",
        ("img_size 30 is no multiple of the patch size 4", "--set student.img_size="),
    ),
    Mistake(
        "a batch larger than the data",
        "train --recipe scratch @DATA --out new/run @SMALL --set stream.batch_size=1024",
        ("300 samples are fewer than one batch of 1024", "--set stream.batch_size=256"),
    ),
    Mistake(
        "a batch that cannot be cut", "train --recipe scratch @DATA --out new/run @SMALL --set stream.batch_size=30",
        ("batch size 30", "stream.lanes", "--set stream.batch_size=32"),
    ),
    Mistake(
        "too large a learning rate", "train --recipe scratch @DATA --out new/run @SMALL --set optim.lr=1000",
        ("the loss is not finite", "--set optim.lr=X", "--set optim.clip_grad=1"),
    ),
    Mistake(
        "a damaged store", "train --recipe deit-soft @DATA --store damaged --out new/run @SMALL --same-classes",
        ("damaged/targets/cnn-logits-", "damaged:", "`pipeline verify --store DIR` lists all that is damaged"),
    ),
    Mistake(
        "a GPU that is not there", "train --recipe scratch @DATA --out new/run @SMALL --device cuda:99",
        ("--device cuda:99", "CUDA device"),
    ),
    Mistake(
        "weights beside a recipe that takes them from the hub",
        "train --recipe fine-tune @DATA --out new/run --set student.weights=vit.safetensors",
        ("pretrained and weights are both given", "--set student.pretrained=false"),
    ),
    Mistake(
        "an image that is broken", "train --recipe scratch --shards broken/shard.tar --val broken/shard.tar "
        "--out new/broken @SMALL --set stream.batch_size=8",
        ("broken/shard.tar: key 'cat_9': cannot be decoded", "remove the image and pack again"),
    ),
    Mistake(
        "a run over another one", "train --recipe scratch @DATA --out run @SMALL",
        ("run: there is a run in this folder already", "add --resume", "--out RUN"),
    ),
    Mistake(
        "a run into a folder of photos", "train --recipe scratch @DATA --out photos @SMALL",
        ("photos: there is something else in this folder (cat, …)", "--out RUN"),
    ),
    Mistake(
        "--resume where nothing is", "train --recipe scratch @DATA --out new/none @SMALL --resume",
        ("new/none: no checkpoint here", "without --resume a new run begins"),
    ),
    Mistake(
        "a recipe that was edited, then --resume", "train --recipe edited.yaml @DATA --out run @SMALL --resume",
        ("run/checkpoint.pt: seed: the run has 0, asked for 1", "begin a new one in another --out"),
    ),
    Mistake(
        "a recipe with tabs", "train --recipe tabs.yaml @DATA --out new/run",
        ("tabs.yaml: not plain YAML", "line 2", "spaces, not with tabs"),
    ),
    # ---------------------------------------------------------------------------------------- students
    Mistake("a run that is not there", "evaluate rnu --shards shard-000000.tar", ("rnu", "no student", "`pipeline tr")),
    Mistake(
        "an average that was not kept", "evaluate run --shards shard-000000.tar --checkpoint ema",
        ("run has no student 'ema'", "--set ema=0.999", "--checkpoint last"),
    ),
    Mistake(
        "a file that is no student", "evaluate shard-000000.tar --shards shard-000000.tar",
        ("shard-000000.tar: not a student", "pipeline train"),
    ),
    Mistake(
        "evaluation on other classes", "evaluate run --shards other/val-000000.tar",
        ("other/classes.json: classes: expected 3", "found 5", "Give shards of the same classes"),
    ),
    Mistake("prediction of a text", "predict run notes.txt", ("notes.txt: cannot be decoded", "no JPEG, PNG or WebP")),
    Mistake("prediction of nothing", "predict run cat.jpg", ("cat.jpg: no such image or folder", "give images")),
    Mistake(
        "a head on features that are not stored",
        "fit-teacher --store S --teacher cnn @DATA --out new/ours.safetensors",
        ("no target of cnn keeps class_token or embedding", "pipeline precompute --teacher cnn --target embedding"),
    ),
    # ---------------------------------------------------------------------------------------- the project file
    Mistake("teachers as a list", "plan --project list.yaml", ("list.yaml: teachers:", "teachers: {vit_tiny: {}}")),
    Mistake(
        "a recipe's setting in a project file", "plan --project epochs.yaml",
        ("epochs.yaml: epochs: a recipe's setting goes under `set`", "'optim.epochs'"),
    ),
    Mistake(
        "weights of a project that are not there", "precompute --project gone.yaml",
        ("gone.yaml: teachers.vit_tiny: --weights gone.pth: cannot be read", "pipeline fit-teacher"),
    ),
    Mistake("a project file that is not there", "plan --project p.yaml", ("p.yaml", "No such file", "pipeline init")),
    Mistake("tabs in the project file", "plan --project tabs.yaml", ("tabs.yaml", "line 2", "spaces, not with tabs")),
    Mistake("a typo in the project file", "plan --project typo.yaml", ("typo.yaml: shard:", "Did you mean 'shards'?")),
    Mistake(
        "a typo in the project's teacher", "plan --project teacher.yaml",
        ("teacher.yaml: teachers.mobilnet:", "Did you mean 'mobilenetv2'?"),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as it lies about after a first hour: photos, shards, a store, a run, and things that are none."""
    home = tmp_path_factory.mktemp("home")
    chance = generator("photos")
    for label, name in enumerate(("cat", "dog", "fox")):
        (home / "photos" / name).mkdir(parents=True)
        for i in range(6):
            synthetic_image(label, chance).save(home / "photos" / name / f"{i}.jpg")
    for name in ("empty", "heic/cat", "heic/dog", "five", "changed", "new"):
        (home / name).mkdir(parents=True)
    for name in ("heic/cat/1.heic", "heic/dog/1.heic", "notes.txt"):
        (home / name).write_text("no image")
    for name in ("cnn", "vit"):
        shutil.copy(world.weights[name], home / f"{name}.safetensors")
    data = Path(world.shards[0]).parent
    for name in ("shard-000000.tar", "shard-000001.tar", "classes.json"):
        shutil.copy(data / name, home)
        shutil.copy(data / name, home / "five")
    (home / "five" / "classes.json").write_text(json.dumps(list("abcde")))
    shutil.copy(data / "shard-000000.tar", home / "changed" / "shard-000001.tar")
    shutil.copy(data / "classes.json", home / "changed")
    world.copy(home / "S")
    synthetic_shards(home / "other", shards=1, samples=20, classes=5, stem="val")
    for name in ("parts/train", "parts/val", "gap"):
        shutil.copytree(home / "photos", home / name)
    (home / "gap" / "none").mkdir()
    shutil.copytree(home / "S", home / "rootless")
    (home / "rootless" / "zarr.json").unlink()
    shutil.copytree(home / "S", home / "damaged")
    for chunk in (home / "damaged" / "targets").glob("cnn-logits-*/*/*/*/data/c/0/0"):
        chunk.write_bytes(b"\0" + chunk.read_bytes()[1:])
    (home / "list.yaml").write_text("teachers: [vit_tiny]\n")
    (home / "epochs.yaml").write_text("epochs: 3\n")
    (home / "gone.yaml").write_text(
        "shards: shard-000000.tar\nstore: new/S\nteachers: {vit_tiny: {weights: gone.pth}}\n"
    )
    (home / "tabs.yaml").write_text("losses:\n\tcrossentropy: {}\n")
    (home / "typo.yaml").write_text("shard: shard-000000.tar\n")
    (home / "teacher.yaml").write_text("shards: shard-000000.tar\nstore: S\nteachers: {mobilnet: {}}\n")
    recipe = (ROOT / "pipeline" / "recipes" / "scratch.yaml").read_text()
    (home / "mine.yaml").write_text(recipe)
    (home / "edited.yaml").write_text(recipe.replace("\nseed: 0", "\nseed: 1"))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        shutil.copytree("photos", "worse")
        for i in range(20):
            Path(f"worse/cat/{i}.jpg").write_bytes(Path("photos/cat/1.jpg").read_bytes()[: 300 if i == 9 else None])
        shutil.copytree("photos/cat", "alone/cat")
        for typed in (
            "pack worse broken/shard.tar", "pack alone one/one.tar", "train --recipe mine.yaml @DATA --out run @SMALL",
        ):  # fmt: skip
            with pytest.raises(SystemExit) as ended:
                main(words_of(typed))
            assert ended.value.code == 0
    return home


def words_of(typed: str) -> list[str]:
    for short, long in SHORT.items():
        typed = typed.replace(short, long)
    return shlex.split(typed)


def kept(place: Path) -> dict[str, tuple[int, int]]:
    """Everything in the folder that a mistake may not touch."""
    files = [path for path in place.rglob("*") if path.relative_to(place).parts[0] != "new"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()}


def check(mistake: Mistake, place: Path, before: dict[str, tuple[int, int]], status: int, out: str, err: str) -> None:
    """That an end is as contract 13 says."""
    assert status == mistake.status, err
    assert "Traceback" not in err
    assert "this should not happen" not in err
    starts = {1: "error: ", 2: "Error: "}[status]
    (at,) = [number for number, line in enumerate(err.splitlines()) if line.startswith(starts)]
    first, *more = err.splitlines()[at:]
    assert all(line.startswith("  ") for line in more), "more than one message"
    message = "\n".join([first.removeprefix(starts), *more])
    for part in mistake.says:
        assert part in message
    assert len(message) < 700
    for line in more:  # a command that stands alone is one to be pasted
        if line.startswith("  pipeline "):
            command, *rest = shlex.split(line)[1:]
            assert cli.commands[command].make_context(command, rest)
    assert out == ""
    assert kept(place) == before


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_a_mistake_ends_in_one_message_with_the_way_out(mistake, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = kept(place)
    with pytest.raises(SystemExit) as ended:
        main(words_of(mistake.typed))
    check(mistake, place, before, int(str(ended.value.code)), *capsys.readouterr())
    with pytest.raises(SystemExit) as again:
        main([*words_of(mistake.typed), "--json"])
    assert again.value.code == ended.value.code
    assert json.loads(capsys.readouterr().out).keys() == {"error"}
    shutil.rmtree(place / "new")
    (place / "new").mkdir()


@pytest.mark.parametrize("mistake", AS_TYPED, ids=lambda mistake: mistake.name)
def test_the_same_in_a_process_of_its_own(mistake, place, tmp_path):
    before = kept(place)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-m", "pipeline", *words_of(mistake.typed)], cwd=place, env={**os.environ, **offline},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    check(mistake, place, before, run.returncode, run.stdout, run.stderr)


def test_the_tour_is_long_and_every_command_has_a_part_in_it():
    typed = [mistake.typed.split()[0] for mistake in (*MISTAKES, *AS_TYPED)]
    assert len(typed) >= 20
    assert {*cli.commands} - {*typed} <= {"recipes", "teachers", "verify", "export", "demo"}
