"""The object store as a zarr store, in which a missing chunk is an error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zarr.abc.store import ByteRequest, Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

    from zarr.core.buffer import Buffer, BufferPrototype

    from storage.objects.object_store import ObjectStore


class ZarrStore(Store):
    """The part of zarr's store interface that writing one array needs, over `ObjectStore` below a folder.

    zarr sees the array as a root, so it writes no metadata for groups above it.
    """

    supports_writes = True
    supports_deletes = True
    supports_listing = True

    def __init__(self, objects: ObjectStore, folder: str) -> None:
        super().__init__(read_only=False)
        self.objects, self.folder = objects, folder
        self.written: dict[str, tuple[int, bytes]] = {}  # key -> length and last four bytes of what was handed over

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ZarrStore) and (other.objects.url, other.folder) == (self.objects.url, self.folder)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of an object, or None."""
        if byte_range is not None:
            raise NotImplementedError("arrays are written here chunk by chunk; parts are not read")
        try:
            return prototype.buffer.from_bytes(self.objects.get(f"{self.folder}/{key}"))
        except FileNotFoundError:
            return None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several objects."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.objects.size(f"{self.folder}/{key}")
        except FileNotFoundError:
            return False
        return True

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object whole."""
        data = value.to_bytes()
        self.objects.put(f"{self.folder}/{key}", data)
        self.written[f"{self.folder}/{key}"] = (len(data), data[-4:])

    async def delete(self, key: str) -> None:
        """Remove an object."""
        self.objects.remove(f"{self.folder}/{key}")

    def list(self) -> AsyncIterator[str]:
        """All keys."""
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys below a prefix."""
        for key in self.objects.walk(f"{self.folder}/{prefix}".rstrip("/")):
            yield key.removeprefix(f"{self.folder}/")

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """The names inside a folder."""
        for name in self.objects.names(f"{self.folder}/{prefix}".rstrip("/")):
            yield name
