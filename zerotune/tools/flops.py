"""Model FLOPs of training steps, with what frozen parts save: no backward where there is none, no gradient GEMM for frozen weights.

torch's own counter runs the model forward and backward on the meta device, where nothing is computed. All FLOPs of a transformer
are matrix products, so their number is a polynomial of a micro-batch's shape (rows B, source length S, target length T). A few
counts give its coefficients; training only has to sum the terms over its micro-batches (`shape_terms` in collation.py).
"""

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from zerotune.model.freezing import apply_rules
from zerotune.model.loading import AUTO_CLASSES
from zerotune.model.loss import token_losses
from zerotune.rows.collation import terms_of

# More shapes than terms: if the counts are no such polynomial (a model that drops tokens, say), the fit shows it.
SHAPES = [(1, 8, 8), (1, 16, 8), (1, 32, 8), (1, 8, 16), (1, 8, 32), (1, 16, 16), (2, 24, 32), (3, 40, 24)]
LARGEST_REAL = 300_000_000  # parameters of a model that is counted with real tensors if it cannot be on the meta device


def count_step(model, task, rows, source_length, target_length):
    """Return torch's count of the FLOPs of one forward and backward of `model` on a batch of a shape, on the model's device."""

    def integers(*shape):
        return torch.ones(shape, dtype=torch.int64, device=next(model.parameters()).device)

    batch, labels = {"input_ids": integers(rows, source_length)}, integers(rows, source_length)
    batch["attention_mask"] = integers(rows, source_length)  # without one, decoders look into the positions for packed rows
    if task == "seq2seq":
        batch["decoder_input_ids"] = labels = integers(rows, target_length)
    elif task == "classification":
        labels = integers(rows)
        batch["input_ids"][:, -1] = model.config.eos_token_id or 0  # BART's classifier reads at the end token
    with FlopCounterMode(display=False) as counter:
        loss = token_losses(model(**batch, use_cache=False).logits, labels).sum()
        if loss.requires_grad:
            loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def coefficients(config, task, freeze=(), unfreeze=()):
    """Return the FLOPs of a training step as coefficients of TERMS, an array of 6, or None if they cannot be counted this way.

    config: a transformers configuration. FLOPs are those of the model (Chowdhery et al. 2022, "PaLM", appendix B): twice the
    multiplications, attention counted in full, recomputation by gradient checkpointing left out.
    """
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = AUTO_CLASSES[task].from_config(config, attn_implementation="eager")
        apply_rules(model, freeze, unfreeze)
        shapes = SHAPES if task == "seq2seq" else [(b, s, 0) for b, s, _ in SHAPES]
        try:
            counts = np.array([count_step(model.train(), task, *shape) for shape in shapes], dtype=float)
            break
        except (NotImplementedError, RuntimeError):  # the model looks at values, which the meta device does not have
            if device == "cpu" or model.num_parameters() > LARGEST_REAL:
                return None
    values = np.array([terms_of(*shape) for shape in shapes], dtype=float)
    solution = np.linalg.lstsq(values, counts, rcond=None)[0]
    return solution.round(3) if np.allclose(values @ solution, counts, rtol=1e-6) else None
