"""In: what the launcher said and a DeepSpeed JSON. Out: a strategy that is checked, and steps that are taken or not.

Optimizer, learning rate, precision, signals and stalls. What a run writes does not belong here.
"""
