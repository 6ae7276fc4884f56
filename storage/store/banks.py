"""Banks: stored views read back, replayed and held against the signatures of the pixels that the teacher saw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from storage.constants import BLOCK
from storage.errors import DamageError, IdentityError, UserError, call, first_line, setting
from storage.store.manifests import BankIdentity, BankManifest, require_id
from storage.store.markers import FORMAT, Marker
from storage.views.policy import OPERATIONS_VERSION, Policy
from storage.views.randaugment import OPERATIONS
from storage.views.render import BadImage, render, renderer, signature
from storage.views.view import COLUMNS, View

if TYPE_CHECKING:
    from PIL import Image

    from storage.shards.tar import Sample
    from storage.store.store import Store


def bank_manifest(policy: Policy) -> BankManifest:
    """The manifest of the bank that is drawn from a policy."""
    identity = BankIdentity.model_validate(policy.identity)
    return BankManifest(
        format=FORMAT, kind="bank", id=policy.bank, identity=identity, policy=policy.name, columns=COLUMNS
    )


def policy_of(manifest: BankManifest) -> Policy:
    """The policy that a bank was drawn from."""
    identity = manifest.identity
    return Policy(line=identity.line, size=identity.size, seed=identity.seed or 0, name=manifest.policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class BankView:
    """One view of consecutive samples of a shard; the view of each sample is parsed once.

    Attributes:
        start: index of the first sample in the shard.
        rows: f64 `[n, columns]`.
        signatures: u32 `[n]`.
        renderer: versions of what rendered them.
    """

    start: int
    rows: np.ndarray
    signatures: np.ndarray
    renderer: dict[str, str]
    _views: dict[int, View] = field(default_factory=dict, init=False, repr=False)

    def view(self, i: int) -> View:
        """The view of sample i of the shard."""
        if i not in self._views:
            self._views[i] = View.of(self.rows[i - self.start])
        return self._views[i]

    def replay(self, i: int, sample: Sample, image: bytes | Image.Image, size: int, where: str) -> np.ndarray:
        """Render sample i of the shard again, uint8 [S, S, 3].

        Raises:
            IdentityError: the pixels are not those that the teacher saw; names both sides' decoders.
        """
        where = f"{where}, key {sample.key}"
        try:
            pixels = render(image, self.view(i), size)
        except BadImage as error:
            raise UserError(f"{where}: {error}") from None
        except ValueError as error:  # Pillow's: a crop box outside of the image
            raise DamageError(f"{where}: damaged: its parameters make no view: {first_line(error)}") from None
        found, expected = f"{signature(pixels):08x}", f"{int(self.signatures[i - self.start]):08x}"
        if found != expected:
            then = self.renderer
            both = ", ".join(f"{name} {then.get(name)}/{v}" for name, v in renderer().items() if then.get(name) != v)
            hint = (
                f"The image or the decoders differ from those of precompute ({both or 'same versions'}).\n  Use those "
                f"decoders, or store the pixels where they are in use: {setting('store_views', True)}"
            )
            raise IdentityError(where, "signature of the view's pixels", expected, found, hint)
        return pixels


def read_views(marker: Marker, start: int, stop: int) -> BankView:
    """The views of samples [start, stop) that a bank's marker names. Raises DamageError."""
    signatures = marker.arrays["signatures"].read(start, stop)[:, 0]
    rows = marker.arrays["parameters"].read(start, stop)
    if wrong := _beyond(rows, start, marker.samples):
        hint = f"Its store was not made by {call('precompute')}."
        raise DamageError(f"{marker.name}: damaged: parameters: {wrong}", hint=hint)
    return BankView(start=start, rows=rows, signatures=signatures, renderer=marker.bank.renderer)


# Column -> smallest and largest value; others may be anything that is finite.
_BOUNDS = {
    **dict.fromkeys(("valid", "flip"), (0, 1)),
    **dict.fromkeys(("left", "top", "right", "bottom"), (-1e6, 2e6)),
    **dict.fromkeys(("shift_x", "shift_y"), (-4096, 4096)),
    **dict.fromkeys(("op1", "op2", "op3", "op4"), (0, len(OPERATIONS))),
    **dict.fromkeys(("magnitude1", "magnitude2", "magnitude3", "magnitude4"), (-1000, 1000)),
    **dict.fromkeys(("erase_left", "erase_top", "erase_right", "erase_bottom"), (0, 4096)),
    **dict.fromkeys(("mix_left", "mix_top", "mix_right", "mix_bottom"), (0, 4096)),
    **{"erase_seed": (0, 2**32 - 1), "mix": (0, 2), "amount": (0, 256)},
}


def _beyond(rows: np.ndarray, start: int, samples: int) -> str:
    """What is wrong with rows of a bank, those of samples from `start` on of a shard; empty where nothing is."""
    for name, (low, high) in {**_BOUNDS, "partner": (-1, samples - 1)}.items():
        column = rows[:, COLUMNS.index(name)]
        inside = (column >= low) & (column <= high)  # a NaN is not
        if not inside.all():
            i = int(np.argmin(inside))
            return f"{name} of sample {start + i}: expected {low} to {high}, found {column[i]:g}"
    own, partner = start + np.arange(len(rows)), rows[:, COLUMNS.index("partner")]
    apart = (rows[:, COLUMNS.index("mix")] > 0) & (partner // BLOCK != own // BLOCK)
    return f"partner of sample {own[np.argmax(apart)]}: expected one of its block, found none" if apart.any() else ""


def bank_policy(store: Store, id: str) -> Policy:
    """The policy of a recorded bank.

    Raises:
        DamageError: the id does not agree with what the manifest says.
        UserError: a newer version drew its views.
    """
    manifest = store.bank(id)
    require_id(f"{store.url}/banks/{id}/manifest.json", manifest)
    if manifest.identity.operations > OPERATIONS_VERSION:
        raise UserError(f"{store.url}: bank {id}: its views need a newer version of this package; install one")
    return policy_of(manifest)


def view_rows(views: list[View]) -> np.ndarray:
    """Rows of a bank, f64 `[n, columns]`."""
    return np.stack([view.row() for view in views])
