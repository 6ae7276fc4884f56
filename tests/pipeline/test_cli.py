"""The command line: the whole path as a user types it, and contract 13: bad input, clear end."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from pipeline.cli import main
from pipeline.recipes import loader
from storage.testing import TINY_CNN, synthetic_shards
from tests.conftest import ROOT
from tests.pipeline.every_command import every_command

SIZES = [
    "student.model=vit_tiny_patch16_224",
    "student.img_size=32",
    "student.patch_size=4",
    "student.embed_dim=48",
    "student.depth=2",
    "student.num_heads=3",
    "stream.batch_size=32",
    "optim.epochs=2",
    "optim.warmup_epochs=0",
]

TRAIN = ["train", "--recipe", "scratch", "--shards", "{shard}", "--val", "{shard}", "--out", "r"]
MAKE = ["precompute", "--teacher", "resnet34", "--shards", "{shard}", "--store", "s"]


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(capsys):
    def call(*words: object) -> Ran:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        code = ended.value.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Ran(int(code or 0), captured.out, captured.err)

    return call


def precompute_words(world, store: object, *more: object) -> list[str]:
    name, arguments = TINY_CNN
    pairs = [w for k, v in {**arguments, "num_classes": 3}.items() for w in ("--teacher-arg", f"{k}={v}")]
    words = [
        "precompute",
        "--teacher",
        name,
        "--weights",
        world.weights["cnn"],
        *pairs,
        "--mean",
        ".5",
        "--std",
        ".5",
        "--input-size",
        "64",
        "--store",
        store,
        *more,
    ]
    return [str(word) for word in words]


def test_from_class_folders_to_a_score(run, world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from storage.shards.index import cached_index, read_samples

    for url in world.shards:
        index = cached_index(url)
        for sample in read_samples(url, index, range(len(index))):
            folder = tmp_path / "photos" / f"kind{sample.label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{sample.key}.png").write_bytes(sample.image)

    hint = run("train", "--recipe", "scratch", "--shards", "photos", "--val", "photos", "--out", "run")
    assert hint.status == 1
    assert "pipeline pack photos photos-000000.tar --val-fraction 0.1" in hint.err

    packed = run("pack", "photos", "train-{000000..000001}.tar", "--val-fraction", ".2", "--json")
    assert json.loads(packed.out)["samples"] == {"train": 240, "val": 60}
    shards = ["--shards", "train-{000000..000001}.tar"]
    views = ["--view-policy", "light", "--view-size", 32, "--num-views", 2]
    made = run(*precompute_words(world, "S", *shards, *views, "--target", "activations,grid=8", "--json"))
    assert made.status == 0, made.err
    assert json.loads(made.out)["written"] == 4
    again = run(*precompute_words(world, "S", *shards, "--target", "activations,grid=8", "--json"))
    assert json.loads(again.out)["written"] == 0
    assert "already complete" in again.err

    shown = run("inspect", "--store", "S")
    assert "2 shard(s) x 2 view(s)" in shown.out
    seen = json.loads(run("inspect", "--store", "S", "--json").out)
    (target,) = seen["targets"].values()
    assert target["sample_shape"] == [60, 8, 8]
    assert target["view_images"] == 480
    checked = json.loads(run("verify", "--store", "S", *shards, "--full", "--json").out)
    assert (checked["ok"], checked["views_rendered"]) == (True, 480)

    sets = [w for s in SIZES for w in ("--set", s)]
    trained = run(
        "train",
        "--recipe",
        "aal",
        "--store",
        "S",
        *shards,
        "--val",
        "train-val-000000.tar",
        "--out",
        "run",
        *sets,
        "--json",
    )
    assert trained.status == 0, trained.err
    scored = json.loads(run("evaluate", "accuracy", "run", "--shards", "train-val-000000.tar", "--json").out)
    assert scored["samples"] == 60
    assert scored["top1"] == json.loads(trained.out)["top1"]
    assert "top-1" in run("evaluate", "accuracy", "run", "--shards", "train-val-000000.tar", "--checkpoint", "best").out

    chunk = next(Path("S/targets").rglob("data_8/c/0/0/0/0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    broken = run("verify", "--store", "S")
    assert broken.status == 1
    assert broken.out.startswith(f"{chunk}: ")
    assert "  S/done/target." in broken.out
    for line in broken.out.partition("Delete these files")[2].splitlines()[1:]:
        Path(line.strip()).unlink()
    assert run(*precompute_words(world, "S", *shards, *views, "--target", "activations,grid=8")).status == 0
    assert run("verify", "--store", "S", *shards).status == 0


def test_help_of_every_command_shows_an_example(run):
    for name, command in every_command().items():
        shown = run(*name.split(), "--help")
        assert shown.status == 0
        assert f"pipeline {name}" in shown.out.split("Options:")[0].split("\n", 2)[2]
        assert "--json" in shown.out or isinstance(command, click.Group)


def test_help_answers_without_torch():
    code = (
        "import sys\nfrom pipeline.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'timm', 'zarr', 'numpy', 'webdataset'} & set(sys.modules), sys.modules.keys()"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_workers_that_run_onnx_can_stay_free_of_torch():
    modules = "precompute.engine.shard, precompute.run, storage.store.verify"
    code = f"import sys, {modules}\nassert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["precompue"], 2, "No such command 'precompue'. (Did you mean one of: 'precompute'"),
        (["evaluate", "acuracy", "run"], 2, "No such command 'acuracy'. Did you mean 'accuracy'?"),
        (["evaluate", "run", "--protocol", "knn"], 2, "try: pipeline evaluate accuracy run …"),
        (
            ["evaluate", "--shards", "x.tar", "a run"],
            2,
            "takes what to measure first: accuracy, knn, linear-probe, loc",
        ),
        (["evaluate", "knn", "run", "--label-fracton", "1%"], 2, "Did you mean '--label-fraction'?"),
        (["train", "--recipie", "aal"], 2, "--recipe"),
        (["train"], 2, "Missing option '--recipe'"),
        (["inspect", "--store", ""], 2, "an empty name; give a folder or an fsspec URL"),
        (["inspect", "--store", "nowhere"], 1, "nowhere: there is no store here"),
        (["inspect", "--store", "{shard}"], 1, "not a folder, so not a store"),
        (
            ["train", "--recipe", "all", "--shards", "{shard}", "--val", "{shard}", "--out", "r"],
            1,
            "Did you mean 'aal'?",
        ),
        (
            ["train", "--recipe", "scratch", "--shards", "{data}/shard-00000.tar", "--val", "{shard}", "--out", "r"],
            1,
            "no such shard (requested by '{data}/shard-00000.tar')\n  Did you mean 'shard-000000.tar'?",
        ),
        ([*TRAIN, "--set", "optim.epohcs=1"], 1, "optim.epohcs: no such setting. Did you mean 'epochs'?"),
        ([*TRAIN, "--set", "epochs"], 1, "expected NAME=VALUE, such as --set optim.epochs=50"),
        ([*TRAIN, "--device", "gpu"], 1, "expected auto, cpu, cuda or cuda:N"),
        (["train", "--recipe", "aal", "--shards", "{shard}", "--val", "{shard}", "--out", "r"], 1, "Give --store DIR"),
        (
            [
                "train",
                "--recipe",
                "scratch",
                "--shards",
                "{shard}",
                "--shards",
                "{shard}",
                "--val",
                "{shard}",
                "--out",
                "r",
            ],
            1,
            "the same shard is named twice",
        ),
        (["evaluate", "accuracy", "nowhere", "--shards", "{shard}"], 1, "no student here"),
        (["evaluate", "accuracy", "{shard}", "--shards", "{shard}"], 1, "not a student that `pipeline train` wrote"),
        (["verify", "--store", "{store}", "--samples", "-1"], 2, "-1 is not in the range"),
        (
            ["precompute", "--teacher", "mobilnetv2", "--shards", "{shard}", "--store", "s"],
            1,
            "Did you mean 'mobilenetv2'?",
        ),
        ([*MAKE, "--target", "activation"], 1, "no tap is called 'activation'\n  Did you mean 'activations'?"),
        ([*MAKE, "--target", "q,layer=last"], 1, "no option is called 'layer'\n  Did you mean 'layers'?"),
        ([*MAKE, "--target", "q,codec=u9"], 1, "no codec is called 'u9'\n  Did you mean 'u4'?"),
        ([*MAKE, "--view-policy", "lite"], 1, "no operation is called 'lite'\n  Did you mean 'light'?"),
        ([*MAKE, "--teacher-name", "views"], 1, "--teacher-name views: this name is taken by the stored view images"),
        ([*MAKE, "--weights", "w.safetensors"], 1, "--weights w.safetensors: cannot be read"),
        ([*MAKE, "--mean", "half"], 1, "--mean half: expected one number or three"),
        ([*MAKE, "--teacher-arg", "x"], 1, "expected name=value"),
        (["pack", "nowhere", "out.tar"], 1, "nowhere: no such"),
        (["pack", "{data}", "{shard}"], 1, "already exists; shards are never overwritten"),
        (["demo", "--out", "{data}"], 1, "this folder is not empty"),
    ],
)
def test_mistakes_end_with_one_clear_message(run, world, tmp_path, monkeypatch, words, status, message):
    monkeypatch.chdir(tmp_path)
    places = {"shard": world.shards[0], "data": str(Path(world.shards[0]).parent), "store": str(world.store)}
    ended = run(*[word.format(**places) for word in words])
    assert ended.status == status
    assert message.format(**places) in ended.err
    assert ended.out == ""
    assert not (tmp_path / "r").exists()


def test_an_error_with_json_is_one_object_on_stdout(run):
    assert "Missing option '--recipe'" in json.loads(run("train", "--json").out)["error"]
    ended = run("inspect", "--store", "nowhere", "--json")
    assert ended.status == 1
    assert "there is no store here" in json.loads(ended.out)["error"]


def test_debug_shows_the_traceback():
    ended = subprocess.run(
        [sys.executable, "-m", "pipeline", "inspect", "--store", "nowhere", "--debug"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize("harm", ["truncated", "compressed", "unlabeled", "no closing blocks"])
def test_bad_shards_are_refused_by_every_command_that_reads_them(run, world, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    (good,) = synthetic_shards(tmp_path, shards=1, samples=40, labels=harm != "unlabeled", stem=harm.replace(" ", "-"))
    path = Path(good)
    data = path.read_bytes()
    if harm == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "compressed":
        path.write_bytes(gzip.compress(data))
    elif harm == "no closing blocks":
        path.write_bytes(data.rstrip(b"\0") + b"\0" * (-len(data.rstrip(b"\0")) % 512))
    message = {
        "truncated": "truncated",
        "compressed": "compressed with gzip",
        "unlabeled": "has no label (.cls)",
        "no closing blocks": "closing zero blocks",
    }[harm]
    sets = [w for s in SIZES for w in ("--set", s)]
    commands = [["train", "--recipe", "scratch", "--shards", good, "--val", good, "--out", "r", *sets]]
    if harm != "unlabeled":  # activations need no labels
        commands.append(precompute_words(world, "S", "--shards", good, "--view-size", 32))
    for words in commands:
        ended = run(*words)
        assert ended.status == 1
        assert message in ended.err
        assert str(path) in ended.err
        if harm in ("compressed", "no closing blocks"):
            assert "pipeline pack" in ended.err


@pytest.mark.parametrize("flag", [["--view-policy", "none"], ["--view-size", 64], ["--seed", 3]])
def test_another_policy_size_or_seed_than_the_store_has_is_refused(run, world, flag):
    before = sorted(p.name for p in (world.store / "banks").iterdir())
    ended = run(*precompute_words(world, world.store, "--shards", world.shards[0], "--teacher-name", "cnn2", *flag))
    assert ended.status == 1
    assert ": the store has " in ended.err
    assert ", asked for " in ended.err
    assert "--new-bank" in ended.err
    assert sorted(p.name for p in (world.store / "banks").iterdir()) == before


def test_another_weights_file_under_a_recorded_name_is_refused(run, world, tmp_path):
    from tests.conftest import write_teacher

    other = write_teacher(tmp_path / "other.safetensors", TINY_CNN, seed=5)
    words = precompute_words(world, world.store, "--shards", world.shards[0], "--teacher-name", "cnn")
    words[words.index(world.weights["cnn"])] = other
    ended = run(*words)
    assert ended.status == 1
    assert "weights sha256: the store has" in ended.err
    assert "--teacher-name cnn-2" in ended.err


def test_recipes_are_valid_and_open_with_paper_command_and_what_to_expect():
    assert {
        "aal",
        "advit-l1",
        "attention-distill",
        "deit-hard",
        "deit-soft",
        "fine-tune",
        "head-specific",
        "scratch",
    } <= {*loader.names()}
    for name in loader.names():
        recipe = loader.load_recipe(name)
        assert ("crossentropy" in recipe.losses) == (name not in ("attndistill", "simreg", "seed", "compress"))
        header = (loader.FOLDER / f"{name}.yaml").read_text().split("\nstudent:")[0]
        assert all(line.startswith("#") for line in header.splitlines())
        assert all(word in header for word in ("Paper:", "Command:", "Expect:"))


def test_settings_are_laid_over_a_recipe(tmp_path):
    from storage.errors import UserError

    recipe = loader.load_recipe("aal", ["losses.aal.weight=5", "optim.lr=5e-4", "stream.bank.policy=light", "seed=3"])
    assert recipe.losses["aal"].weight.at(100) == 5
    assert (recipe.optim.lr, recipe.stream.bank.policy, recipe.seed) == (5e-4, "light", 3)
    assert loader.load_recipe("scratch", ["losses.aal.weight.start=7"]).losses["aal"].weight.at(0) == 7
    path = tmp_path / "mine.yaml"
    path.write_text("losses: {crossentropy: {weight: 2}}\n")
    assert loader.load_recipe(str(path)).losses["crossentropy"].weight.at(0) == 2
    for text in ("losses: !!python/object/apply:os.system ['echo hacked']", "losses: [", "\x00"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml: not plain YAML"):
            loader.load_recipe(str(path))


def test_a_clean_interrupt_says_that_work_stays(monkeypatch, run):
    import pipeline.inspection.store

    def interrupted(store):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.inspection.store, "inspect", interrupted)
    monkeypatch.setattr("storage.store.store.Store.open", lambda place: place)
    ended = run("inspect", "--store", "x")
    assert ended.status == 130
    assert "completed work is kept" in ended.err
