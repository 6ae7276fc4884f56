"""The project file: it says what flags would say, from any folder; whatever is in it ends in one clear error."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from pipeline.cli import main
from pipeline.inspection.store import sum_of
from pipeline.project.context import load
from pipeline.project.schema import located
from pipeline.recipes import loader
from precompute.results import Amount, MissingAmount, SharedAmount
from storage.errors import UserError
from storage.shards.pack import pack
from storage.store.store import Store
from storage.testing import TINY_CNN, TINY_VIT
from student.models.build import build_student
from tests.conftest import ROOT, World
from tests.pipeline.every_command import every_command

if TYPE_CHECKING:
    from precompute.request import PrecomputeRequest

READERS = ["evaluate accuracy", "fit-teacher", "inspect", "plan", "precompute", "train", "verify"]


@pytest.fixture
def run(capsys):
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def section() -> str:
    text = (ROOT / "docs" / "guide.md").read_text()
    return text.split("## A project file")[1].split("\n## ")[0]


def example() -> dict[str, Any]:
    (block,) = re.findall(r"```yaml\n(.*?)```", section(), re.DOTALL)
    content: dict[str, Any] = yaml.safe_load(block)
    return content


def commands() -> list[list[str]]:
    (block,) = re.findall(r"```\n(pipeline plan.*?)```", section(), re.DOTALL)
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as in the README: its shards, its weights, and its file with tiny networks in place of the real ones."""
    folder = tmp_path_factory.mktemp("project")
    content = example()
    assert content["shards"] == "train-{000000..000009}.tar"
    content["shards"] = ["train-{000000..000001}.tar"]
    packed = pack(world.shards, str(folder / content["shards"][0]), val_fraction=0.1)
    assert packed.val == [str(folder / content["val"])]
    tiny = {"cnn": (TINY_CNN, 64), "vit": (TINY_VIT, 32)}
    assert content["teachers"].keys() == tiny.keys()
    for name, entry in content["teachers"].items():
        (model, arguments), size = tiny[name]
        (folder / entry["weights"]).parent.mkdir(exist_ok=True)
        (folder / entry["weights"]).write_bytes(Path(world.weights[name]).read_bytes())
        entry |= {"teacher": model, "args": {**arguments, "num_classes": 3}, "input_size": size}
    content["student"] |= {"embed_dim": 48, "depth": 2, "num_heads": 3}
    content["set"] |= {"stream.batch_size": 32, "optim.epochs": 1, "optim.warmup_epochs": 0}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder


@pytest.mark.slow
def test_what_the_readme_shows_runs_as_it_stands_there(place, run, monkeypatch):
    monkeypatch.chdir(place)
    said = commands()
    assert [words[0] for words in said] == [
        "plan",
        "precompute",
        "precompute",
        "verify",
        "train",
        "evaluate",
        "fit-teacher",
    ]
    results = {}
    for words in said:
        more = {"plan": ["--measure", 0], "fit-teacher": ["--l2", 0.01]}.get(words[0], [])
        status, out, err = run(*words, *more, "--json")
        assert status == 0, (words, err)
        assert err.splitlines().count("project pipeline.yaml") == 1
        results[" ".join(words[:1] + words[1:2] * (words[0] == "precompute"))] = json.loads(out)
        if words == ["precompute"]:
            files = [path for path in Path("S").rglob("*") if path.is_file()]
            told = results["plan"]["sum"]
            assert told["objects"] == len(files)
            assert told["bytes"] == pytest.approx(sum(path.stat().st_size for path in files), rel=0.1)
    planned, made = results["plan"], results["precompute"]["teachers"]
    assert list(made) == list(planned["teachers"]) == ["cnn", "vit"]
    assert Store.open("S").teachers()["vit"].identity.mean == (0.5,) * 3
    taps = {name: [t.split("-")[1] for t in result["targets"]] for name, result in made.items()}
    assert taps == {"cnn": ["activations"], "vit": ["class_row", "class_token"]}
    assert Store.open("S").target(made["cnn"]["targets"][0]).identity.grid == 8, "the student's"
    assert results["precompute --teacher"]["targets"][0].startswith("vit-logits-")
    assert results["verify"]["targets_compared"] > 0
    assert results["train"]["top1"] == results["evaluate"]["top1"]
    assert results["evaluate"]["samples"] == 30
    assert results["fit-teacher"]["teacher"] == "vit"
    assert told["bytes"] == told["missing"]["bytes"], "nothing was there"
    one, two = planned["teachers"].values()
    assert max(one["bytes"], two["bytes"]) < told["bytes"] < one["bytes"] + two["bytes"], "views are kept once"


