"""Networks of one's own: a module from a file teaches, a student from another learns; their code runs only if named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from pipeline.cli import main
from precompute.taps import AttentionTaps, adapt, allow_network, attention_layers, own_network
from precompute.teachers.teacher import find_teacher
from storage.errors import UserError
from storage.objects.json_record import to_json
from storage.store.store import Store
from storage.testing import synthetic_shards
from storage.views.policy import policy
from student.models.files import load_student
from student.training import train as training

if TYPE_CHECKING:
    from collections.abc import Callable

TEACHER = """
import torch
from torch import nn

torch.RAN = getattr(torch, "RAN", 0) + 1  # how often this file was run


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)
        self.first = nn.Parameter(torch.randn(1, 1, 12))
        self.places = nn.Parameter(torch.randn(1, 17, 12))
        self.qkv = nn.Linear(12, 36)
        self.maps = nn.Conv2d(3, 5, 4, 4)
        self.head = nn.Linear(17, classes)

    def tokens(self, x):
        x = torch.cat([self.first.expand(len(x), -1, -1), self.patches(x).flatten(2).mT], 1) + self.places
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        return x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.head(torch.cat([self.tokens(x)[:, 0], self.maps(x).mean((2, 3))], 1))


def build(prefix=1):
    net = Net()
    if prefix is not None:
        net.num_prefix_tokens = prefix
    return net


def configured(num_classes=3):
    net = build()
    net.head = nn.Linear(17, num_classes) if num_classes else nn.Identity()
    net.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.25, 0.25, 0.25)}
    return net


def features():
    net = configured()
    net.num_classes = 0
    return net


def conflicting():
    net = configured()
    net.forward_features = net.tokens
    return net


def headed():
    net = configured()
    net.forward_features = net.tokens
    net.forward_head = lambda x: net.head(x[:, 0])
    return net


def sized(img_size):
    net = configured()
    net.pretrained_cfg = {}
    return net


class Auxiliary(Net):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, logits.new_full(logits.shape, float("nan"))) if self.training else logits


def random():
    import random
    net = configured()
    nn.init.constant_(net.head.bias, random.random())
    return net


def raising():
    raise ValueError("no checkpoint here")


def nothing():
    return {"a": "dictionary"}


def unfit():
    return nn.Linear(3, 4)


not_a_function = 3
"""
FLAGS = ("--input-size", "32", "--mean", "0.5", "--std", "0.25")


@pytest.fixture(autouse=True)
def nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what other tests named, as a new process does."""
    monkeypatch.setattr(own_network, "_given", {})
    monkeypatch.setattr(torch, "RAN", 0, raising=False)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(TEACHER)
    synthetic_shards(".", 1, 64, stem="train")
    synthetic_shards(".", 1, 32, stem="val", seed=1)
    return tmp_path


def run(capsys: Any, *words: str, fails: bool = False) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    said = capsys.readouterr()
    assert bool(ended.value.code) == fails, said.out + said.err
    return str(said.out + said.err)


def record(capsys: Any, teacher: str, *words: str, fails: bool = False) -> str:
    views = ("--view-policy", "none", "--view-size", "32", "--num-views", "1")
    return run(
        capsys,
        "precompute",
        "--teacher",
        teacher,
        "--shards",
        "train-000000.tar",
        "--store",
        "S",
        *views,
        *words,
        fails=fails,
    )


def forget() -> None:
    """Forget what was named, as a new process does."""
    own_network._given.clear()  # noqa: SLF001
    torch.RAN = 0  # type: ignore[attr-defined]


def stored(store: str = "S") -> dict[str, torch.Tensor]:
    """Tap -> what is stored of the first samples."""
    opened = Store.open(store)
    return {
        manifest.identity.tap: torch.from_numpy(opened.array(id)[:4].compute())
        for id, manifest in opened.targets().items()
    }


