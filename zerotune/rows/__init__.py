"""In: files, or a hub's data set, and a tokenizer. Out: checked, tokenised rows, and each step's padded micro-batches.

Which rows a step takes is a function of (seed, step). What a model does with a batch does not belong here, nor how it is counted.
"""

IGNORE = -100  # the label of a position that is no target; torch's cross_entropy skips it by default
