"""Adapters: their layout, their mixtures, and the files that others read them from."""