def test_attention_maps_logits_and_embedding_are_those_of_the_network(place: Path, capsys: Any) -> None:
    """Against the module called by hand, on the pixels that the store renders."""
    targets = [
        w
        for t in ("attention", "activations,grid=8,codec=f32", "logits", "embedding,codec=f32")
        for w in ("--target", t)
    ]
    record(capsys, "net.py:build", *FLAGS, "--tap-module", "maps", *targets, "--store-views")
    opened = Store.open("S")
    values = stored()
    images = values.pop("pixels", None)
    if images is None:
        from precompute.engine.shard import block_views
        from storage.shards.shard import open_shards

        images = torch.from_numpy(block_views(open_shards(["train-000000.tar"])[0], policy("none", 32, 0))[:4])
    scope: dict[str, Any] = {}
    exec(TEACHER, scope)
    torch.manual_seed(0)
    network = scope["build"]()
    x = (images.reshape(-1, 32, 32, 3)[:4].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        pooled = torch.cat([network.tokens(x)[:, 0], network.maps(x).mean((2, 3))], 1)
        tokens = torch.cat([network.first.expand(4, -1, -1), network.patches(x).flatten(2).mT], 1) + network.places
        q, k, _ = network.qkv(tokens).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        expected = {
            "logits": network(x),
            "embedding": pooled,
            "activations": network.maps(x),
            "attention": (q @ k.mT / 2).softmax(-1)[:, None],
        }
    assert values.keys() == expected.keys()
    for tap, wanted in expected.items():
        torch.testing.assert_close(values[tap].reshape(wanted.shape).float(), wanted, rtol=2e-3, atol=2e-3, msg=tap)
    (teacher,) = opened.teachers().values()
    assert (teacher.network, teacher.prefix, teacher.weights) == ("vit", ("class",), "as built")


def test_it_is_the_same_teacher_wherever_its_file_lies(place: Path, capsys: Any) -> None:
    def digest(name: str, **settings: Any) -> str:
        return find_teacher(name, **{"input_size": 32, "mean": [0.5], "std": [0.5], **settings}).id

    known = digest("net.py:build")
    Path("elsewhere").mkdir()
    shutil.move("net.py", "elsewhere/net.py")
    forget()
    assert digest("elsewhere/net.py:build") == known
    assert digest(f"{place}/elsewhere/net.py:build") == known
    others = {digest("elsewhere/net.py:build", **more) for more in ({"prefix": ("class",)}, {"tap_modules": ("maps",)})}
    Path("elsewhere/net.py").write_text(TEACHER + "\nmore = 1\n")
    others.add(digest("elsewhere/net.py:build"))
    assert len(others - {known}) == 3
    assert digest("elsewhere/net.py:configured", mean=None, std=None, input_size=None) not in others


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.py:build"], "gone.py:build: there is no file gone.py"),
        (["no.such.module:build"], "no.such.module:build: there is no module no"),
        (["net.py:builds"], "net.py has no function 'builds'\n  Did you mean 'build'"),
        (["net.py:not_a_function"], "net.py has no function 'not_a_function'"),
        (["broken.py:build"], "broken.py cannot be imported: ZeroDivisionError"),
        (["net.py:raising"], "net.py:raising cannot be called: ValueError: no checkpoint here"),
        (["net.py:build", "--teacher-arg", "depth=3"], "cannot be called with {'depth': 3}: TypeError"),
        (["net.py:nothing"], "net.py:nothing returned a dict, not a torch.nn.Module"),
        (["net.py:build"], r"its input size, mean or std is unknown.*\n  Give --input-size N --mean M --std S"),
        (["net.py:build", "--input-size", "32", "--mean", "0.5"], "Give --std S"),
        (["net.py:build", *FLAGS, "--prefix", "clas"], "--prefix clas: no token has the role 'clas'"),
        (
            ["net.py:build", *FLAGS, "--prefix", "class,register", "--target", "class_row"],
            "it has 17 tokens; without the prefix (class, register) 15 are left",
        ),
        (
            ["net.py:build", *FLAGS, "--teacher-arg", "prefix=null", "--target", "class_row"],
            "For a teacher --prefix class,register or --prefix none",
        ),
        (["net.py:build", *FLAGS, "--target", "tokens"], "without forward_features its tokens"),
        (["net.py:build", *FLAGS, "--target", "activations"], "name the modules that give them: --tap-module NAMES"),
        (["net.py:build", *FLAGS, "--tap-module", "map"], "it has no module 'map'\n  Did you mean 'maps'"),
        (["net.py:build", *FLAGS, "--tap-module", "head"], r"module head: it gives \(2, 3\)"),
        (["net.py:unfit", *FLAGS], "it cannot take 32x32 RGB images"),
        (["net.py:random"], "two calls of its function returned different weights"),
        (["net.py:conflicting"], "it has forward_features but no forward_head"),
        (["net.py:features", "--target", "logits"], "it has no classifier, so it has no logits"),
        (
            ["vit_tiny_patch16_224", "--prefix", "class", "--weights", "random:0"],
            "for vit_tiny_patch16_224 it is known",
        ),
        (
            ["torchvision/resnet19", "--weights", "random:0"],
            "torchvision has no 'resnet19' that classifies\n  Did you mean 'resnet1",
        ),
        (["vit_tiny_patch16_224", "--prefix", "none", "--weights", "random:0"], "--prefix none: only for your own"),
        (["torchvision/r3d_18", "--weights", "random:0"], "torchvision has no 'r3d_18' that classifies"),
        (["net.py:headed"], "its forward_head must take pre_logits, as timm's does"),
        (["net.py:configured", "--weights", "other.pth"], "does not fit"),
    ],
)
def test_what_does_not_fit_is_said(place: Path, capsys: Any, words: list[str], message: str) -> None:
    Path("broken.py").write_text("1 / 0")
    torch.save({"head.weight": torch.zeros(3, 5)}, "other.pth")
    said = record(capsys, *words, *([] if "--target" in words else ["--target", "logits"]), fails=True)
    assert re.search(message if r"\(" in message or ".*" in message else re.escape(message), said), said
    assert "Traceback" not in said
    if "--" in message:  # what is to be added makes another teacher
        assert not Path("S").exists() or not Store.open("S").teachers(), "nothing is recorded of it"


