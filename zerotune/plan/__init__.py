"""In: a configuration, flags, the lengths of rows, a machine. Out: bytes by category, and whether a strategy fits, before a launch.

Shapes alone: nothing here loads weights, starts processes or needs a GPU. What a run really took is measured in run/.
"""
