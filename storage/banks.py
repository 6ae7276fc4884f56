"""Banks: stored views read back, replayed and held against the signatures of the pixels that the teacher saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from storage import records
from storage.errors import DamageError, IdentityError, UserError
from storage.markers import Marker
from storage.policies import OPERATIONS_VERSION, Policy
from storage.records import Record
from storage.store import Store
from storage.tars import Sample
from storage.views import COLUMNS, BadImage, View, render, renderer, signature


def describe(policy: Policy) -> Record:
    """What a bank's manifest says beside its identity."""
    return {"policy": policy.name, "columns": list(COLUMNS)}


def policy_of(manifest: Record) -> Policy:
    """The policy that a bank was drawn from."""
    identity = manifest["identity"]
    return Policy(identity["line"], identity["size"], identity["seed"] or 0, manifest["policy"])


@dataclass(frozen=True)
class BankView:
    """One view of some consecutive samples: rows f64 `[n, columns]`, signatures u32 `[n]`, and what rendered them."""

    rows: np.ndarray
    signatures: np.ndarray
    renderer: Record

    def view(self, i: int) -> View:
        """The view of sample i of these."""
        return View.of(self.rows[i])

    def replay(self, i: int, sample: Sample, image: bytes | Image.Image, size: int, where: str) -> np.ndarray:
        """Render sample i again, uint8 [S, S, 3].

        Raises:
            IdentityError: the pixels are not those that the teacher saw; names both sides' decoders.
        """
        try:
            pixels = render(image, self.view(i), size)
        except BadImage as error:
            raise UserError(f"{where}, key {sample.key}: {error}") from None
        found, expected = signature(pixels), int(self.signatures[i])
        if found != expected:
            both = ", ".join(
                f"{k} {self.renderer.get(k)}/{v}" for k, v in renderer().items() if self.renderer.get(k) != v
            )
            raise IdentityError(
                f"{where}, key {sample.key}", "signature of the view's pixels", f"{expected:08x}", f"{found:08x}",
                f"The image or the decoders differ from those of precompute ({both or 'same versions'}).\n  Use those "
                "decoders, or store the pixels themselves where they are in use: --materialise-views",
            )  # fmt: skip
        return pixels


def read_views(marker: Marker, start: int, stop: int) -> BankView:
    """The views of samples [start, stop) that a bank's marker names. Raises DamageError."""
    arrays = marker.arrays
    signatures = arrays["signatures"].read(start, stop)[:, 0]
    return BankView(arrays["parameters"].read(start, stop), signatures, marker.content["renderer"])


def bank_policy(store: Store, id: str) -> Policy:
    """The policy of a recorded bank.

    Raises:
        DamageError: the id does not agree with what the manifest says.
    """
    manifest = store.bank(id)
    if not id.endswith(records.digest_of(manifest["identity"])[:8]):
        raise DamageError(f"{store.url}/banks/{id}/manifest.json: damaged: it describes another bank")
    if manifest["identity"]["operations"] > OPERATIONS_VERSION:
        raise UserError(f"{store.url}: bank {id}: its views need a newer version of this package; install one")
    return policy_of(manifest)


def rows_of(views: Sequence[View]) -> np.ndarray:
    """Rows of a bank, f64 `[n, columns]`."""
    return np.stack([view.row() for view in views])
