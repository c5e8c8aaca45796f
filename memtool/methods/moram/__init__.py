"""MoRAM: a memory of rank-1 atoms that find themselves, on any stream of images or texts.

    method.py    the verbs: what is trained, written, retrieved and evaluated
    learn.py     new atoms learn a task on top of the frozen ones before
    beneath.py   what atoms were trained on top of, and that they are written on top of just that
    state.py     what a store holds of a memory of atoms, and the bank, gate and head made from it
    watch.py     what the atoms do while samples run through the model
    measure.py   what a memory is worth: accuracy or loss, shares of tasks, drift
    rows.py      the rows of a table that a memory gives
    explain.py   which atom fires where
    prune.py     atoms that add next to nothing leave
    as_atoms.py  what a LoRA that was trained to act whole loses when its ranks become atoms
    attached.py  a version as a module

The atoms themselves are `memtool.adapters.atoms` (gate, activations) and `memtool.memories.rank1`.
"""
