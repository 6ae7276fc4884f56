"""Students of native maps and of resized ones, and of vectors in fewer bits."""

from __future__ import annotations

import torch

from storage.store.store import Store
from student.data.stream import Stream
from tests.conftest import run_precompute, teacher_of
from tests.student.runs import run, weights


def test_a_student_of_native_maps_is_one_of_resized_maps_to_rounding(world, tmp_path):
    """Both in f32: at rest one has the numbers of each stage's own side, the other those of the grid."""
    targets = [f"activations,grid=8,codec=f32,native={native}" for native in ("true", "false")]
    made = run_precompute(tmp_path / "S", world.shards, teacher_of(world.weights, "cnn"), targets)
    store = Store.open(tmp_path / "S")
    native, resized = (store.target(id) for id in made["targets"])
    assert (native.identity.native, resized.identity.native) == (True, False)
    assert native.codec.sample_bytes < resized.codec.sample_bytes
    stream = Stream(world.shards, batch_size=32, store=store, targets=made["targets"])
    for batch in stream:
        torch.testing.assert_close(batch.target(native.id), batch.target(resized.id), rtol=1e-5, atol=1e-5)
    for target in (native, resized):
        run(world, tmp_path / target.id, "aal", f"losses.aal.target={target.id}", "optim.opt=sgd", store=store)
    ours, theirs = weights(tmp_path / native.id), weights(tmp_path / resized.id)
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert torch.allclose(values, theirs[name], rtol=1e-4, atol=1e-5), name
