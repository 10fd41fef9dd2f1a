"""Borders of --freeze_schedule: where other parts of the model begin to learn, the run goes on in new processes.

An engine is not made over: its next phase begins from the checkpoint of the border's step, as a run that goes on does, and so takes
the memory, and on a resume gives the bits, of a run that began there.
"""

import os
from pathlib import Path

from zerotune.engine.ending import start_again
from zerotune.engine.processes import ranks_where
from zerotune.errors import UserError
from zerotune.run.fit import LIMIT


def is_border(run, step):
    """Tell whether another phase begins after a step."""
    return run.phases is not None and step in run.phases.borders and step > run.begin


def go_over(run, step):
    """Begin the next phase from the checkpoint of this step, on every rank; it is the newest, and being written."""
    run.saver.wait()
    folder = Path(run.args.output_dir) / f"checkpoint-{step}"
    if ranks_where(not folder.is_dir(), run.accelerator):
        raise UserError(f"--freeze_schedule: {folder} could not be written, from which the next phase begins; see metrics.jsonl")
    run.console.say(f"step {step}: other parts of the model learn from here on; starting again from {folder}")
    run.console.stop()
    os.environ.pop(LIMIT, None)  # what a trial before step 0 has shown is in the run's own flags by now
    run.accelerator.wait_for_everyone()
    start_again(["--resume_from_checkpoint", str(folder)])