def test_a_plan_of_what_is_there_has_nothing_left_to_make(place, run, monkeypatch):
    monkeypatch.chdir(place)
    assert run("precompute")[0] == 0
    status, out, err = run("plan", "--measure", 0)
    assert status == 0, err
    assert [line for line in out.splitlines() if line.endswith(":")] == ["cnn:", "vit:"]
    assert re.match(
        r"all of them: .* in .* objects; still to be made: 0 B in 0 objects, 0 view images$", out.splitlines()[-1]
    )


def test_from_another_folder_it_means_the_same(place, run, monkeypatch, tmp_path):
    """Everything is found where the file is, and is what was made there: nothing is made again."""
    monkeypatch.chdir(place)
    assert run("precompute", "--json")[0] == 0
    monkeypatch.chdir(tmp_path)
    file = Path(os.path.relpath(place / "pipeline.yaml"))
    status, out, err = run("precompute", "--project", file, "--json")
    assert status == 0, err
    assert [result["written"] for result in json.loads(out)["teachers"].values()] == [0, 0]
    assert f"project {file}" in err
    status, out, err = run("train", "--project", file, "--recipe", "scratch", "--out", "away", "--json")
    assert status == 0, err
    assert json.loads(out)["bank"].startswith("light-32-"), "views of the project's store"
    trained = yaml.safe_load((tmp_path / "away" / "args.yaml").read_text())
    assert str(trained).count("'embed_dim': 48") == 1
    status, out, err = run("evaluate", "accuracy", "away", "--project", file, "--json")
    assert (status, json.loads(out)["samples"]) == (0, 30)
    assert list(tmp_path.iterdir()) == [tmp_path / "away"]


def test_without_a_project_nothing_is_taken(place, run, monkeypatch):
    monkeypatch.chdir(place)
    status, _, err = run("inspect", "--no-project")
    assert (status, "Missing option '--store'" in err, err.startswith("project ")) == (2, True, False)
    assert "Missing option '--teacher'" in run("precompute", "--no-project", "--store", "S", "--shards", "x.tar")[2]
    for words in (["--project", "pipeline.yaml", "--no-project"], ["--no-project", "--project", "pipeline.yaml"]):
        status, _, err = run("inspect", *words)
        assert (status, "choose one" in err) == (2, True)


