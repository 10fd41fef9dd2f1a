"""Which parameters learn how: the parameter groups and the optimizer."""

import torch

BITSANDBYTES = {"adamw_bnb_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit", "paged_adamw_32bit": "PagedAdamW32bit"}


def parameter_groups(model, weight_decay):
    """Return [decayed, not decayed] groups of the trainable parameters, empty groups left out.

    Biases and normalisation weights (everything with fewer than two dimensions) are not decayed. Frozen parameters are in no
    group: no optimizer state is made for them, and weight decay cannot move them.
    """
    decayed, plain = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under zero.Init a parameter's own shape is (0,); DeepSpeed keeps the whole one in ds_shape.
            dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
            (decayed if dimensions >= 2 else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model, *, optim, learning_rate, weight_decay, on_host):
    """Return the optimizer over the trainable parameters.

    optim: adamw_torch, adamw_torch_fused, adafactor (fixed learning rate, as transformers' Trainer sets it), or bitsandbytes'
    adamw_bnb_8bit, paged_adamw_8bit and paged_adamw_32bit.
    on_host: DeepSpeed keeps optimizer states in host memory or on NVMe; AdamW is then DeepSpeed's own C++ one. accelerate
    would make that exchange by itself and without a word, so it is made here, where the log and run.json show it.
    """
    groups = parameter_groups(model, weight_decay)
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=learning_rate, adamw_mode=True)
    if optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    if optim in BITSANDBYTES:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, BITSANDBYTES[optim])(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=optim == "adamw_torch_fused")


def replay_bias_correction(optimizer, num_steps):
    """Bring a fresh DeepSpeedCPUAdam to where one that has taken num_steps steps is; nothing to do for other optimizers.

    Its C++ part multiplies beta^t up step by step, but after a jump in t computes it by pow(), which rounds otherwise: a resumed
    run would leave the straight one by a bit of the bias correction. num_steps calls on a single number cost microseconds each.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return
    parameter, gradient, first, second = (torch.zeros(1) for _ in range(4))
    group = optimizer.param_groups[0]
    for step in range(1, num_steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, parameter, gradient, first, second
        )
