"""In: a command line. Out: the run directory: run.json, metrics.jsonl, checkpoints, predictions, final/, report.html.

Flags, records, evaluation, checkpoints with their manifests, export, the report of a run. What compares or measures several runs
belongs in tools/.
"""
