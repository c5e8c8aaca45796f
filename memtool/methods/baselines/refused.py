"""What a rival cannot learn: refused before anything is made, by its name."""

from __future__ import annotations

from memtool.errors import ConfigError
from memtool.learning.known import is_fixed
from memtool.workspace import Workspace


def require_own_head(work: Workspace, id: str) -> None:
    """Raise ConfigError unless samples are images under a head that is learned along with them."""
    expected = "images whose classes are learned task after task: stream.setting cil or dil"
    remedy = f"leave {id} out of --baselines, or another stream.setting"
    if work.reads == "texts":
        raise ConfigError(f"baseline {id} on texts", expected=expected, remedy=remedy)
    if is_fixed(work.config):
        raise ConfigError(
            f"baseline {id} under head.kind {work.config.head.kind}",
            expected=f"{expected}; it learns a classifier along",
            remedy=f"leave {id} out of --baselines",
        )
