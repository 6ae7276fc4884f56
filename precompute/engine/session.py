"""Sessions: ONNX Runtime over an exported graph, and what it really runs on. No torch here."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from dask.system import CPU_COUNT  # that this process may use: honors affinity and the limits of containers

from precompute.engine.tasks import SessionSettings
from storage.errors import UserError, first_line, setting
from storage.memory import in_own_heap

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from onnx import ModelProto, TensorProto

# Images of one run; outputs do not depend on it. On a CPU small runs side by side, each on a thread of its own, are up
# to 1.6 times as fast as larger ones, one after another, on all threads: what they work on stays in the core's cache.
BATCH = {"cpu": 2, "cuda": 16}
SIDE_BY_SIDE = 16  # runs, at most: each takes memory
OPTIMIZATION = "all"
# Where the other files lie beside the first; up to 2 GB.
MERGE = "python -c \"import onnx; onnx.save(onnx.load('model.onnx'), 'whole.onnx')\""


class Session:
    """One ONNX Runtime session, and what it really runs on."""

    def __init__(
        self, session: Any, provider: str, version: str = "", name: str = "images", side_by_side: int = 1
    ) -> None:
        self._session, self._input, self._batch = session, name, BATCH[provider]
        self._threads = ThreadPoolExecutor(side_by_side, "session") if side_by_side > 1 else None
        self.settings = SessionSettings(
            onnxruntime=version, provider=provider, precision="float32", optimisation=OPTIMIZATION, tf32=False
        )

    def run(self, images: np.ndarray) -> list[np.ndarray]:
        """The outputs, f32 `[n, …]` each, of uint8 images `[n, S, S, 3]`."""
        pieces = [{self._input: images[i : i + self._batch]} for i in range(0, len(images), self._batch)]
        run = functools.partial(self._session.run, None)
        parts = self._threads.map(run, pieces) if self._threads else map(run, pieces)
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def open_session(graph: bytes | Path, provider: str = "auto", threads: int | None = None) -> Session:
    """A session on a provider: `cpu`, `cuda`, or `auto` for CUDA where it works and else the CPU.

    On a CPU it takes so many threads, by default one a core. A graph in a file takes less memory than its bytes do.

    Raises:
        UserError: onnxruntime is not installed, the graph is not one, or CUDA was requested and is not available.
    """
    try:
        import onnxruntime
    except ImportError:
        hint = "Install this package with the extra `cpu` or `gpu`."
        raise UserError("onnxruntime is not installed", hint=hint) from None
    _require_one_file(graph)
    onnxruntime.set_default_logger_severity(4)  # what it would say of errors comes with them
    options = onnxruntime.SessionOptions()
    threads = threads or CPU_COUNT
    side_by_side = min(threads, SIDE_BY_SIDE)
    options.intra_op_num_threads = threads - side_by_side + 1  # a pool that the runs share, each caller beside it
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    have_cuda = cuda in onnxruntime.get_available_providers()
    if provider == "cuda" and not have_cuda:
        hint = f"Install this package with the extra `gpu` in place of `cpu`, or give {setting('provider', 'auto')}"
        raise UserError("this onnxruntime has no CUDA", setting=setting("provider", "cuda"), hint=hint)
    first = [(cuda, {"use_tf32": "0"})] if have_cuda and provider in ("cuda", "auto") else []
    model = graph if isinstance(graph, bytes) else str(graph)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where it prints that it falls back; stdout may be for JSON
            session = in_own_heap(lambda: onnxruntime.InferenceSession(model, options, providers=[*first, cpu]))
    except Exception as error:  # onnxruntime's exceptions have no common type
        raise UserError(f"the teacher's graph cannot be run: {first_line(error)}") from None
    used = "cuda" if session.get_providers()[0] == cuda else "cpu"
    if provider == "cuda" and used != "cuda":
        hint = f"Check its CUDA libraries, or give {setting('provider', 'auto')}"
        raise UserError("onnxruntime fell back to the CPU", setting=setting("provider", "cuda"), hint=hint)
    name = session.get_inputs()[0].name
    return Session(session, used, onnxruntime.__version__, name, side_by_side if used == "cpu" else 1)


def _require_one_file(graph: bytes | Path) -> None:
    """Refuse a graph whose tensors lie in other files. Large ones are not parsed: such tensors have a `location`."""
    word, seen = b"location", b""
    with io.BytesIO(graph) if isinstance(graph, bytes) else graph.open("rb") as file:
        while piece := file.read(1 << 24):
            if word in seen + piece:
                parsed(graph if isinstance(graph, bytes) else graph.read_bytes())
                return
            seen = piece[-len(word) :]


def parsed(graph: bytes) -> ModelProto:
    """The model in an ONNX file's bytes.

    Raises:
        UserError: it is none, or its tensors lie in other files: they could be any file of this machine.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load_from_string(graph)
    except Exception as error:  # protobuf's decoder has its own errors
        raise UserError(f"the teacher's graph cannot be run: it is not an ONNX file ({first_line(error)})") from None
    outside = [tensor.name for tensor in _tensors(model) if uses_external_data(tensor)]
    if outside:
        message = f"the teacher's graph keeps {len(outside)} tensor(s) in other files ({outside[0]})"
        raise UserError(message, hint=f"Save it as one file:\n  {MERGE}")
    return model


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """All tensors of a model, wherever they stand: onnx's own walk leaves out sparse ones and parts of functions."""
    from onnx import TensorProto

    left: list[Any] = [model]
    while left:
        message = left.pop()
        if isinstance(message, TensorProto):
            yield message
            continue
        for field, value in message.ListFields():
            if field.message_type is not None:
                left.extend([value] if hasattr(value, "ListFields") else value)
