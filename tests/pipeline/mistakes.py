"""A newcomer's mistakes before training: with words and flags, images and shards, teachers and stores."""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """What is typed, and what the message has to say: what, where, and the way out."""

    name: str
    typed: str
    says: tuple[str, ...]
    status: int = 1


# Each once in a process of its own, as people run it; all others in this process, where that is the same.
AS_TYPED = [
    Mistake("a typo in a command", "precompue --store S", ("'precompue'", "Did you mean one of: 'precompute'"), 2),
    Mistake(
        "class folders in place of shards",
        "precompute --teacher mobilenetv2 --weights cnn.safetensors --shards photos --store new/S",
        (
            "photos is a folder of 18 images",
            "pipeline pack photos photos-000000.tar --val-fraction 0.1",
            "give --shards photos-000000.tar",
        ),
    ),
    Mistake(
        "no way to timm's hub",
        "precompute --teacher mobilenetv2 --shards shard-000000.tar --store new/S --view-size 32",
        ("teacher mobilenetv2_100", "could not be downloaded from the timm hub", "Give a file: --weights F"),
    ),
    Mistake(
        "training before precompute",
        "train --recipe aal @DATA --store new/S --out new/run @SMALL",
        ("new/S: there is no store here\n  `pipeline precompute` makes one",),
    ),
]

