"""Selective links: Table 1, ranges, Algorithm 1; pruned links stay zero; the links of a run are read safely."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from precompute.taps import Tap, TappedTeacher
from storage.errors import IdentityError, UserError
from student.alignment.student_spec import StudentSpec
from student.losses.aal import AAL, AALConfig, AALLoss
from student.losses.parts import aal_links
from student.losses.parts.aal_links import Layout
from student.recipe import validate
from student.settings import LinksConfig
from tests.manifests import stored
from tests.student.losses.test_aal import printed
from tests.student.runs import run, same, u8
from tests.student.training.test_resume import Cut, cut_after
from tests.typed import present

if TYPE_CHECKING:
    from pathlib import Path

    from student.targets.stored_target import StoredTarget

B3 = Layout(tuple(range(1, 8)), (24, 32, 48, 96, 136, 232, 384), (6,) * 12)
SMALL = Layout((1, 2), (3, 2), (2, 2, 2))
DEIT_S = StudentSpec(12, 6, 14, ("class", "distillation"))


def kept(wish: Any, layout: Layout = B3, stages: int = 7) -> aal_links.Kept:
    return aal_links.kept("aal", AALConfig(links=wish).links, layout, stages)


def chosen(wish: Any, layout: Layout = B3, stages: int = 7) -> torch.Tensor:
    """Which links are kept, where some are not."""
    return present(kept(wish, layout, stages).choice)


def given(layout: Layout = B3, grid: int = 14) -> StoredTarget:
    stages = [{"stage": n, "tap": "", "channels": c} for n, c in zip(layout.stages, layout.channels, strict=True)]
    shape = [sum(layout.channels), grid, grid]
    return stored("activations", shape, teacher={"layers": max(layout.stages)}, grid=grid, stages=stages)


# ---------------------------------------------------------------------------------------------- Table 1 and ranges


def test_efficientnet_b3_is_what_table_1_speaks_of():
    maps, half = Tap("activations", grid=14), (0.5,) * 3
    teacher = TappedTeacher(timm.create_model("efficientnet_b3"), [maps], 64, input_size=64, mean=half, std=half)
    assert tuple(count for *_, count, _ in teacher.stages(teacher.taps[0])) == B3.channels
    assert sum(B3.channels) == 952


@pytest.mark.parametrize(
    ("name", "by_stage"),
    [
        ("alpha", [432, 960, 864, 1728, 2448, 8352, 13824]),
        ("beta", [288, 960, 864, 1728, 3264, 6960, 9216]),
    ],
)
def test_link_counts_of_the_paper(name: Any, by_stage: list[int]):
    found, choice = kept(name), chosen(name)
    counts = [int(part.sum()) for part in torch.split(B3.spread(choice), list(B3.channels))]
    assert counts == by_stage
    assert B3.count(choice) == {"alpha": 28_608, "beta": 23_280}[name]
    assert f"{sum(by_stage):,} of 68,544 weights, 952 biases" in found.words
    method = AALLoss("aal", AALConfig(links=name), DEIT_S, [given()])
    assert int((method.aal.links.weight != 0).sum()) == sum(by_stage)
    assert method.aal.links.weight.numel() == 68_544


def test_full_links_are_all_of_them():
    assert kept("full").choice is None
    assert "68,544" in present(AALLoss("aal", AALConfig(), DEIT_S, [given()]).row).rule.replace("69,496", "68,544")
    assert aal_links.ranges_of(torch.ones(952, 12, dtype=torch.bool), B3) == [[1, 12]] * 7


def test_ranges_are_the_table_s_and_come_back_as_they_were_said():
    for name, table in aal_links.TABLE.items():
        assert torch.equal(chosen([list(pair) for pair in table]), chosen(name))
        assert aal_links.ranges_of(chosen(name), B3) == [list(pair) for pair in table]
    some = chosen([[2, 3], None], SMALL, 2)
    assert some.tolist() == [[False, True, True]] * 3 + [[False] * 3] * 2
    assert aal_links.ranges_of(some, SMALL) == [[2, 3], None]
    some[0, 0] = True
    assert aal_links.ranges_of(some, SMALL) is None, "channels of one stage differ"
    assert aal_links.ranges_of(torch.tensor([[True, False, True]] * 5), SMALL) is None, "a gap"


def test_a_target_of_some_stages_takes_their_rows_of_the_table():
    part = Layout((4, 6), (96, 232), (6,) * 12)
    choice = chosen("alpha", part, 7)
    assert aal_links.ranges_of(choice, part) == [[4, 6], [6, 11]]


@pytest.mark.parametrize(
    ("wish", "layout", "stages", "says"),
    [
        ("alpha", SMALL, 2, "Table 1 is for a teacher of 7 stages and a student of 12 layers; here are 2 and 3"),
        ("beta", Layout(B3.stages, B3.channels, (6,) * 11), 7, "here are 7 and 11"),
        ([[1, 3]], SMALL, 2, "1 ranges of layers for the target's 2 stages"),
        ([[1, 4], None], SMALL, 2, "stage 1: layers 1 to 4; the student has layers 1 to 3"),
        ([None, [3, 2]], SMALL, 2, "stage 2: layers 3 to 2"),
        ([[0, 2], None], SMALL, 2, "stage 1: layers 0 to 2"),
        ([None, None], SMALL, 2, "no stage is linked to any layer"),
        ("alfa", B3, 7, "alfa: no links here .losses.safetensors is missing.*full, alpha, beta"),
    ],
)
def test_links_that_do_not_fit_are_refused(wish, layout, stages, says):
    with pytest.raises(UserError, match=says):
        kept(wish, layout, stages)


# ---------------------------------------------------------------------------------------------- Algorithm 1


def algorithm_1(w: torch.Tensor, threshold: float) -> set[tuple[int, int]]:
    """As it is printed, with loops, on w[c, m, n]."""
    low, high = w.min(), w.max()
    w = (w - low) / (high - low)
    return {(c, n) for c in range(w.shape[0]) for n in range(w.shape[2]) if w[c, :, n].abs().mean() > threshold}


def settings(**changes: Any) -> LinksConfig:
    return LinksConfig(run="somewhere", **changes)


@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.5])
def test_algorithm_1_as_printed(threshold):
    torch.manual_seed(0)
    trained = torch.randn(5, 6)
    found = aal_links.extracted(trained, SMALL, settings(normalize="printed", threshold=threshold))
    heads_first = trained.unflatten(1, (3, 2)).transpose(1, 2)
    assert {(c, n) for c, n in found.nonzero().tolist()} == algorithm_1(heads_first.double(), threshold)


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_algorithm_1_as_printed_keeps_every_link_and_abs_does_not(law):
    torch.manual_seed(0)
    shape = (952, 72)
    trained = torch.randn(shape) if law == "gaussian" else torch.distributions.Laplace(0, 1).sample(shape)
    trained *= 0.02
    trained[:400, :36] *= 1e-3  # links that training let go
    assert aal_links.extracted(trained, B3, settings(normalize="printed")).all()
    pruned = aal_links.extracted(trained, B3, settings(normalize="abs"))
    assert not pruned[:400, :6].any()
    assert pruned[400:].float().mean() > 0.8


def test_links_that_differ_by_rounding_alone_are_none_above_the_others():
    even = torch.full((5, 6), 0.1) + 1e-8 * torch.arange(30.0).view(5, 6) % 4e-8
    assert len(even.unique()) > 1
    for normalize in ("abs", "printed"):
        assert not aal_links.extracted(even, SMALL, settings(normalize=normalize)).any()


def test_blocks_are_kept_whole_and_give_ranges():
    torch.manual_seed(0)
    trained = 0.01 * torch.randn(5, 6)
    trained[:3, 2:4] += 1
    trained[3:, :4] += 1
    by_block = aal_links.extracted(trained, SMALL, settings(granularity="block"))
    assert aal_links.ranges_of(by_block, SMALL) == [[2, 2], [1, 2]]
    trained[3, 0:2] = 0
    assert aal_links.ranges_of(aal_links.extracted(trained, SMALL, settings()), SMALL) is None
    assert aal_links.ranges_of(aal_links.extracted(trained, SMALL, settings(granularity="block")), SMALL) == [
        [2, 2],
        [1, 2],
    ]


def test_the_heat_map_is_the_mean_magnitude_over_channels_and_heads():
    trained = torch.randn(5, 6, dtype=torch.float64)
    for s, rows in enumerate((slice(0, 3), slice(3, 5))):
        for n in range(3):
            block = trained[rows, 2 * n : 2 * n + 2]
            assert SMALL.heat(trained)[s, n].item() == pytest.approx(block.abs().mean().item())
    pit = Layout((1,), (5,), (1, 2, 3))
    assert pit.heat(trained)[0, 2].item() == pytest.approx(trained[:, 3:].abs().mean().item())


# ---------------------------------------------------------------------------------------------- pruned links


def some(choice: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, AAL]:
    torch.manual_seed(0)
    maps = torch.rand(4, 6, 16, dtype=torch.float64).softmax(-1)
    made = AAL(6, 5, kept=None if choice is None else SMALL.spread(choice).double())
    return maps, torch.randn(4, 5, 4, 4, dtype=torch.float64), made.double()


def test_pruned_links_give_the_printed_loss_of_what_is_left_and_gradients_to_it_alone():
    choice = chosen([[1, 2], [2, 3]], SMALL, 2)
    maps, activations, aal = some(choice)
    maps.requires_grad_()
    loss = aal(maps, activations)
    expected = printed(aal, maps, activations)["mse"]
    assert torch.allclose(loss, expected, rtol=1e-9)
    found = torch.autograd.grad(loss, [maps, *aal.parameters()])
    wanted = torch.autograd.grad(expected, [maps, *aal.parameters()])
    mask = SMALL.spread(choice).bool()[:, :, None]
    assert torch.allclose(found[0], wanted[0], rtol=1e-6, atol=1e-10)
    assert torch.allclose(found[1][mask], wanted[1][mask], rtol=1e-6, atol=1e-10)
    assert (found[1][~mask] == 0).all()
    assert (wanted[1][~mask] != 0).any(), "without the mask they would learn"
    assert torch.autograd.gradcheck(lambda x: aal(x, activations), (maps,))


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "nadamw", "lion"])
def test_pruned_links_stay_zero_under_decay_and_momentum(opt):
    from timm.optim import create_optimizer_v2

    choice = chosen([[1, 2], None], SMALL, 2)
    maps, activations, aal = some(choice)
    mask = SMALL.spread(choice).bool()[:, :, None]
    optimizer = create_optimizer_v2(aal, opt=opt, lr=0.05, weight_decay=0.1, momentum=0.9)
    before = aal.links.weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        aal(maps, activations).backward()
        optimizer.step()
    assert (aal.links.weight[~mask] == 0).all()
    assert (aal.links.weight[mask] != before[mask]).all()


def test_pruned_links_stay_zero_in_a_run_that_is_cut_off_and_resumed(world, tmp_path):
    ranges = "losses.aal.links=[[1, 1], [1, 2], [2, 2], null]"
    full = [u8(world), ranges, "model_ema_decay=0.9", "checkpoint_interval=3"]
    run(world, tmp_path / "whole", "aal", *full)
    with pytest.MonkeyPatch.context() as patch:
        cut_after(patch, 4)  # a checkpoint is kept after three
        with pytest.raises(Cut):
            run(world, tmp_path / "cut", "aal", *full)
    run(world, tmp_path / "cut", "aal", *full, resume=True)
    assert same(tmp_path / "whole", tmp_path / "cut")
    trained = aal_links.read(tmp_path / "cut", None)
    assert trained.layout == Layout((1, 2, 3, 4), (8, 12, 16, 24), (3, 3))
    choice = aal_links.ranged([(1, 1), (1, 2), (2, 2), None], trained.layout, "here")
    mask = trained.layout.spread(choice).bool()
    assert (trained.weights[~mask] == 0).all()
    assert (trained.weights[mask] != 0).all()


# ---------------------------------------------------------------------------------------------- links of a run


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with full links."""
    out = tmp_path_factory.mktemp("links") / "full"
    run(world, out, "aal", u8(world))
    return out