def test_flags_win(place, run, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    assert run("inspect", "--store", tmp_path / "nowhere")[2].endswith("\n  `pipeline precompute` makes one.\n")
    assert "--weights gone.pth: cannot be read" in run("precompute", "--teacher", "vit", "--weights", "gone.pth")[2]
    words = ["precompute", "--teacher", "vit", "--store", tmp_path / "S", "--shards", "train-000000.tar", "--json"]
    status, out, err = run(*words, "--target", "logits", "--num-views", 1, "--view-size", 24, "--teacher-name", "other")
    assert status == 0, err
    made = json.loads(out)
    assert (made["views"], made["shards"], made["bank"][:9]) == (1, made["shards"][:1], "light-24-")
    (target,) = made["targets"]
    assert target.startswith("other-logits-")
    status, out, err = run(
        "train",
        "--recipe",
        "scratch",
        "--store",
        "",
        "--out",
        tmp_path / "r",
        "--set",
        "student.depth=1",
        "--set",
        "stream.bank.policy=none",
        "--json",
    )
    assert status == 0, err
    assert json.loads(out)["bank"] is None, "an empty --store is none"
    recipe = yaml.safe_load((tmp_path / "r" / "args.yaml").read_text())
    student = recipe.get("student") or recipe["recipe"]["student"]
    assert (student["depth"], student["embed_dim"]) == (1, 48)


def test_a_flag_for_one_teacher_needs_its_name_where_there_are_several(place, run, monkeypatch):
    monkeypatch.chdir(place)
    for words in (["--weights", "w"], ["--target", "logits"], ["--teacher-name", "x"], ["--teacher-arg", "a=1"]):
        status, _, err = run("precompute", *words)
        assert status == 1
        assert f"{words[0]} is for one teacher, pipeline.yaml has cnn, vit: give --teacher NAME" in err
    assert "no teacher is called 'vitt'" in run("precompute", "--teacher", "vitt")[2]


def requests(monkeypatch: pytest.MonkeyPatch) -> list[PrecomputeRequest]:
    """What precompute is asked for from now on; it does nothing."""
    seen: list[PrecomputeRequest] = []

    def precompute(store: object, wanted: PrecomputeRequest, console: object) -> SimpleNamespace:
        seen.append(wanted)
        return SimpleNamespace(targets=[], shards=[], failures=[])

    monkeypatch.setattr("precompute.run.precompute", precompute)
    return seen


def test_the_wait_for_workers_is_that_of_the_flag_else_of_the_file_else_five_minutes(place, run, monkeypatch, tmp_path):
    said = yaml.safe_dump({**yaml.safe_load((place / "pipeline.yaml").read_text()), "worker_timeout": 3600})
    (place / "patient.yaml").write_text(said)
    seen = requests(monkeypatch)
    words = ["precompute", "--store", tmp_path / "S", "--teacher", "vit"]
    assert run(*words, "--project", place / "pipeline.yaml")[0] == 0
    assert run(*words, "--project", place / "patient.yaml")[0] == 0
    assert run(*words, "--project", place / "patient.yaml", "--worker-timeout", 7)[0] == 0
    assert [one.worker_timeout for one in seen] == [300, 3600, 7]


def test_workers_or_dask_of_a_flag_are_not_both_with_those_of_the_file(place, run, monkeypatch, tmp_path):
    from pipeline.project import context

    content = yaml.safe_load((place / "pipeline.yaml").read_text())
    (place / "other.yaml").write_text(yaml.safe_dump({**content, "workers": 3}))
    seen = requests(monkeypatch)
    words = ["precompute", "--project", place / "other.yaml", "--store", tmp_path / "S", "--teacher", "vit"]
    assert run(*words)[0] == 0
    assert run(*words, "--dask", "tcp://host:1")[0] == 0
    assert [(one.workers, one.dask) for one in seen] == [(3, None), (None, "tcp://host:1")]
    assert "give one of them" in run(*words, "--dask", "tcp://host:1", "--workers", 2)[2]
    assert context.current() is None, "outside of a command there is none"


def test_paths_are_relative_to_the_file_whatever_they_are():
    folder = Path("a/b")
    for said, meant in {
        "t-{000000..000009}.tar": "a/b/t-{000000..000009}.tar",
        "x.tar::/y.tar::~/z.tar": "a/b/x.tar::/y.tar::~/z.tar",
        "s3://bucket/t-{0..9}.tar": "s3://bucket/t-{0..9}.tar",
        "file:///t.tar": "file:///t.tar",
        "{u,v}/*.tar": "a/b/{u,v}/*.tar",
        "{/u,v,s3://w}/0.tar": "/u/0.tar::a/b/v/0.tar::s3://w/0.tar",
        "memory://S": "memory://S",
    }.items():
        assert located(said, folder) == meant


def test_settings_are_laid_over_a_recipe_and_flags_over_them(tmp_path):
    (tmp_path / "w.yaml").write_text(
        "student: {img_size: 32, weights: init.pth}\nset: {losses.aal.weight: 7, optim.lr: 5e-4, student.depth: 3}\n"
    )
    project = load(tmp_path / "w.yaml")
    over = loader.Over(where=str(project.path), settings=project.settings)
    recipe = loader.load_recipe("aal", ["student.depth=4", "student.patch_size=4"], over)
    assert (recipe.student.img_size, recipe.student.depth, recipe.student.drop_path_rate) == (32, 4, 0.1)
    assert recipe.student.weights == str(tmp_path / "init.pth")
    assert (recipe.losses["aal"].weight.at(9), recipe.optim.lr) == (7, 5e-4)
    (tmp_path / "w.yaml").write_text("set: {losses.aal.wieght: 1}")
    bad = load(tmp_path / "w.yaml")
    with pytest.raises(UserError, match=r"recipe aal with .*w\.yaml laid over it: losses\.aal\.wieght: no such"):
        loader.load_recipe("aal", ["optim.epohcs=1"], loader.Over(where=str(bad.path), settings=bad.settings))
    with pytest.raises(UserError, match=r"recipe aal with --set: optim\.epohcs: no such .* 'epochs'"):
        loader.load_recipe("aal", ["optim.epohcs=1"], over)


BEFORE = """
teachers:
  ours: {teacher: vit_tiny, weights: ours.safetensors, args: {num_classes: 3}, targets: logits}
student:
  model: vit_tiny_patch16_224
  img_size: 32
  patch_size: 4
set:
  optim.epochs: 30
  optim.lr: 0.001
  model_ema_decay: null
"""


def test_a_file_of_before_means_what_it_meant(tmp_path):
    """As version 0.1.0 read it."""
    (tmp_path / "pipeline.yaml").write_text(BEFORE)
    project = load(tmp_path / "pipeline.yaml")
    assert project.settings == [
        ("student.model", "vit_tiny_patch16_224"),
        ("student.img_size", 32),
        ("student.patch_size", 4),
        ("optim.epochs", 30),
        ("optim.lr", 0.001),
        ("model_ema_decay", None),
    ]
    assert project.content.teachers["ours"].args == {"num_classes": 3}
    student = loader.load_recipe("scratch", (), loader.Over(where="p", settings=project.settings)).student
    said = {"model": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 4, "drop_path_rate": 0.1}
    assert student.model_dump(exclude_defaults=True) == {n: v for n, v in said.items() if n != "model"}
    assert build_student(student, 3)[1] == {"img_size": 32, "patch_size": 4, "drop_path_rate": 0.1, "num_classes": 3}


def test_the_student_s_arguments_and_what_it_is_like_are_laid_over_recipes(tmp_path):
    args = "{init_values: 1e-5, reg_tokens: 2}"
    (tmp_path / "w.yaml").write_text(
        f"teachers: {{t: {{args: {{init_values: 1e-6}}}}}}\n"
        f"student: {{like: vit_small_patch16_dinov3, depth: 2, args: {args}}}\nset: {{student.args.qk_norm: true}}\n"
    )
    project = load(tmp_path / "w.yaml")
    assert project.content.teachers["t"].args == {"init_values": 1e-6}
    student = loader.load_recipe("aal", (), loader.Over(where="w", settings=project.settings)).student
    assert (student.like, student.model, student.depth) == (*("vit_small_patch16_dinov3",) * 2, 2)
    assert student.args == {"init_values": 1e-5, "reg_tokens": 2, "qk_norm": True}
    (tmp_path / "w.yaml").write_text("student: {args: {depth: 2}}")
    with pytest.raises(UserError, match=r"w\.yaml: student: args\.depth: this has a setting of its own"):
        load(tmp_path / "w.yaml")


def test_a_section_is_laid_over_what_is_there_setting_by_setting(tmp_path):
    plain = loader.load_recipe("attention-distill")
    (tmp_path / "w.yaml").write_text("set: {optim: {epochs: 3, warmup_epochs: 1}, losses: {attention: {heads: mean}}}")
    project = load(tmp_path / "w.yaml")
    over = loader.Over(where="w", settings=project.settings)
    recipe = loader.load_recipe("attention-distill", ["optim={epochs: 4}"], over)
    assert recipe.optim == plain.optim.model_copy(update={"epochs": 4, "warmup_epochs": 1})
    assert recipe.losses["attention"] == plain.losses["attention"].model_copy(update={"heads": "mean"})
    weight = (
        loader.load_recipe("aal", ["losses.aal.weight={start: 1, shape: linear, end: 0, over: 9}"]).losses["aal"].weight
    )
    assert (weight.decay, weight.then, weight.at(9)) == (1, {}, 0), "a schedule is one value"


BAD = {
    "shrads: a.tar": "shrads: no such setting. Did you mean 'shards'?",
    "views: {polcy: deit}": "views.polcy: no such setting. Did you mean 'policy'?",
    "views: {size: large}": "views.size: should be a valid integer",
    "views: {size: 0}": "views.size: should be greater than or equal to 1",
    "views: [deit]": "views: should be a mapping of settings",
    "teachers: {cnn: {wieghts: w}}": "teachers.cnn.wieghts: no such setting. Did you mean 'weights'?",
    "teachers: {'a b': {}}": "teachers.a b: string should match pattern",
    "teachers: {cnn: {mean: half}}": "teachers.cnn.mean.0: should be a valid number",
    "teachers: [cnn]": "teachers: should be a mapping of settings",
    "student: {img_siz: 32}": "student.img_siz: no such setting. Did you mean 'img_size'?",
    "student: {depth: many}": "student.depth: should be a valid integer",
    "set: {optm.lr: 1}": "set.optm.lr: a recipe has no 'optm' there. Did you mean 'optim'?",
    "set: {optim.epoch: 3}": "set.optim.epoch: a recipe has no 'epoch' there. Did you mean 'epochs'?",
    "set: {optim.accumulate: 3}": "a recipe has no 'accumulate' there. It is now 'optim.grad_accum_steps'.",
    "set: {speed.amp: auto}": "set.speed.amp: a recipe has no 'speed' there. It is now 'precision.amp_dtype'.",
    "ema: 0.9": "ema: a recipe's setting goes under `set`. It is now 'model_ema_decay'.",
    "set: {optim: {epoch: 3}}": "set.optim.epoch: a recipe has no 'epoch' there. Did you mean 'epochs'?",
    "provider: gpu": "provider: should be 'auto', 'cpu' or 'cuda'",
    "workers: 0": "workers: should be greater than or equal to 1",
    "worker_timeout: 0": "worker_timeout: should be greater than or equal to 1",
    "{workers: 2, dask: 'tcp://h:1'}": "give one of them",
    "shards: 5": "shards.0: should be a valid string",
    "store: ''": "store: string should have at least 1 character",
    "1: 2": "1: ",
    "- a": "expected a mapping with shards, val, store",
    "word": "expected a mapping with shards",
    "store: S\nstore: T": "line 2, column 1: the key 'store' appears twice",
    "teachers: {a: {}, a: {}}": "the key 'a' appears twice",
    "store: !!python/object/apply:os.system ['echo hacked']": "not plain YAML",
    "store: !!int ''": "not plain YAML",
    "store: 2001-99-99": "not plain YAML",
    "a: &a [x, x]\nset: {seed: *a}": "the alias *a: aliases are not read",
    "{[a]: b}": "not plain YAML",
    "store: [": "not plain YAML",
    "store: \x00": "not plain YAML",
    "[" * 20000: "not plain YAML: ",
    "workers: " + "9" * 5000: "bad.yaml: ",
    "set: {seed: " + "[" * 60 + "]" * 60 + "}": None,
    "store: " + "S" * 5000 + "\nviews: {size: " + "x" * 5000 + "}": "views.size",
    "#" * (1 << 20) + "\n": "larger than 1 MiB",
}


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=[text[:30] for text in BAD])
def test_whatever_is_in_it_ends_in_one_message_with_file_and_key(run, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(text)
    status, out, err = run("inspect", "--project", "bad.yaml", "--json")
    if message is None:  # the file is good; only the recipe that it is laid over will not be
        assert (status, "Missing option '--store'" in err) == (2, True)
        return
    assert status == 1
    assert err.startswith("error: bad.yaml: ")
    assert message in err
    assert len(err) < 1500
    assert json.loads(out)["error"] == err.removeprefix("error: ").rstrip("\n")


def test_what_cannot_be_read_is_said(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nowhere.yaml: cannot be read: No such file" in run("inspect", "--project", "nowhere.yaml")[2]
    assert "cannot be read: Is a directory" in run("inspect", "--project", tmp_path)[2]
    Path("pipeline.yaml").write_bytes(b"store: \xff")
    assert "pipeline.yaml: not plain YAML: it is not UTF-8" in run("inspect")[2]
    Path("pipeline.yaml").write_text("")
    status, _, err = run("inspect")
    assert (status, "Missing option '--store'" in err) == (2, True)


def test_a_mistake_about_a_teacher_names_the_file_and_the_teacher(place, run, monkeypatch):
    monkeypatch.chdir(place)
    for entry, message in (
        ({"teacher": "mobilnetv2"}, "no teacher is called 'mobilnetv2'\n  Did you mean 'mobilenetv2'?"),
        ({"teacher": "resnet34", "targets": ["activation"]}, "--target activation: no tap is called 'activation'"),
        ({"teacher": "resnet34", "weights": "gone.pth"}, "--weights gone.pth: cannot be read"),
        ({"weights": "vit.safetensors", "mean": [1, 2]}, "no teacher is called 'mine'"),
    ):
        (place / "bad.yaml").write_text(yaml.safe_dump({"shards": "train-000000.tar", "teachers": {"mine": entry}}))
        status, _, err = run("precompute", "--project", "bad.yaml", "--store", "S")
        assert status == 1
        assert "error: bad.yaml: teachers.mine: " in err
        assert message in err


def test_weights_that_are_still_to_be_made_are_left_out(place, run, monkeypatch, tmp_path):
    """`init` writes a teacher whose file `fit-teacher` makes later; what the others give must not wait for it."""
    monkeypatch.chdir(place)
    content = yaml.safe_load((place / "pipeline.yaml").read_text())
    vit = content["teachers"]["vit"]
    content["teachers"] = {"ours": {**vit, "weights": "ours.safetensors"}, "vit": vit}
    Path("fresh.yaml").write_text(json.dumps(content))  # without aliases
    words = ["plan", "--measure", 0, "--project", "fresh.yaml", "--store", tmp_path / "S", "--json"]
    status, out, err = run(*words)
    assert status == 0, err
    assert list(json.loads(out)["teachers"]) == ["vit"]
    gone, advice = Path("ours.safetensors"), "`pipeline fit-teacher --teacher NAME --out FILE` makes one"
    assert f"ours is skipped: {gone} does not exist yet; {advice}" in err
    status, _, err = run(*words, "--teacher", "ours")
    assert status == 1
    unread = f"error: fresh.yaml: teachers.ours: --weights {gone}: cannot be read: "
    assert f"{unread}No such file or directory\n  {advice}" in err
    assert run(*words, "--teacher", "ours", "--weights", place / vit["weights"])[0] == 0
    content["teachers"].pop("vit")
    Path("fresh.yaml").write_text(json.dumps(content))  # without aliases
    assert f"{unread}No such file or directory\n  {advice}" in run(*words)[2]
    gone.mkdir()
    assert f"{unread}Is a directory\n" in run(*words)[2]
    gone.rmdir()


def test_every_command_that_reads_it_says_so_and_the_others_do_not(run):
    said = {name for name in every_command() if "--project" in run(*name.split(), "--help")[1]}
    assert said >= set(READERS)
    assert not said & {"pack", "demo", "evaluate", "evaluate cost"}


def test_help_reads_no_project(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("pipeline.yaml").write_text("shrads: [")
    for name in READERS:
        assert run(*name.split(), "--help")[0] == 0
    assert run("pack", "nowhere", "out.tar")[2].count("error: nowhere: no such") == 1


def plan_of(bank: str, own: int, shared: int, hours: float | None, made: bool = False) -> Any:
    lacking = Amount(bytes=0 if made else shared, objects=0 if made else 1)
    common = SharedAmount(bytes=shared, objects=1, missing=lacking)
    missing = MissingAmount(bytes=own + lacking.bytes, objects=2 + lacking.objects, view_images=7)
    return SimpleNamespace(bank=bank, bytes=own + shared, objects=3, missing=missing, shared=common, hours=hours)


def test_what_is_shared_counts_once_a_bank():
    total = sum_of({"a": plan_of("x", 10, 5, 1.0), "b": plan_of("x", 20, 5, 0.5), "c": plan_of("y", 1, 3, 0.25, True)})
    assert (total.bytes, total.objects, total.hours) == (10 + 20 + 5 + 1 + 3, 8, 1.75)
    assert total.missing == MissingAmount(bytes=36, objects=7, view_images=21)
    assert sum_of({"a": plan_of("x", 1, 1, None)}).hours is None
