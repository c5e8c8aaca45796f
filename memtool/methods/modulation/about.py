"""What Modulation needs, and what it makes of new adapters: it counts them when they come."""

from __future__ import annotations

from memtool.methods.about import About, require_trained_head

ABOUT = About(require=require_trained_head)