def test_a_run_says_what_its_links_join(world, trained):
    found = aal_links.read(trained, None)
    assert found.layout == Layout((1, 2, 3, 4), (8, 12, 16, 24), (3, 3))
    assert (found.loss, found.target) == ("aal", world.targets["activations u8"])
    assert torch.equal(found.weights, load_file(trained / "losses.safetensors")["aal.aal.links.weight"][:, :, 0])


def test_links_of_a_run_train_another_and_are_part_of_what_it_is(world, trained, tmp_path):
    state = load_file(trained / "losses.safetensors")
    full, out = copy(trained, tmp_path / "full", state), tmp_path / "selected"
    wish = [u8(world), f"losses.aal.links={full}", "losses.aal.links.threshold=0.3", "optim.epochs=1"]
    run(world, out, "aal", *wish)
    of = aal_links.read(trained, None)
    choice = aal_links.extracted(of.weights, of.layout, settings(threshold=0.3))
    assert 0 < choice.float().mean() < 1
    assert torch.equal(aal_links.read(out, None).weights != 0, of.layout.spread(choice).bool())
    assert len(json.loads((out / "run.json").read_text())["links"]["aal"]) == 64
    run(world, out, "aal", *wish, resume=True)
    (full / "losses.safetensors").unlink()
    full.rmdir()
    copy(trained, full, {name: 2 - tensor for name, tensor in state.items()})
    with pytest.raises(IdentityError) as caught:
        run(world, out, "aal", *wish, resume=True)
    assert caught.value.field == "links.aal"


