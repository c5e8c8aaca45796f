"""Whole adapters, mixed for every input by weights that a rule of one's own gives.

method.py     the verbs, for images and for texts: a subclass says `keep` and `weights`
memory.py     one version: what the rule kept of each task, the adapters, and their heads
measure.py    what the memory is worth, beside a hard choice, the uniform mixture and the oracle
explain.py    what comes out without each adapter
attached.py   a version as a module
"""
