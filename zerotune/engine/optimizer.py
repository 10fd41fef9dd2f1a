"""Which parameters learn how: the parameter groups and the optimizer."""

import torch

from zerotune.errors import UserError
from zerotune.model.freezing import block_lists

BITSANDBYTES = {  # --optim: its class there
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "lion_32bit": "Lion32bit",
    "lion_8bit": "Lion8bit",
    "paged_lion_32bit": "PagedLion32bit",
    "paged_lion_8bit": "PagedLion8bit",
}


def parameter_groups(model, weight_decay, births=None):
    """Return [decayed, not decayed] groups of the trainable parameters, empty groups left out.

    Biases and normalisation weights (everything with fewer than two dimensions) are not decayed. Frozen parameters are in no
    group: no optimizer state is made for them, and weight decay cannot move them. births: {name: step from which it learns}, where
    that differs: each has groups of its own, as ZeRO counts the steps of AdamW by group.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Under zero.Init a parameter's own shape is (0,); DeepSpeed keeps the whole one in ds_shape.
            plain = len(getattr(parameter, "ds_shape", parameter.shape)) < 2
            groups.setdefault((births[name] if births else 0, plain), []).append(parameter)
    return [{"params": groups[key], "weight_decay": 0.0 if key[1] else weight_decay} for key in sorted(groups)]


def muon_groups(model, weight_decay, learning_rate, muon_learning_rate):
    """Return MuonWithAuxAdam's groups: the matrices of the blocks, embeddings in them left out; all else is AdamW's.

    Each group's `lr_factor` is its rate beside --learning_rate. DeepSpeed reads which is which at the parameters, before it shards.
    UserError if there is nothing for Muon.
    """
    blocks = {id(p) for path in block_lists(model) for p in model.get_submodule(path).parameters()}
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    matrices = []
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            parameter.use_muon = len(shape) == 2 and id(parameter) in blocks - embedded
            matrices += [parameter] if parameter.use_muon else []
        group["params"] = [parameter for parameter in group["params"] if not parameter.use_muon]
        if group["params"]:
            yield group | {"use_muon": False, "betas": (0.9, 0.999), "eps": 1e-8, "lr": learning_rate, "lr_factor": 1.0}
    if not matrices:
        raise UserError("--optim muon: no matrix of a block learns; use --optim adamw_torch_fused")
    factor = muon_learning_rate / learning_rate
    yield {"params": matrices, "use_muon": True, "weight_decay": weight_decay, "lr": muon_learning_rate, "lr_factor": factor}


def build_optimizer(model, *, optim, learning_rate, weight_decay, on_host, bf16_states=False, births=None, muon_learning_rate=None):
    """Return the optimizer over the trainable parameters.

    optim: adamw_torch, adamw_torch_fused, adafactor (fixed learning rate, as transformers' Trainer sets it), one of BITSANDBYTES,
    or muon, with muon_learning_rate.
    on_host: DeepSpeed keeps optimizer states in host memory or on NVMe; AdamW is then DeepSpeed's own C++ one. accelerate
    would make that exchange by itself and without a word, so it is made here, where the log and run.json show it. bf16_states:
    DeepSpeed wants its moments in bf16, as its JSON says; elsewhere they are of the type of the weights that they are for.
    births: as in parameter_groups.
    """
    if optim == "muon":
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

        return MuonWithAuxAdam([*muon_groups(model, weight_decay, learning_rate, muon_learning_rate)])
    groups = parameter_groups(model, weight_decay, births)
    if on_host:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=learning_rate, adamw_mode=True, fp32_optimizer_states=not bf16_states)
    if optim == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False)
    if optim in BITSANDBYTES:
        import bitsandbytes.optim

        return getattr(bitsandbytes.optim, BITSANDBYTES[optim])(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=optim == "adamw_torch_fused")


def replay_bias_correction(optimizer, counts):
    """Bring a fresh DeepSpeedCPUAdam to where one is that has stepped so often; nothing to do for other optimizers.

    counts: the steps of each tensor that it steps, in their order. Its C++ part multiplies beta^t up where a call's step is one
    more than the last call's, and else computes it by pow(), which rounds otherwise: a resumed run would leave the straight one by
    a bit of the bias correction. Of one tensor all calls are repeated; of several, which it calls for by turns, those of the last
    two steps. They are on a single number, microseconds each.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam" or not counts:
        return
    parameter, gradient, first, second = (torch.zeros(1) for _ in range(4))
    group = optimizer.param_groups[0]
    turns = [count - back for back in (1, 0) for count in counts] if len(counts) > 1 else range(1, counts[0] + 1)
    for step in filter(None, turns):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, True, parameter, gradient, first, second
        )