def test_printed_says_that_it_keeps_everything(world, trained):
    found = aal_links.kept(
        "aal", LinksConfig(run=str(trained), normalize="printed"), aal_links.read(trained, None).layout, 4
    )
    assert present(found.choice).all()
    assert "360 of 360 weights, all of them (printed puts a weight of 0 near the middle" in found.words


def test_another_shape_nothing_kept_and_a_smoke_run_are_refused(world, trained, tmp_path):
    layout = aal_links.read(trained, None).layout
    wish = LinksConfig(run=str(trained))
    with pytest.raises(
        UserError, match=r"join 8 \+ 12 \+ 16 \+ 24 maps and 2 layers of 3 heads; this run has 24 \+ 32"
    ):
        aal_links.kept("aal", wish, B3, 7)
    with pytest.raises(UserError, match=r"none is kept\n.*`losses.aal.links.threshold"):
        aal_links.kept("aal", LinksConfig(run=str(trained), threshold=0.999), layout, 4)
    smoke = copy(trained, tmp_path / "smoke", load_file(trained / "losses.safetensors"))
    (smoke / "SMOKE").write_text("")
    with pytest.raises(UserError, match="comes from a smoke run, whose links are untrained"):
        aal_links.kept("aal", LinksConfig(run=str(smoke)), layout, 4)


