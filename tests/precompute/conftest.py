"""What several files of this room's tests start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from precompute import session as sessions
from tests.precompute.stores import Watched


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[np.ndarray]], Any]], None]:
    """Every session from now on calls this with its outputs."""

    def install(act: Callable[[list[np.ndarray]], Any]) -> None:
        real = sessions.open_session
        monkeypatch.setattr("precompute.cluster.open_session", lambda *args: Watched(real(*args), act))

    return install
