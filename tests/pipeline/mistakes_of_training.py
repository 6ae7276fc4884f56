"""A newcomer's mistakes from training on: with recipes and runs, students, and the project file."""

from __future__ import annotations

from tests.pipeline.mistakes import Mistake

TRAINING = [
    # ---------------------------------------------------------------------------------------- training
    Mistake(
        "targets without a store",
        "train --recipe aal @DATA --out new/run @SMALL",
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
        "shards that have changed since",
        "train --recipe aal --shards changed/shard-000001.tar --val shard-000001.tar --store S --out new/run @SMALL",
        ("changed/shard-000001.tar", "are known in this store under other shards", "run `pipeline precompute`"),
    ),
    Mistake(
        "logits of other classes",
        "train --recipe deit-soft --shards five/shard-000000.tar --val five/shard-000001.tar --store S "
        "--out new/run @SMALL --same-classes",
        ("number of classes: the student has 5, the teacher 3", "pipeline fit-teacher"),
    ),
    Mistake(
        "a student without a class token",
        "train --recipe advit-l1 @DATA --store S --out new/run @SMALL "
        "--set losses.advit.layers=last --set student.model=vit_base_patch16_siglip_gap_224 "
        "--set student.global_pool=avg",
        ("advit: the student has no class token", "Take a student that has one"),
    ),
    Mistake(
        "a typo in the student",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.model=vit_tiny",
        ("timm has no 'vit_tiny'", "Did you mean 'vit_tiny_patch16_224'?"),
    ),
    Mistake(
        "a typo in an argument of the student",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.args.init_value=1",
        ("student.args.init_value: vit_tiny_patch16_224 has no such argument", "Did you mean 'init_values'?"),
    ),
    Mistake(
        "a size among the student's arguments",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.args.depth=3",
        ("args.depth: this has a setting of its own", "--set student.depth=3"),
    ),
    Mistake(
        "a student like a teacher that is nowhere",
        "train --recipe scratch @DATA --store S --out new/run @SMALL --set student.like=vit_smaall_patch16_dinov3",
        ("student.like: timm has no 'vit_smaall_patch16_dinov3', and the store no such teacher", "Did you mean"),
    ),
    Mistake(
        "a CNN for a student",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.model=resnet18",
        ("student resnet18", "cannot be made", "--set student.model=vit_tiny_patch16_224"),
    ),
    Mistake(
        "an image size that is not a multiple of the patches",
        "train --recipe scratch @DATA --out new/run @SMALL --set student.img_size=30",
        ("img_size 30 is not a multiple of the patch size 4", "--set student.img_size="),
    ),
    Mistake(
        "a batch larger than the data",
        "train --recipe scratch @DATA --out new/run @SMALL --set stream.batch_size=1024",
        ("300 samples are fewer than one batch of 1024", "--set stream.batch_size=256"),
    ),
    Mistake(
        "a batch that cannot be cut",
        "train --recipe scratch @DATA --out new/run @SMALL --set stream.batch_size=30",
        ("batch size 30", "stream.lanes", "--set stream.batch_size=32"),
    ),
    Mistake(
        "too large a learning rate",
        "train --recipe scratch @DATA --out new/run @SMALL --set optim.lr=1000",
        ("the loss is not finite", "--set optim.lr=X", "--set optim.clip_grad=1"),
    ),
    Mistake(
        "a damaged store",
        "train --recipe deit-soft @DATA --store damaged --out new/run @SMALL --same-classes",
        ("damaged/targets/cnn-logits-", "damaged:", "`pipeline verify --store DIR` lists everything that is damaged"),
    ),
    Mistake(
        "a GPU that is not there",
        "train --recipe scratch @DATA --out new/run @SMALL --device cuda:99",
        ("--device cuda:99", "CUDA device"),
    ),
    Mistake(
        "weights beside a recipe that takes them from the hub",
        "train --recipe fine-tune @DATA --out new/run --set student.weights=vit.safetensors",
        ("pretrained and weights are both given", "--set student.pretrained=false"),
    ),
    Mistake(
        "an image that is broken",
        "train --recipe scratch --shards broken/shard.tar --val broken/shard.tar "
        "--out new/broken @SMALL --set stream.batch_size=8",
        ("broken/shard.tar: key 'cat_9': cannot be decoded", "remove the image and pack again"),
    ),
    Mistake(
        "a run over another one",
        "train --recipe scratch @DATA --out run @SMALL",
        ("run: this folder already has a run", "add --resume", "--out RUN"),
    ),
    Mistake(
        "a run into a folder of photos",
        "train --recipe scratch @DATA --out photos @SMALL",
        ("photos: this folder has other files (cat, …)", "--out RUN"),
    ),
    Mistake(
        "--resume where nothing is",
        "train --recipe scratch @DATA --out new/none @SMALL --resume",
        ("new/none: no checkpoint here", "Without --resume a new run begins"),
    ),
    Mistake(
        "a recipe that was edited, then --resume",
        "train --recipe edited.yaml @DATA --out run @SMALL --resume",
        ("run/checkpoint.pt: seed: the run has 0, asked for 1", "begin a new one: --out RUN"),
    ),
    Mistake(
        "a recipe with tabs",
        "train --recipe tabs.yaml @DATA --out new/run",
        ("tabs.yaml: not plain YAML", "line 2", "spaces, not with tabs"),
    ),
    # ---------------------------------------------------------------------------------------- students
    Mistake(
        "a run that is not there",
        "evaluate accuracy rnu --shards shard-000000.tar",
        ("rnu", "no student", "pipeline"),
    ),
    Mistake(
        "an average that was not kept",
        "evaluate accuracy run --shards shard-000000.tar --checkpoint ema",
        ("run has no student 'ema'", "--set model_ema_decay=0.999", "--checkpoint last"),
    ),
    Mistake(
        "a file that is no student",
        "evaluate accuracy shard-000000.tar --shards shard-000000.tar",
        ("shard-000000.tar: not a student", "pipeline train"),
    ),
    Mistake(
        "evaluation on other classes",
        "evaluate accuracy run --shards other/val-000000.tar",
        ("other/classes.json: classes: expected 3", "found 5", "Give shards of the same classes"),
    ),
    Mistake(
        "prediction of a text", "predict run notes.txt", ("notes.txt: cannot be decoded", "not a JPEG, PNG or WebP")
    ),
    Mistake("prediction of nothing", "predict run cat.jpg", ("cat.jpg: no such image or folder", "give images")),
    Mistake(
        "a head on features that are not stored",
        "fit-teacher --store S --teacher cnn @DATA --out new/ours.safetensors",
        ("no target of cnn keeps class_token or embedding", "pipeline precompute --teacher cnn --target embedding"),
    ),
    # ---------------------------------------------------------------------------------------- the project file
    Mistake("teachers as a list", "plan --project list.yaml", ("list.yaml: teachers:", "teachers: {vit_tiny: {}}")),
    Mistake(
        "a recipe's setting in a project file",
        "plan --project epochs.yaml",
        ("epochs.yaml: epochs: a recipe's setting goes under `set`", "'optim.epochs'"),
    ),
    Mistake(
        "weights of a project that are not there",
        "precompute --project gone.yaml",
        ("gone.yaml: teachers.vit_tiny: --weights gone.pth: cannot be read", "pipeline fit-teacher"),
    ),
    Mistake("a project file that is not there", "plan --project p.yaml", ("p.yaml", "No such file", "pipeline init")),
    Mistake("tabs in the project file", "plan --project tabs.yaml", ("tabs.yaml", "line 2", "spaces, not with tabs")),
    Mistake("a typo in the project file", "plan --project typo.yaml", ("typo.yaml: shard:", "Did you mean 'shards'?")),
    Mistake(
        "a typo in the project's teacher",
        "plan --project teacher.yaml",
        ("teacher.yaml: teachers.mobilnet:", "Did you mean 'mobilenetv2'?"),
    ),
]