def test_a_store_runs_no_code_that_it_names(place: Path, capsys: Any) -> None:
    """Neither `verify` nor a teacher by its name in the store; both do once the user names the function."""
    record(capsys, "net.py:configured", "--target", "embedding")
    check = ("verify", "--store", "S", "--shards", "train-000000.tar")
    measure = (
        "evaluate",
        "knn",
        "--store",
        "S",
        "--live",
        "--train-shards",
        "train-000000.tar",
        "--shards",
        "val-000000.tar",
    )
    forget()
    Path("net.py").write_text(TEACHER)
    assert "net: compared with the stored graph (its network is the code of net.py:configured" in run(capsys, *check)
    assert "--network net.py:configured" in run(capsys, *measure, "--teacher", "net", fails=True)
    assert torch.RAN == 0, "no file was run"  # type: ignore[attr-defined]
    named = ("--network", "net.py:configured")
    assert "compared with the PyTorch teacher (net.py:configured as built)" in run(capsys, *check, *named)
    assert "17 numbers" in run(capsys, *measure, "--teacher", "net", *named)


@pytest.mark.parametrize("model", ["subprocess:Popen", "/anywhere/net.py:configured", "net.py:configured"])
def test_a_store_that_names_a_function_as_a_user_would_is_refused(place: Path, capsys: Any, model: str) -> None:
    record(capsys, "net.py:configured", "--target", "embedding")
    forget()
    manifest = Path("S/teachers/net/manifest.json")
    content = json.loads(manifest.read_text())
    content["identity"] |= {"model": model, "arguments": {"args": ["touch", str(place / "ran")]}}
    manifest.write_bytes(to_json(content))
    words = ("--store", "S", "--live", "--train-shards", "train-000000.tar", "--shards", "val-000000.tar")
    said = run(capsys, "evaluate", "knn", "--teacher", "net", *words, fails=True)
    assert f"{model}: expected a network's name, found a function without the digest of its file" in said
    assert torch.RAN == 0  # type: ignore[attr-defined]
    assert not Path("ran").exists()


def test_a_function_gets_the_image_size_that_it_takes(place: Path, capsys: Any) -> None:
    assert find_teacher("net.py:sized", input_size=32, mean=[0.5], std=[0.5]).input_size == 32
    assert "logits" in run(capsys, "teachers", "net.py:sized", "--input-size", "32")


def test_files_of_two_folders_import_their_own_neighbors(place: Path) -> None:
    for folder, width in (("a", 3), ("b", 5)):
        Path(folder).mkdir()
        Path(folder, "beside.py").write_text(f"width = {width}\n")
        text = "from torch import nn\nfrom beside import width\n\ndef build():\n    return nn.Linear(width, 1)"
        Path(folder, "net.py").write_text(f"{text}  # {folder}\n")
    widths = [
        own_network.build_network(allow_network(f"{f}/net.py:build").label, {}, owner="x").in_features for f in "ab"
    ]
    assert widths == [3, 5]


def test_auxiliary_heads_of_training_are_left_alone(place: Path, capsys: Any) -> None:
    settings = {"student.model": "net.py:Auxiliary", "student.img_size": 32, "optim.epochs": 1, "stream.batch_size": 32}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    said = run(
        *(capsys, "train", "--recipe", "scratch-small", "--shards", "train-000000.tar", "--val", "val-000000.tar"),
        *("--out", "run", *words, "--set", "optim.warmup_epochs=0"),
    )
    assert re.search(r"epoch 0: crossentropy \d", said), said


