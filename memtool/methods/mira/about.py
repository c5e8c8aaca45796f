"""What MIRA needs, and what it makes of new adapters."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.methods.about import About, require_images
from memtool.settings import Config


def _require(config: Config) -> None:
    """Images and a head that learns; no model of two towers."""
    require_images(config)
    if config.backbone.name.startswith("open_clip:"):
        raise ConfigError(
            f"method mira on backbone {config.backbone.name}",
            expected="an image model: its memories look at blocks as wide as the features",
            remedy="--set method=moram, or a backbone timm:<model name>",
        )


ABOUT = About(appends=True, require=_require)
