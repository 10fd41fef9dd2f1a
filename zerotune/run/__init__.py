"""In: a command line. Out: the run directory: run.json, metrics.jsonl, checkpoints, predictions, final/.

Flags, records, evaluation, checkpoints with their manifests, export. What compares or measures several runs belongs in tools/.
"""
