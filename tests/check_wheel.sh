#!/usr/bin/env bash
# Builds sdist and wheel and uses the wheel where the checkout cannot be seen: commands, Python names, a store.
# check_wheel.sh PYTHON: of an environment that has the dependencies and `build`.
set -euo pipefail
python=$1
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
"$python" -m build --no-isolation --outdir "$work/dist" "$here" > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }

# A new environment with nothing but the wheel; the dependencies lie behind it, without the checkout that they were installed with.
"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/dist/*.whl
site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))" > "$site/dependencies.pth"

cd "$work"
PATH="$work/venv/bin:$PATH"
python - "$site" << 'END'
import sys
from pathlib import Path

import pipeline, precompute, storage, student
from safetensors.torch import save_file

for package in (pipeline, precompute, storage, student):
    folder = Path(package.__file__).parent
    assert folder.parent == Path(sys.argv[1]), f"{folder} is not what was installed"
    assert (folder / "py.typed").is_file()
    for name in package.__all__:
        getattr(package, name)

import timm
from storage.testing import synthetic_shards

synthetic_shards("shards", 1, 64)
save_file(timm.create_model("test_vit").state_dict(), "teacher.safetensors")
END
pipeline --help > help.txt
pipeline --version | tee version.txt
grep -qF "$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")" version.txt
pipeline recipes aal-small > recipe.yaml
pipeline precompute --teacher test_vit --weights teacher.safetensors --shards shards/shard-000000.tar --store store \
  --view-policy light --view-size 32 --num-views 1 --target class_token --provider cpu
pipeline verify --store store
