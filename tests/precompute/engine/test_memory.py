"""The memory that a task takes: as much for any length of the shard, and bounded for large photos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from storage.testing import synthetic_image
from tests.conftest import HANGS, ROOT
from tests.precompute.bare import bare, encoded, tar

if TYPE_CHECKING:
    from pathlib import Path

    from precompute.engine.tasks import ShardTask

MEASURED = """
import json, pickle, sys
from precompute.engine.session import open_session
from precompute.engine.shard import run_task

with open(sys.argv[1], "rb") as file:
    task = pickle.load(file)

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) / 1024

session = open_session(task.store.graph(task.teacher, task.graph), "cpu", 1)
before = status("VmRSS")
outcome = run_task(task, lambda: session, 2)
assert "torch" not in sys.modules
print(json.dumps({"samples": len(outcome.shard), "before": before, "peak": status("VmHWM")}))
"""


def peak(task: ShardTask, folder: Path) -> dict[str, float]:
    """MiB before and at the peak of a task in a process that does nothing else."""
    import pickle

    path = folder / "task.pickle"
    path.write_bytes(pickle.dumps(task))
    words = [sys.executable, "-c", MEASURED, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, env=environment, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, float] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_contract_7_the_peak_of_memory_does_not_depend_on_the_length_of_the_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [encoded(synthetic_image(label, rng)) for label in range(10)]
    made = bare(tmp_path / "store")
    short, long = (peak(made.task(tar(tmp_path / f"{n}.tar", n, images)), tmp_path) for n in (500, 5000))
    assert (short["samples"], long["samples"]) == (500, 5000)
    ratio = long["peak"] / short["peak"]
    print(
        f"peak {short['peak']:.0f} MiB for 500, {long['peak']:.0f} MiB for 5,000 samples: {ratio:.3f}; "
        f"{short['before']:.0f} MiB before"
    )
    assert ratio <= 1.15


@pytest.mark.slow
def test_contract_7_large_photos_stay_within_bounds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (750, 1000, 3), np.uint8))
    photo = encoded(small.resize((4000, 3000), Image.Resampling.BICUBIC), "JPEG", quality=85)
    made = bare(tmp_path / "store", size=224)
    found = peak(made.task(tar(tmp_path / "photos.tar", 80, [photo], "jpg"), views=1), tmp_path)
    print(f"80 photos of {len(photo) / 2**20:.1f} MiB: peak {found['peak']:.0f} MiB, {found['before']:.0f} MiB before")
    assert found["peak"] < 1200