def copy(of: Path, to: Path, state: dict[str, torch.Tensor], **notes: str) -> Path:
    """A folder with other links and what is said of them."""
    to.mkdir()
    with safe_open(of / "losses.safetensors", "pt") as file:
        metadata = {**file.metadata(), **notes}
    save_file(state, to / "losses.safetensors", {name: text for name, text in metadata.items() if text})
    return to


GOOD = {"stages": [1], "channels": [60], "heads": [3, 3], "target": "t"}


@pytest.mark.parametrize(
    "note",
    [
        "",
        "[",
        "7",
        "[]",
        "{}",
        json.dumps({**GOOD, "heads": [3, 2]}),
        json.dumps({**GOOD, "heads": "33"}),
        json.dumps({**GOOD, "channels": [10**9]}),
        json.dumps({**GOOD, "channels": [-60]}),
        json.dumps({**GOOD, "stages": [1, 2]}),
        json.dumps({**GOOD, "target": 7}),
        json.dumps({**GOOD, "heads": []}),
        "[" * 100_000,
        json.dumps({**GOOD, "channels": [60.0]}),
    ],
    ids=range(14),
)
def test_what_a_hostile_file_says_of_its_links_ends_in_one_error(trained, tmp_path, note):
    state = load_file(trained / "losses.safetensors")
    folder = copy(trained, tmp_path / "x", state, aal=note)
    with pytest.raises(UserError, match=r"losses\.safetensors"):
        aal_links.read(folder, None)


