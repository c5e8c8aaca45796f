"""Modulation: whole adapters, recalled from an associative memory by a part of themselves.

In the order in which they are read:

    recallers    the memories: a key, the first share of an adapter, is completed to all of it
    stored       the adapters of one version, which the memories are asked for
    predictor    mts: one more adapter, with a head over the tasks, says which task an input is of
    measure      what recalled adapters are worth beside the exact ones
    retrieve     what asks for an adapter (a task, an image, a key), and what becomes of the answer
    method       the verbs
"""