PREPARING = [
    # ---------------------------------------------------------------------------------------- words and flags
    Mistake("links of what is no run", "aal-links nowhere", ("nowhere: no links here", "a complete run with an aal")),
    Mistake(
        "evaluation without what is measured",
        "evaluate run --shards shard-000000.tar",
        ("takes what to measure first: accuracy, knn", "try: pipeline evaluate accuracy run"),
        2,
    ),
    Mistake("a typo in an option", "train --recipie aal", ("'--recipie'", "Did you mean '--recipe'?"), 2),
    Mistake("no recipe", "train", ("'--recipe'", "`pipeline recipes` lists them"), 2),
    Mistake(
        "validation shards forgotten",
        "train --recipe scratch --shards shard-000000.tar --out new/run",
        ("'--val'", "`pipeline pack … --val-fraction 0.1`"),
        2,
    ),
    Mistake("shards forgotten", "plan --teacher vit_tiny --store S", ("'--shards'", "`pipeline pack` makes them"), 2),
    Mistake("store forgotten", "inspect", ("'--store'", "the folder that `pipeline precompute` makes"), 2),
    Mistake(
        "new shards without quotes",
        "pack photos new/t-000000.tar new/t-000001.tar new/t-000002.tar",
        ("a folder or a CSV is packed alone", "one pattern in quotes", "'train-{000000..000009}.tar'"),
        2,
    ),
    Mistake(
        "a pattern without quotes",
        "plan --teacher vit_tiny --store new/S --shards shard-000000.tar shard-000001.tar",
        ("unexpected extra argument (shard-000001.tar)", "one pattern in quotes"),
        2,
    ),
    Mistake("names of new shards forgotten", "pack photos", ("name the new shards, such as: pipeline pack photos",), 2),
    Mistake(
        "a word for a number",
        "precompute --teacher vit_tiny --shards shard-000000.tar --store new/S --view-size big",
        ("'--view-size'", "'big'"),
        2,
    ),
    Mistake("a typo in a recipe", "train --recipe all @DATA --out new/run", ("'all'", "Did you mean 'aal'?")),
    Mistake(
        "a recipe file that is not there",
        "train --recipe my.yaml @DATA --out new/run",
        ("my.yaml: no such recipe file", "pipeline recipes aal > my.yaml"),
    ),
    Mistake(
        "a typo in --set",
        "train --recipe scratch @DATA --out new/run --set optim.epohcs=3",
        ("optim.epohcs", "Did you mean 'epochs'?"),
    ),
    Mistake(
        "--set with a value of another type",
        "train --recipe scratch @DATA --out new/run --set stream.batch_size=lots",
        ("stream.batch_size", "valid integer", "'lots'"),
    ),
    Mistake(
        "a setting without its section",
        "train --recipe scratch @DATA --out new/run --set epochs=3",
        ("--set: epochs: no such setting", "Did you mean 'optim.epochs'?"),
    ),
    Mistake(
        "a section for a setting",
        "train --recipe scratch @DATA --out new/run --set optim=adam",
        ("optim: should be a mapping of settings (name: value), found 'adam'",),
    ),
    Mistake(
        "--set without a value",
        "train --recipe scratch @DATA --out new/run --set optim.epochs",
        ("--set optim.epochs", "NAME=VALUE, such as --set optim.epochs=50"),
    ),
    # ---------------------------------------------------------------------------------------- images into shards
    Mistake("a folder that is not there", "pack fotos new/x-000000.tar", ("fotos: no such folder", "per class")),
    Mistake("an empty folder", "pack empty new/x-000000.tar", ("empty: no images found", "one folder per class")),
    Mistake(
        "one image alone, and a part of it for validation",
        "pack single new/x-000000.tar --val-fraction 0.1",
        ("--val-fraction 0.1: there is only one sample", "Give more images"),
    ),
    Mistake("init on one image", "init single --out new/p.yaml", ("single: only one image", "needs two or more")),
    Mistake(
        "photos of a telephone",
        "pack heic new/x-000000.tar",
        ("heic/cat: a class folder without images", "1.heic is not one of jpg, jpeg, png, webp", "convert it"),
    ),
    Mistake(
        "training and validation images in one folder",
        "pack parts new/x-000000.tar",
        (
            "parts: train, val are parts of a data set, not classes",
            "\n  pipeline pack parts/train train-000000.tar",
            "\n  pipeline pack parts/val val-000000.tar",
        ),
    ),
    Mistake("init on the same", "init parts --out new/p.yaml", ("parts: train, val are parts of a data set",)),
    Mistake("init on photos of a telephone", "init heic --out new/p.yaml", ("heic/cat: a class folder without",)),
    Mistake(
        "links whose files were moved",
        "pack linked new/x-000000.tar",
        ("linked: 1 link(s) lead nowhere, such as linked/cat/moved", "Fix or remove them", "find -L linked -type l"),
    ),
    Mistake(
        "a shard with keys that have no image",
        "precompute @CNN --shards failed/shard-000000.tar --store new/S --view-size 32 --target logits",
        (
            "failed/shard-000000.tar: key 'lost' needs one image",
            "found json, txt",
            "a sample is a key with one image",
            "--on-decode-error skip",
            "pipeline pack failed/shard-000000.tar",
        ),
    ),
    Mistake("init on a class without images", "init gap --out new/p.yaml", ("gap/none: a class folder without im",)),
    Mistake("a shard without .tar", "pack photos new/train", ("new/train", "NAME.tar", "'train-{000000..000009}.tar'")),
    Mistake("a star in a new name", "pack photos 'new/t-*.tar'", ("new/t-*.tar", "'train-{000000..000009}.tar'")),
    Mistake("a bench nowhere", "bench --folder nowhere", ("--folder nowhere: no such folder",)),
    Mistake("percent for a fraction", "pack photos new/x.tar --val-fraction 10", ("--val-fraction 10", "0.1 is a")),
    Mistake(
        "more shards than images",
        "pack photos 'new/x-{000000..000099}.tar'",
        ("18 samples cannot fill 100 shards", "fewer names"),
    ),
    Mistake(
        "a shard that is there",
        "pack photos shard-000000.tar",
        ("shard-000000.tar: already exists", "Give other names"),
    ),
    Mistake(
        "shards of other classes in one folder",
        "pack photos x-000000.tar",
        ("./classes.json: already exists with other classes", "such as new/x-000000.tar"),
    ),
    Mistake(
        "a place that cannot be written to",
        "pack photos shard-000000.tar/x/y-000000.tar",
        ("shard-000000.tar/x", "Not a directory", "give another path"),
    ),
    Mistake("init on an empty folder", "init empty", ("empty: no images found", "one folder per class", "or shards")),
    Mistake("init on no folder", "init fotos", ("fotos: no such folder", "with images, in one folder a class")),
    # ---------------------------------------------------------------------------------------- naming shards
    Mistake(
        "a pattern that matches nothing",
        "train --recipe scratch --shards 'sahrd-*.tar' --val x.tar --out new/run",
        ("sahrd-*.tar: no file matches", "Did you mean 'shard-000000.tar'?"),
    ),
    Mistake(
        "a pattern for more than there is",
        "train --recipe scratch --shards 'shard-{000000..000009}.tar' --val x.tar --out new/run",
        ("shard-000002.tar: no such shard", "2 of its 10 names exist, the last is 'shard-000001.tar': end"),
    ),
    Mistake(
        "shards with a comma",
        "evaluate accuracy run --shards shard-000000.tar,shard-000001.tar",
        ("shard-000000.tar,shard-000001.tar: no such shard", "Join several shards by ::"),
    ),
    Mistake(
        "braces that do not close",
        "train --recipe scratch --shards 'shard-{0..1.tar' --val x.tar --out new/run",
        ("shard-{0..1.tar", "do not close", "{000000..000009}"),
    ),
    Mistake(
        "an image in place of shards",
        "evaluate accuracy run --shards photos/cat/1.jpg",
        ("photos/cat/1.jpg is an image", "pipeline pack photos photos-000000.tar"),
    ),
    Mistake(
        "one class folder in place of shards",
        "evaluate accuracy run --shards photos/cat",
        ("photos/cat is a folder of 6 images", "pipeline pack photos/cat cat-000000.tar", "one folder per class"),
    ),
    Mistake(
        "validation shards of other classes",
        "train --recipe scratch --shards shard-000000.tar --val other/val-000000.tar --out new/run @SMALL",
        ("other/classes.json: classes: expected 3 (class0,", "found 5 (class0,", "pipeline pack --val-fraction 0.1 …"),
    ),
    Mistake(
        "one class alone",
        "train --recipe scratch --shards one/one.tar --val one/one.tar --out new/run @SMALL",
        ("one/one.tar: one class alone", "pack a folder for each"),
    ),
    # ---------------------------------------------------------------------------------------- teachers and stores
    Mistake(
        "a typo in a teacher",
        "precompute --teacher mobilnetv2 --shards shard-000000.tar --store new/S",
        ("'mobilnetv2'", "Did you mean 'mobilenetv2'?"),
    ),
    Mistake(
        "weights of another network",
        "precompute --teacher mobilenetv2 --weights vit.safetensors --shards shard-000000.tar --store new/S",
        ("teacher mobilenetv2: vit.safetensors: does not fit", "262 missing", "None of its 44 names is one of"),
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
        "an input that is not a multiple of the patches",
        "precompute --teacher vit_tiny --weights vit.safetensors --input-size 30 --shards shard-000000.tar "
        "--store new/S",
        ("teacher vit_tiny", "30 pixels", "patches of 16", "--input-size 32"),
    ),
    Mistake(
        "attention of a CNN",
        "precompute @CNN --target attention --shards shard-000000.tar --store new/S",
        ("has no attention over all tokens of an image", "pipeline teachers NAME"),
    ),
    Mistake(
        "a store that is a folder of photos",
        "precompute @CNN --shards shard-000000.tar --store photos",
        ("photos: not a store: this folder has other files (cat, …)", "Give a new folder"),
    ),
    Mistake(
        "a store that is a file",
        "precompute @CNN --shards shard-000000.tar --store shard-000000.tar",
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
        "a typo in a target",
        "precompute @CNN --target activation --shards shard-000000.tar --store new/S",
        ("--target activation:", "Did you mean 'activations'?"),
    ),
    Mistake(
        "a codec of another tap",
        "precompute @CNN --target logits,codec=log8 --shards shard-000000.tar --store new/S",
        ("--target logits,codec=log8:", "class_row, attention\n  Use f32, f16"),
    ),
    Mistake(
        "a store without its root",
        "inspect --store rootless",
        ("rootless/zarr.json: missing", "the same in all stores: copy it"),
    ),
    Mistake(
        "shards that were not precomputed",
        "train --recipe aal --shards other/val-000000.tar --val other/val-000000.tar --store S --out new/run @SMALL",
        ("other/val-000000.tar: shard: the store S has shard-000000-", "this is val-000000-", "pipeline precompute"),
    ),
    Mistake(
        "views of another size",
        "precompute @CNN --shards shard-000000.tar --store S --view-size 64 --teacher-name b",
        ("S: bank light-32-", "view size: the store has 32, asked for 64", "--new-bank"),
    ),
    Mistake(
        "the name of a recorded teacher for another",
        "precompute @CNN --shards shard-000000.tar --store S --teacher-name vit",
        ("teacher 'vit'", "the store has", "asked for", "--teacher-name vit-2"),
    ),
    Mistake(
        "a scheduler that does not run",
        "precompute @CNN --shards shard-000000.tar --store new/S --dask nonsense",
        ("--dask nonsense", "no scheduler answers", "`dask scheduler`"),
    ),
]
