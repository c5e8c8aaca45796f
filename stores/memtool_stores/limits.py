"""How large things that come from outside may be: the limits, in one place.

A size that a file states is compared with these, and with the bytes that are there, before anything
is allocated for it. They are the settings `limits.…`; an error names the one that was met.

>>> limits.use(replace(limits.current(), image_pixels=400_000_000))     # doctest: +SKIP
"""

from __future__ import annotations

from dataclasses import dataclass

from memtool_stores.errors import SchemaError

MB = 1_000_000
GB = 1_000 * MB


@dataclass(frozen=True)
class Limits:
    """Largest sizes that are believed."""

    header_bytes: int = 100 * MB
    """Header of a safetensors file; the format itself ends there."""
    text_bytes: int = 64 * MB
    """A file of JSON or of a table, and a line of a catalog."""
    yaml_bytes: int = MB // 4
    """A YAML file: settings, a description. So much takes the parser seconds."""
    array_bytes: int = 64 * GB
    """Keys, a catalog, a blob, and the tensors of one file."""
    bundle_files: int = 1_000_000
    """Files in a bundle."""
    data_files: int = 2_000_000
    """Files and folders below a folder of data."""
    image_bytes: int = 256 * MB
    """An image as it is encoded."""
    image_pixels: int = 128 * MB
    """An image decoded: width times height."""


_current = Limits()


def current() -> Limits:
    """The limits in force in this process."""
    return _current


def use(limits: Limits) -> None:
    """Put other limits in force."""
    global _current
    _current = limits


def require(name: str, found: int, what: str) -> int:
    """`found`, when it is not negative and not above the limit of that name.

    Raises:
        SchemaError: names the thing, the limit and the setting that raises it.
    """
    most = getattr(_current, name)
    if not 0 <= found <= most:
        raise SchemaError(
            f"{what}: {found:,} {name.rpartition('_')[2]}",
            expected=f"0 to {most:,} (limits.{name})",
            remedy=f"--set limits.{name}={found} if you trust it" if found > 0 else None,
        )
    return found
