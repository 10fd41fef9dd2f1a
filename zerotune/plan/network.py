"""Bytes that a GPU sends in an optimizer step, strategy by strategy.

A ring of N GPUs moves (N - 1) / N of a tensor past each of them in an all-gather or a reduction, and twice that in an all-reduce
(Patarasuk and Yuan 2009). What ZeRO exchanges: Rajbhandari et al. 2020 (arXiv:1910.02054), section 7; hpZ: Wang et al. 2023
(arXiv:2306.10209).
"""


def bytes_of_step(stage, num_gpus, *, weights, learning, gradients, micro_batches=1, reductions=1, hpz=1):
    """Return (bytes over the slowest link, bytes within the node where hpZ keeps them there) that a GPU sends in a step.

    weights, learning: bytes of all and of the trained weights in the type in which they are gathered; gradients: bytes of all
    gradients as they are reduced; reductions: how often a step, `micro_batches` times or once; hpz: GPUs that share a second copy.
    """
    share = (num_gpus - 1) / num_gpus
    if stage == 0:
        return int(2 * share * gradients), 0
    if stage < 3:  # all-reduces in place of reductions (use_multi_rank_bucket_allreduce), then the changed weights
        return int(share * gradients * (2 * reductions + 1)), 0
    if hpz > 1:  # trained weights come over the network once a step; from then on the node has a second copy, of frozen ones always
        within = (hpz - 1) / hpz * (2 * micro_batches * weights - learning)
        return int(share * (learning + reductions * gradients)), int(within)
    # Weights for the forward and for the backward pass of each micro-batch, and gradients.
    return int(share * (2 * micro_batches * weights + reductions * gradients)), 0
