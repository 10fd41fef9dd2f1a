"""The state that a checkpoint holds as one hash, and a run as it was when a checkpoint had just been written."""

import hashlib
import shutil
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from zerotune.run import manifest  # noqa: E402
from zerotune.run.checkpoint import list_checkpoints  # noqa: E402
from zerotune.run.state_files import SavedState  # noqa: E402


def state_hash(folder):
    """Return the SHA-256 of a checkpoint's weights, optimizer states, step counts and loss scale, however it is cut."""
    assert list(Path(folder).glob("state-*.safetensors")), f"{folder} holds no state"
    scaler = manifest.read(folder)["scaler"]
    return hashlib.sha256(f"{SavedState(folder).digest()} {scaler and scaler['scale']}".encode()).hexdigest()


def copy_at(source, target, step):
    """Copy a run as a kill leaves it when checkpoint-<step> is its newest: later records and a half-written save are there."""
    shutil.copytree(source, target)
    for number, folder in list_checkpoints(target):
        if number > step:
            shutil.rmtree(folder)
    shutil.rmtree(target / "final")
    (target / f"checkpoint-{step + 1}.tmp").mkdir()
