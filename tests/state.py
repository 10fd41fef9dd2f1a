"""The state that a checkpoint holds as one hash: weights, optimizer states, step counts and the loss scale."""

import hashlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from zerotune.run import manifest  # noqa: E402
from zerotune.run.state_files import SavedState  # noqa: E402


def state_hash(folder):
    """Return the SHA-256 of a checkpoint's state, the same however it is cut into files."""
    assert list(Path(folder).glob("state-*.safetensors")), f"{folder} holds no state"
    scaler = manifest.read(folder)["scaler"]
    return hashlib.sha256(f"{SavedState(folder).digest()} {scaler and scaler['scale']}".encode()).hexdigest()
