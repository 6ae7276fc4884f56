"""Objects: bytes under names, on local disks and object stores, and the formats they are written in."""
