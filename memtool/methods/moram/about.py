"""What MoRAM makes of adapters: atoms, counted when they come."""

from __future__ import annotations

from memtool.methods.about import About

ABOUT = About(kind="atoms")
