"""Draws of `deit`: rows that hold them, boxes in their ranges, chances as they should be, partners of the block."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from storage.rng import generator
from storage.views.draw import TRIES, draw_view, settle
from storage.views.policy import policy
from storage.views.randaugment import draw_operations
from storage.views.view import COLUMNS, CUTMIX, INVALID, MIXUP, View
from tests.storage.views.operations import DEIT, LINES, NUMBERS

# ---------------------------------------------------------------------------------------------- rows


def test_a_drawn_view_is_the_row_that_it_makes():
    for i, line in enumerate(LINES * 150):
        view = draw_view(
            policy(line, 64, i), f"{i}", i % 9, (1 + i * 7 % 400, 1 + i * 13 % 300), i=i % 22, block=range(22)
        )
        row = view.row()
        assert View.of(row) == view
        assert View.of(np.frombuffer(row.tobytes(), "<f8")) == view
        assert View.of(row).row().tobytes() == row.tobytes()
        told = dict(zip(COLUMNS, row, strict=True))
        assert told["partner"] == (view.mix.partner if view.mix else -1)
        assert (told["op1"], told["op2"]) == tuple([n for n, _ in view.operations] + [0, 0])[:2]


def test_all_that_is_drawn_for_mixing_and_erasing_is_whole_numbers():
    """The C library's last bits, which differ between processors, must have nothing to decide."""
    whole = [COLUMNS.index(name) for name in COLUMNS if not name.startswith("magnitude")]
    for view in views_of("deit", 300):
        assert np.array_equal(view.row()[whole], np.rint(view.row()[whole]))
    assert 0 <= max(view.erase_seed for view in views_of("deit", 300)) < 2**32


# ---------------------------------------------------------------------------------------------- what is drawn


def views_of(line: str, count: int, side: int = 224, size: tuple[int, int] = (500, 375), n: int = 64) -> list[View]:
    drawn_from = policy(line, side, 11)
    return [draw_view(drawn_from, f"{i}", 0, size, i=i % n, block=range(n)) for i in range(count)]


@pytest.mark.parametrize("size", [(500, 375), (32, 32), (64, 90)])
@pytest.mark.parametrize("scale", [(0.08, 1), (0.5, 0.6)])
def test_a_crop_lies_in_the_image_with_its_area_and_aspect_ratio_in_range(size, scale):
    areas, ratios = [], []
    for view in views_of(f"rrc({scale[0]},{scale[1]})", 400, size=size):
        left, top, right, bottom = view.box
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert view.box == tuple(map(round, view.box))
        areas.append((right - left) * (bottom - top) / (size[0] * size[1]))
        ratios.append((right - left) / (bottom - top))
    slack = 1 + 1.5 / (min(size) * math.sqrt(scale[0]))  # sides are rounded to whole pixels
    assert scale[0] / slack <= min(areas)
    assert max(areas) <= scale[1] * slack
    assert 3 / 4 / slack <= min(ratios)
    assert max(ratios) <= 4 / 3 * slack
    if scale == (0.08, 1):
        assert min(areas) < 0.12
        assert max(areas) > 0.7  # large boxes of an extreme ratio do not fit
        assert np.median(ratios) == pytest.approx(1, abs=0.05), "log-uniform: as often wide as tall"


@pytest.mark.parametrize(
    ("size", "box"),
    [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506)), ((30, 1), (14, 0, 15, 1)), ((1, 1), None)],
)
def test_where_no_crop_fits_the_largest_allowed_one_in_the_middle_is_taken(size, box):
    found = {view.box for view in views_of("rrc(0.9,1)", 50, size=size)}
    assert found == {box or (0, 0, 1, 1)}
    assert TRIES == 10


