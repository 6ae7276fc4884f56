"""Runs over many shards that are interrupted or killed, here and on workers: nothing is left over, and they go on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.conftest import HANGS, ROOT, World
from tests.precompute.engine.clusters import SLOW, command, copies, end, markers, processes_of, run, start, until
from tests.precompute.stores import assert_same, attempts, contents, counted, failures, seeded

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("workers", [0, SLOW(2)], ids=["in one process", "on workers"])
@pytest.mark.parametrize("number", [signal.SIGINT, SLOW(signal.SIGTERM)], ids=["SIGINT", "SIGTERM"])
def test_contract_13_an_interrupt_ends_a_run_with_one_message_and_nothing_left_over(
    deit: World, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    place, shards = seeded(deit, tmp_path / "store"), copies(deit.shards, tmp_path / "data", 24)
    process = start(command(deit, place, shards, *(["--workers", str(workers)] if workers else [])))
    try:
        until(lambda: markers(place) or process.poll() is not None, what="no work began")
        assert process.poll() is None, process.communicate()[1].decode()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=HANGS)
        said = err.decode()
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
        assert said.count("error: ") == 1
        assert said.splitlines()[-1].startswith("error: interrupted; completed work is kept"), said
        until(lambda: not processes_of(process.pid), "a child process was left")
    finally:
        end(process)
    done = markers(place)
    assert 0 < done < 24 * 6
    assert attempts(place) == counted(place)
    assert not run(deit, place, shards)[0]["failures"]
    assert markers(place) == 24 * 6
    assert attempts(place) == counted(place)
    assert not failures(place, [])


@pytest.mark.long
def test_contract_3_ten_kills_at_random_moments_and_the_same_command_each_time(deit: World, tmp_path: Path) -> None:
    shards = copies(deit.shards, tmp_path / "data", 30)
    undisturbed = seeded(deit, tmp_path / "undisturbed")
    run(deit, undisturbed, shards)
    chance = random.Random(7)
    place = tmp_path / "store"
    hits = 0
    for number in range(10):
        if markers(place) == 30 * 6:
            place = tmp_path / f"store-{number}"  # complete already: the next ones hit another store
        said = tmp_path / f"said-{number}"
        before = markers(place)
        with said.open("wb") as file:
            words = command(deit, place, shards, *(["--workers", "2"] if number % 2 else []))
            process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=file, stderr=file)
        if number in (4, 7):  # while it starts: imports, the export, the workers
            time.sleep(chance.uniform(0, 6))
        else:
            until(lambda said=said: ": 30 shard(s)" in said.read_text())  # type: ignore[misc]
            time.sleep(chance.uniform(0, 1))
        working = process.poll() is None and ": 30 shard(s)" in said.read_text()
        end(process)
        hits += working
        print(f"kill {number}: {'at work' if working else 'not at work'}, {before} -> {markers(place)} markers")
    places = [path for path in tmp_path.glob("store*") if path.is_dir()]
    for left in places:
        done = subprocess.run(command(deit, left, shards), cwd=ROOT, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert_same(contents(left), contents(undisturbed))
        assert not failures(left, shards)
    print(f"{hits} of 10 kills hit while work was going on, {len(places)} store(s)")
    assert hits >= 6
