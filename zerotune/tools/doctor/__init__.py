"""In: a launch, by scripts/launch.sh's environment and train.py's flags. Out: what of it will hurt or fail, with the fix.

    machine.py        versions, CUDA, compiler, libaio, disk, shared memory, limits
    ranks.py          a round trip between all ranks (worker.py is one of them), the machines' clocks
    configuration.py  the checks of a launch, sizes that hurt, the network's share of a step
    losses.py         some steps under the strategy beside the same steps of one process

Each check takes what it judges as arguments and returns findings, so that a test can hand it any machine.
"""
