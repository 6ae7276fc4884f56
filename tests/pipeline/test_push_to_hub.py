"""`export --push-to-hub` against a stand-in of the Hub: what lies there afterward, and what timm makes of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file

from pipeline.cli import main
from student.models.files import load_student
from tests.conftest import ROOT
from tests.pipeline.hub import TOKEN, Hub, running
from tests.student.runs import run, u8

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def taught(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("taught") / "run"
    run(world, out, "aal", u8(world), "model_ema_decay=0.9")
    return out


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, str]]:
    """The stand-in, which this process takes for the Hub, and its address."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with running() as (place, address):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        yield place, address


def pushed(capsys: Any, *words: Any) -> tuple[int, str, str]:
    """Status, stdout and stderr of `export` with these words."""
    with pytest.raises(SystemExit) as ended:
        main(["export", *map(str, words)])
    said = capsys.readouterr()
    return ended.value.code, said.out, said.err  # type: ignore[return-value]


def python(words: list[str], home: Path, address: str) -> str:
    """What an interpreter of its own prints that knows the Hub by its settings alone."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    others = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=home,
        env={**others, "PYTHONPATH": str(ROOT), **own},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_timm_loads_by_name_what_was_pushed(taught, hub, tmp_path, capsys) -> None:
    place, address = hub
    status, out, err = pushed(capsys, taught, "--push-to-hub", "alice/taught", "--private", "--json")
    assert status == 0, err
    told = json.loads(out)
    assert place.private == {"alice/taught": True}
    assert len(place.commits["alice/taught"]) == 2, "the empty one, and one with everything"
    files = place.files("alice/taught")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert files["model.safetensors"] == (taught / "last.safetensors").read_bytes()
    assert files["config.json"] == (taught / "config.json").read_bytes()
    assert told["files"] == {name: len(content) for name, content in files.items()}
    assert told["url"] == f"{address}/alice/taught"

    code = files["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    code += f"import torch\ntorch.save(model(torch.ones(1, 3, 32, 32)), {str(tmp_path / 'logits')!r})\n"
    python(["-c", code], tmp_path, address)
    ours, _ = load_student(taught / "last.safetensors")
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits"), ours(torch.ones(1, 3, 32, 32)))


def test_the_card_is_of_the_student_that_was_chosen(taught, hub, tmp_path, capsys) -> None:
    place, _ = hub
    copy = Path(shutil.copytree(taught, tmp_path / "copy", symlinks=True))
    card = copy / "README.md"
    card.write_text(card.read_text().replace("library_name: timm", "license: mit\nlibrary_name: timm"))
    card.write_text(f"{card.read_text()}\n## Thanks\n\nTo all.\n")
    result = {**json.loads((copy / "result.json").read_text()), "top1": 40.0, "best_top1": 41.0, "ema_top1": 42.0}
    card.write_text(
        card.read_text().replace(f"value: {json.loads((taught / 'result.json').read_text())['top1']}", "value: 40.0")
    )
    (copy / "result.json").write_text(json.dumps(result))
    for name, top1 in (("last", 40.0), ("best", 41.0), ("ema", 42.0)):
        status, out, err = pushed(capsys, copy, "--checkpoint", name, "--push-to-hub", f"lab/{name}")
        assert status == 0, err
        assert f'timm.create_model("hf-hub:lab/{name}", pretrained=True)' in out
        files = place.files(f"lab/{name}")
        text = files["README.md"].decode()
        header = yaml.safe_load(text.split("---")[1])
        assert header["model-index"][0]["results"][0]["metrics"][0]["value"] == top1
        assert (header["license"], header["library_name"]) == ("mit", "timm")
        assert f'"hf-hub:lab/{name}"' in text
        assert f"`model.safetensors` is the run's `{name}.safetensors`" in text
        assert "local-dir" not in text
        assert text.endswith("\n## Thanks\n\nTo all.\n")
        assert files["model.safetensors"] == (copy / f"{name}.safetensors").read_bytes()
    assert not any(place.private.values())


def test_a_run_made_before_is_pushed_too(hub, tmp_path, capsys) -> None:
    place, _ = hub
    with tarfile.open(ROOT / "tests" / "data" / "made_before_layout.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    whole = tmp_path / "made_before_layout" / "whole"
    assert not (whole / "config.json").exists()
    before = sorted(whole.iterdir())
    status, _, err = pushed(capsys, whole, "--push-to-hub", "alice/old")
    assert status == 0, err
    assert sorted(whole.iterdir()) == before
    for name, content in place.files("alice/old").items():
        (tmp_path / name).write_bytes(content)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).state_dict()
    expected = load_file(whole / "last.safetensors")
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    assert "load_state_dict" not in place.files("alice/old")["README.md"].decode()


def test_what_the_hub_or_the_user_gets_wrong_is_one_message(taught, hub, tmp_path, capsys) -> None:
    place, _ = hub
    place.private["alice/open"], place.commits["alice/open"] = False, [{}]
    odd = Path(shutil.copytree(taught, tmp_path / "odd", symlinks=True))
    (odd / "README.md").write_text("---\n[1, 2\n---\nmine\n")
    cut = Path(shutil.copytree(taught, tmp_path / "cut", symlinks=True))
    (cut / "result.json").unlink()
    cases: list[tuple[list[Any], str, int]] = [
        ([taught, "--push-to-hub", "bob/taught"], "403: You don't have the rights to create a model under 'bob'", 1),
        ([taught, "--push-to-hub", "taught"], "--push-to-hub taught: expected USER/NAME", 1),
        ([taught, "--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: expected USER/NAME", 1),
        ([taught, "--push-to-hub", "alice/--"], "--push-to-hub alice/--: ", 1),
        ([taught, "--push-to-hub", "alice/open", "--private"], "alice/open already exists and is public", 1),
        ([odd, "--push-to-hub", "alice/odd"], "README.md: the YAML header is not a model card's", 1),
        ([cut, "--push-to-hub", "alice/cut"], "no complete run with a model card (README.md)", 1),
        ([taught / "model.safetensors", "--push-to-hub", "alice/x"], "by --checkpoint last, best, ema", 1),
        ([tmp_path / "none", "--push-to-hub", "alice/x"], "no student here", 1),
        ([taught, "--push-to-hub", "alice/x", "--out", "g.onnx"], "--out is for a graph", 2),
        ([taught, "--private"], "--private is for a repository on the Hub; add --push-to-hub USER/NAME", 2),
        ([taught], "Missing option '--shards'", 2),
    ]
    for words, says, expected in cases:
        status, out, err = pushed(capsys, *words, "--json")
        assert status == expected, (words, err)
        assert says in err, (words, err)
        assert "Traceback" not in err
        assert says in json.loads(out)["error"]
    assert place.commits == {"alice/open": [{}]}, "nothing was written"


@pytest.mark.parametrize(
    ("token", "setting", "value", "says"),
    [
        ("", "HF_TOKEN_PATH", "/nowhere", "no token for the Hugging Face Hub\n  Log in with `hf auth login`"),
        ("hf_stale", "HF_TOKEN_PATH", "/nowhere", "401: Invalid username or password.\n  Log in again"),
        (TOKEN, "HF_HUB_OFFLINE", True, "offline mode is enabled"),
        (TOKEN, "ENDPOINT", "http://127.0.0.1:9", "http://127.0.0.1:9: [Errno 111] Connection refused"),
    ],
)
def test_without_a_way_to_the_hub_it_says_so(taught, hub, monkeypatch, capsys, token, setting, value, says) -> None:
    place, _ = hub
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, setting, value)
    status, out, err = pushed(capsys, taught, "--push-to-hub", "alice/taught")
    assert (status, out) == (1, "")
    assert says in err
    assert not place.commits


def test_an_upload_that_fails_leaves_no_commit(taught, hub, capsys) -> None:
    place, _ = hub
    place.refuse_uploads = True
    status, _, err = pushed(capsys, taught, "--push-to-hub", "alice/taught")
    assert status == 1
    assert "alice/taught was not pushed" in err
    assert "507: no room" in err
    assert place.commits == {"alice/taught": [{}]}