def test_hostile_links_end_in_one_error(trained, tmp_path):
    name, state = "aal.aal.links.weight", load_file(trained / "losses.safetensors")
    for i, other in enumerate(
        (state[name] / 0, state[name].half(), state[name][:, :, 0], state[name][:5], state[name].long())
    ):
        with pytest.raises(UserError, match=r"expected finite torch.float32"):
            aal_links.read(copy(trained, tmp_path / str(i), {**state, name: other}), None)
    for text in (b"", b"\0" * 100, b"\xff" * 8 + b"{}", (trained / "losses.safetensors").read_bytes()[:-9]):
        (tmp_path / "0" / "losses.safetensors").write_bytes(text)
        with pytest.raises(UserError, match="cannot be read"):
            aal_links.read(tmp_path / "0", None)
    (tmp_path / "0" / "losses.safetensors").unlink()
    (tmp_path / "0" / "losses.safetensors").mkdir()
    for place in (tmp_path / "0", tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(UserError):
            aal_links.read(place, None)
    with pytest.raises(UserError, match="the run had no aal loss"):
        aal_links.read(copy(trained, tmp_path / "else", {"other": torch.ones(1)}), None)
    two = copy(trained, tmp_path / "two", {**state, "b.aal.links.weight": state[name].clone()})
    with pytest.raises(UserError, match=r"has links of aal, b\n  Choose one: `losses.x.links.loss=NAME`"):
        aal_links.read(two, None, "losses.x.links")
    with pytest.raises(UserError, match=r"no links of 'all'.*Did you mean 'aal'"):
        aal_links.read(two, "all")


def test_links_are_said_in_many_ways_and_nothing_else_is_taken():
    def of(value: Any) -> Any:
        losses: dict[str, Any] = validate.validate({"losses": {"aal": {"links": value}}}, "r").losses
        return losses["aal"].links

    assert of("alpha") == "alpha"
    assert of("runs/full") == LinksConfig(run="runs/full")
    assert of([[1, 2], None]) == ((1, 2), None)
    assert of({"run": "r", "granularity": "block"}).granularity == "block"
    for wrong in (
        7,
        [[1]],
        [["a", 2]],
        {"granularity": "block"},
        {"run": "r", "normalize": "no"},
        [1, 3],
        {"run": "r", "threshold": 1},
    ):
        with pytest.raises(UserError, match=r"losses.aal.links: expected full, alpha, beta, a run's folder"):
            of(wrong)


def test_short_forms_of_settings_grow_when_a_part_is_said():
    from pipeline.recipes.loader import load_recipe

    settings = ["losses.aal.links=runs/full", "losses.aal.links.normalize=printed"]
    losses: dict[str, Any] = load_recipe("aal", settings).losses
    assert losses["aal"].links == LinksConfig(run="runs/full", normalize="printed")
