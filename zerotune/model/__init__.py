"""In: a folder or a hub name, and the flags. Out: a model of which the right parts learn, and its loss as a sum over targets.

Loading, freezing, adapters, quantised bases, recomputed activations. Processes, shards and optimizers do not belong here.
"""
