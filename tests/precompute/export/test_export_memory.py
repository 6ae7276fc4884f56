"""What an export takes: the network, its graph and a session of it are not in memory together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MEASURE = """
import sys
from pathlib import Path
import numpy as np
import timm
from precompute.engine.session import open_session
from precompute.export import pytorch
from precompute.taps import Tap
from precompute.teachers.teacher import Teacher

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

half = (0.5, 0.5, 0.5)
images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)

def export(dim, depth):
    arguments = {"img_size": 32, "embed_dim": dim, "depth": depth, "num_heads": 8, "num_classes": 0}
    about = dict(name="it", model="vit_base_patch16_224", weights=None, digest="0", input_size=32, mean=half, std=half)
    network = timm.create_model(about["model"], **arguments).eval().requires_grad_(False)
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    file = Path(sys.argv[1]) / "graph.onnx"
    teacher = Teacher(arguments=arguments, **about)
    pytorch.export(teacher, [Tap("class_token")], 32, images, file=file, network=network)
    return weights

export(64, 1)  # all is imported
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
weights = export(1536, 6)
print(weights, status("VmHWM") - before, status("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read as Linux tells it"
)
def test_an_export_takes_little_more_than_the_network_and_leaves_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    weights, peak, left = map(int, done.stdout.split())
    assert weights > 600e6
    assert peak < 1.6 * weights
    assert left < 0.2 * weights