def test_erased_boxes_lie_in_the_view_as_often_and_as_large_as_they_should():
    for side, p in ((224, 0.25), (32, 0.25), (32, 1.0)):
        views = views_of(f"resize|erase({p})", 1500, side=side)
        boxes = [view.erased for view in views if view.erased != (0, 0, 0, 0)]
        assert abs(len(boxes) / 1500 - p) <= 4 * math.sqrt(p * (1 - p) / 1500) + 0.001
        slack = 1 + 1.5 / (side * math.sqrt(0.02 * 0.3))
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            assert 0.02 / slack <= (right - left) * (bottom - top) / side**2 <= slack / 3
            assert 0.3 / slack <= (right - left) / (bottom - top) <= slack / 0.3
        ratios = sorted((right - left) / (bottom - top) for left, top, right, bottom in boxes)
        assert ratios[0] < 0.45
        assert ratios[-1] > 1 / 0.45
        assert 0.75 < ratios[len(ratios) // 2] < 1 / 0.75
        assert all(view.erase_seed == 0 for view in views if view.erased == (0, 0, 0, 0))
        assert len({view.erase_seed for view in views}) >= len(boxes)


def test_a_side_too_small_to_erase_a_part_of_is_left_alone():
    assert {view.erased for view in views_of("resize|erase(1)", 20, side=1)} == {(0, 0, 0, 0)}


def test_randaugment_draws_two_operations_each_with_half_and_all_of_them_alike():
    drawn = [draw_operations(generator("ra", i), 9, 0.5) for i in range(4000)]
    counts = np.bincount([len(chosen) for chosen in drawn], minlength=3) / 4000
    assert np.allclose(counts, [0.25, 0.5, 0.25], atol=0.035)
    each = np.bincount([number for chosen in drawn for number, _ in chosen], minlength=16)[1:] / 4000
    assert np.allclose(each, 1 / 15, atol=5 * math.sqrt(1 / 15 / 4000))
    rotated = np.array([argument for chosen in drawn for number, argument in chosen if number == NUMBERS["rotate"]])
    assert np.abs(rotated).mean() == pytest.approx(27, abs=0.5)
    assert np.abs(rotated).std() == pytest.approx(1.5, abs=0.4)
    assert abs((rotated > 0).mean() - 0.5) < 0.15
    assert max(np.abs(rotated)) <= 30


def test_half_of_the_mixed_views_is_blended_and_half_is_cut():
    mixes = [view.mix for view in views_of("resize|mix(0.8,1)", 3000)]
    kinds = np.bincount([mix.kind if mix else 0 for mix in mixes], minlength=3) / 3000
    assert abs(kinds[MIXUP] - 0.5) < 0.04
    assert abs(kinds[CUTMIX] - 0.5) < 0.04
    shares = np.array([mix.amount / 256 if mix else 0 for mix in mixes if not mix or mix.kind == MIXUP])
    assert shares.mean() == pytest.approx(0.5, abs=0.04)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(0.8, 0.8)


def test_one_alpha_of_zero_leaves_the_other_kind():
    for line, kind in (("mix(0.8,0)", MIXUP), ("mix(0,1)", CUTMIX)):
        assert {view.mix.kind for view in views_of(f"resize|{line}", 200) if view.mix} == {kind}


@pytest.mark.parametrize("side", [1, 2, 7, 32, 224])
def test_the_amount_of_cutmix_is_the_share_of_its_box(side):
    for view in views_of("resize|mix(0,1)", 400, side=side):
        if view.mix:
            left, top, right, bottom = view.mix.box
            assert 0 <= left < right <= side
            assert 0 <= top < bottom <= side
            assert view.mix.amount == round(256 * (right - left) * (bottom - top) / side**2) > 0


@pytest.mark.parametrize(("start", "n"), [(0, 64), (64, 9), (128, 2), (5, 3)])
def test_partners_are_others_of_the_block_and_all_of_them_alike(start, n):
    block = range(start, start + n)
    drawn_from, chosen = policy("resize|mix(1,0)", 8), np.zeros((n, n))
    for number in range(3000):
        i = start + number % n
        mix = draw_view(drawn_from, f"{number}", 0, (8, 8), i=i, block=block).mix
        if mix:
            assert mix.partner in block
            assert mix.partner != i
            chosen[i - start, mix.partner - start] += 1
    assert chosen.trace() == 0
    totals = chosen.sum(0)
    expected = totals.sum() / n
    assert (np.abs(totals - expected) < 5 * math.sqrt(expected) + 1).all()


def test_a_block_of_one_mixes_nothing_and_the_rest_of_the_view_does_not_depend_on_the_block():
    for i in range(100):
        alone = draw_view(DEIT, f"{i}", 0, (90, 70), i=64, block=range(64, 65))
        among = draw_view(DEIT, f"{i}", 0, (90, 70), i=64, block=range(64, 128))
        last = draw_view(DEIT, f"{i}", 0, (90, 70), i=127, block=range(64, 128))
        assert alone.mix is None
        assert replace(among, mix=None) == alone == replace(last, mix=None)
        if among.mix and last.mix:
            assert replace(among.mix, partner=0) == replace(last.mix, partner=0)
            assert among.mix.partner == last.mix.partner + 1, "the same place among the others"


def test_an_invalid_partner_takes_the_mixing_away_and_nothing_else():
    block, touched = range(64, 84), 0
    for number in range(5):
        views = [draw_view(DEIT, f"{i}", number, (90, 70), i=i, block=block) for i in block]
        views[5] = views[11] = INVALID
        settled = settle(views, block)
        for before, after in zip(views, settled, strict=True):
            if before.mix and before.mix.partner in (69, 75):
                touched += 1
                assert after == replace(before, mix=None)
            else:
                assert after == before
        assert settle(settled, block) == settled
    assert touched > 3
