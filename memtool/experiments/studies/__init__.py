"""Studies: one question about a memory, answered by runs that differ in one thing.

capacity        how many adapters a task, and what they cost
similarity      tasks that become alike, up to one that comes twice
interference    what later tasks do to the keys and weights of earlier inputs

A study is a sweep of named points by seeds (`memtool.experiments.sweep`), and so as resumable; what
its records do not hold is measured on the memories that its runs leave, once for each.
"""
