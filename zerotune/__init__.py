"""What train.py calls, in rooms cut by what flows through them; each imports only from those above it.

    rows/    files become rows, rows become batches
    model/   the model, and which of it learns how
    engine/  what runs it: strategy, optimizer, precision, signals
    plan/    what a run will take of memory and time, before anything of it is there
    run/     one run: its flags, its records, its checkpoints, what it leaves
    tools/   commands around runs: python -m zerotune --help

errors.py, flags.py and quiet.py stand before the rooms and import nothing of them.
"""