def test_looking_at_a_network_leaves_its_statistics(place: Path) -> None:
    class Normed(nn.Module):
        num_prefix_tokens = 0

        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

        def forward_features(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

        def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
            return torch.as_tensor(self.norm(self.fc(x)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_tensor(self.forward_head(self.forward_features(x)))

    network = Normed()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    adapt(network, size=32, owner="x")
    assert network.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_student_of_one_s_own_is_resumed_predicts_and_is_exported(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed as if undisturbed; nothing in its folder is run unless the user names it."""
    record(
        capsys, "net.py:configured", "--target", "attention", "--target", "activations,grid=4", "--tap-module", "maps"
    )
    recipe = {
        "student": {"model": "mine.py:configured"},
        "losses": {"crossentropy": {}, "attention": {}, "aal": {}},
        "optim": {"epochs": 2, "warmup_epochs": 0, "lr": 0.01, "layer_decay": 0.8},
        "stream": {"batch_size": 32},
        "model_ema_decay": 0.5,
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    Path("mine.py").write_text(TEACHER)
    words = (
        "train",
        "--recipe",
        "recipe.yaml",
        "--store",
        "S",
        "--shards",
        "train-000000.tar",
        "--val",
        "val-000000.tar",
    )
    said = run(capsys, *words, "--out", "whole")
    assert "commands ask for it by --network mine.py:configured; a copy is whole/network.py" in said

    class Cut(Exception):
        pass

    end: Callable[..., None] = training.Trainer._end_of_epoch  # noqa: SLF001

    def cut(trainer: Any, epoch: int) -> None:
        end(trainer, epoch)
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "_end_of_epoch", cut)
        assert "error: internal error: Cut" in run(capsys, *words, "--out", "run", fails=True)
    Path("code").mkdir()
    shutil.move("mine.py", "code/mine.py")
    forget()
    moved = ("--set", "student.model=code/mine.py:configured")
    Path("code/mine.py").write_text(TEACHER + "\n")
    assert "network: the run has" in run(capsys, *words, *moved, "--out", "run", "--resume", fails=True)
    Path("code/mine.py").write_text(TEACHER)
    forget()
    run(capsys, *words, *moved, "--out", "run", "--resume")
    for name in ("last", "ema"):
        ours, theirs = load_file(f"run/{name}.safetensors"), load_file(f"whole/{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "as the undisturbed run"

    forget()
    export = ("export", "run", "--shards", "val-000000.tar")
    (picture,) = [Path(w) for w in ["photo.png"]]
    _photo(picture)
    for command in (
        export,
        ("predict", "run", str(picture)),
        ("evaluate", "accuracy", "run", "--shards", "val-000000.tar"),
    ):
        refused = run(capsys, *command, fails=True)
        assert "made by the code of mine.py:configured, which runs only if you name it" in refused
        assert "--network mine.py:configured; a copy is kept: --network run/network.py:configured" in refused
    assert torch.RAN == 0, "no file was run"  # type: ignore[attr-defined]
    Path("code/mine.py").write_text(TEACHER + "\n")
    assert "Give the file as it was" in run(capsys, *export, "--network", "code/mine.py:configured", fails=True)
    named = ("--network", "run/network.py:configured")
    run(capsys, *export, *named)
    assert "photo.png: class" in run(capsys, "predict", "run", str(picture), *named)
    model, about = load_student(Path("run/last.safetensors"))
    assert (about.mean, about.std) == ((0.4, 0.5, 0.6), (0.25, 0.25, 0.25)), "as its pretrained_cfg says"
    assert {*model.state_dict()} == {*load_file("run/last.safetensors")}, "the names of the module's own"
    card = Path("run/README.md").read_text()
    assert 'allow_network("mine.py:configured")' in card
    assert not Path("run/config.json").exists(), "timm could not load it"


def _photo(path: Path) -> None:
    import numpy as np

    from storage.testing import synthetic_image

    synthetic_image(1, np.random.default_rng(0)).save(path)


def test_a_project_file_names_functions_from_its_own_folder(place: Path, capsys: Any) -> None:
    Path("project").mkdir()
    shutil.move("net.py", "project/net.py")
    content = {
        "shards": "../train-000000.tar",
        "val": "../val-000000.tar",
        "store": "S",
        "views": {"policy": "none", "size": 32, "count": 1},
        "teachers": {"own": {"teacher": "net.py:build", "prefix": "class", "tap_modules": ["maps"], "input_size": 32}},
        "student": {"model": "net.py:configured"},
    }
    content["teachers"]["own"] |= {"mean": 0.5, "std": 0.5, "targets": ["class_row"]}  # type: ignore[index]
    Path("project/pipeline.yaml").write_text(yaml.safe_dump(content))
    run(capsys, "precompute", "--project", "project/pipeline.yaml")
    (teacher,) = Store.open("project/S").teachers().values()
    assert (teacher.identity.prefix, teacher.identity.tap_modules) == (("class",), ("maps",))
    Path("r.yaml").write_text(
        "losses: {crossentropy: {}}\noptim: {epochs: 1, warmup_epochs: 0}\nstream: {batch_size: 32}\n"
    )
    said = run(capsys, "train", "--recipe", "r.yaml", "--project", "project/pipeline.yaml", "--out", "run")
    assert "project/net.py:configured" in Path("run/args.yaml").read_text()
    assert "top-1" in said


def test_torchvision_s_networks_need_no_name_again(place: Path, capsys: Any) -> None:
    sizes = ("--set", "student.img_size=32", "--set", "student.drop_path_rate=null", "--set", "model_ema_decay=0.9")
    epochs = ("--set", "optim.epochs=1", "--set", "optim.warmup_epochs=0", "--set", "stream.batch_size=32")
    shards = ("--shards", "train-000000.tar", "--val", "val-000000.tar")
    model = ("--set", "student.model=torchvision/squeezenet1_1")
    run(capsys, "train", "--recipe", "scratch", *model, *sizes, *epochs, *shards, "--out", "run")
    _photo(Path("photo.png"))
    assert "photo.png: class" in run(capsys, "predict", "run", "photo.png")
    other = ("--set", "student.model=torchvision/resnet18", "--set", "student.embed_dim=8")
    refused = run(capsys, "train", "--recipe", "scratch", *other, *sizes, *epochs, *shards, "--out", "r", fails=True)
    assert "it does not take embed_dim\n  Leave them out: --set student.embed_dim=null" in refused


def test_a_torchvision_teacher_gives_its_own_logits_and_what_its_classifier_reads() -> None:
    from torchvision.models import get_model

    torch.manual_seed(0)
    ours = adapt(get_model("resnet18", num_classes=5).eval(), size=64, owner="resnet18")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features: Any = ours.forward_features(x)  # type: ignore[operator]
        torch.testing.assert_close(ours.forward_head(features), ours(x))  # type: ignore[operator]
        by_hand = nn.Sequential(*[*ours.children()][:-1])(x).flatten(1)
    torch.testing.assert_close(features, by_hand)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_is_read_as_torch_computes_it(need_weights: bool) -> None:
    class Net(nn.Module):
        num_prefix_tokens = 0

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 12, 8, 8)
            self.attend = nn.MultiheadAttention(12, 3, batch_first=True)
            self.head = nn.Linear(12, 3)

        def tokens(self, x: torch.Tensor) -> torch.Tensor:
            return self.patches(x).flatten(2).mT  # type: ignore[no-any-return]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.tokens(x)
            return self.head((x + self.attend(x, x, x, need_weights=need_weights)[0]).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    network, x = Net().eval(), torch.randn(2, 3, 32, 32)
    nn.init.normal_(network.attend.in_proj_bias)
    taps = AttentionTaps(attention_layers(network, 32).layers)
    with torch.no_grad():
        plain = network(x)
        with taps:
            torch.testing.assert_close(network(x), plain)
            _, average = network.attend(*[network.tokens(x)] * 3)
        tokens = network.tokens(x)
        _, rows = network.attend(tokens, tokens, tokens, average_attn_weights=False)
    torch.testing.assert_close(average, rows.mean(1))
    torch.testing.assert_close(taps.attention[0].rows(), rows)


def test_a_module_s_function_serves_and_names_nothing_else(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("package").mkdir()
    Path("package/__init__.py").write_text("")
    Path("package/inner.py").write_text(TEACHER)
    label = allow_network("package.inner:configured").label
    assert re.fullmatch(r"package\.inner:configured#[0-9a-f]{16}", label)
    with pytest.raises(UserError, match="runs only if you name it"):
        find_teacher(label.replace("configured", "build"))
