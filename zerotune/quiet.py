"""Importing this keeps the libraries' notices out of the log; their errors stay. Import it before them.

A run's log is what its user reads: hundreds of identical warnings about other people's code would hide the one line that matters.
"""

import logging
import os
import warnings

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",  # forked data workers would warn about it on every start
    "TRANSFORMERS_VERBOSITY": "error",
    "ACCELERATE_LOG_LEVEL": "ERROR",
    "DS_LOG_LEVEL": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)
for name in ("accelerate", "datasets", "torch", "bitsandbytes", "fsspec"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
