"""The strategy that was launched: processes' backend, DeepSpeed or not, and the proof of which engine runs.

`accelerate launch` names the DeepSpeed JSON in the environment.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from zerotune.engine import sequence_parallel, tensor_parallel
from zerotune.engine.deepspeed_checks import check_config
from zerotune.engine.deepspeed_config import (
    choose_deepspeed_accelerator,
    find_ninja,
    has_cuda,
    read_deepspeed_config,
    resolve,
    section,
)
from zerotune.errors import UserError
from zerotune.rows.batches import most_micro_batches


@dataclass
class Strategy:
    """What the launcher asked for: the DeepSpeed config as it is written (None: no DeepSpeed) and the file it came from."""

    config: dict | None
    name: str
    num_processes: int
    num_machines: int = 1
    sequence_parts: int = 1  # over how many ranks each sequence is cut

    @property
    def launched(self):
        """Tell whether a launcher started this process as one of a group, be it of one."""
        return "WORLD_SIZE" in os.environ

    @property
    def summary(self):
        """Return what decides the layout of a checkpoint: 'no DeepSpeed', or the stage and where states lie."""
        if self.config is None:
            return "no DeepSpeed"
        zero = self.config["zero_optimization"]
        places = ", ".join(f"{kind} {section(zero, f'offload_{kind}').get('device', 'none')}" for kind in ("optimizer", "param"))
        return f"ZeRO-{zero['stage']}, offload: {places}"

    @property
    def stem(self):
        """Return the name of a strategy in accelerate_configs/ of which this is one, or the DeepSpeed file's own."""
        if self.config is None:
            return "single" if self.num_processes == 1 else "ddp"
        return Path(self.name).stem

    @property
    def zero_stage(self):
        return self.config["zero_optimization"]["stage"] if self.config else 0

    @property
    def optimizer_on_host(self):
        """Tell whether DeepSpeed keeps the optimizer states outside the device (CPU memory or NVMe)."""
        return section(self.config or {}, "zero_optimization.offload_optimizer").get("device", "none") != "none"

    @property
    def bf16_states(self):
        """Tell whether the JSON wants optimizer states in bf16."""
        return bool(self.config and section(self.config, "bf16").get("bf16_optimizer_states"))

    def resolved(self, args, hidden_size):
        """Return the DeepSpeed JSON as DeepSpeed will get it."""
        return resolve(self.config, self.name, args, self.num_processes, hidden_size, self.num_machines)

    def plugin(self, args, hidden_size, model_config):
        """Return accelerate's DeepSpeedPlugin holding the resolved config, or None without DeepSpeed.

        UserError if the model cannot be cut as the config wants it.
        """
        if self.config is None:
            return None
        here = model_config, self.num_processes, self.num_machines, bool(args.freeze)
        problems = tensor_parallel.model_problems(self.config, self.name, *here)
        problems += sequence_parallel.model_problems(self.sequence_parts, model_config, self.num_processes)
        if problems:
            raise UserError(*problems)
        sequence_parallel.tell_accelerate(self.num_processes)
        from accelerate.utils import DeepSpeedPlugin

        resolved = self.resolved(args, hidden_size)
        return DeepSpeedPlugin(hf_ds_config=resolved, zero3_init_flag=resolved["zero_optimization"]["stage"] == 3)

    def cut_anew(self, accelerator, plugin, args, hidden_size):
        """Have accelerate and DeepSpeed, before the model is prepared, take up another micro-batch in the flags."""
        if plugin is not None:
            plugin.deepspeed_config.clear()
            plugin.deepspeed_config.update(self.resolved(args, hidden_size))
            plugin.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = most_micro_batches(args)


FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def check_device(args):
    """Return problems with a precision or an optimizer that this machine's devices do not have."""
    import torch

    if not has_cuda():
        problems = []
        if args.mixed_precision == "fp16":
            problems.append(
                "--mixed_precision fp16: this machine's device is a CPU, which cannot train in fp16; use --mixed_precision bf16"
            )
        if args.optim.startswith("paged"):
            problems.append(
                f"--optim {args.optim}: pages a GPU's memory, and this machine's device is a CPU; use --optim "
                + ("lion_8bit" if "lion" in args.optim else "adamw_bnb_8bit")
            )
        if args.memory_snapshot:
            problems.append("--memory_snapshot: records a GPU's allocator, and this machine's device is a CPU; leave it out")
        if (args.torch_compile or args.optim == "muon") and not shutil.which(os.environ.get("CXX", "g++")):
            flag = "--torch_compile" if args.torch_compile else "--optim muon"
            problems.append(f"{flag}: compiles for this CPU, and there is no C++ compiler; Debian: apt install g++")
        if args.liger:
            problems.append("--liger: its kernels are written in Triton for GPUs, and this machine's device is a CPU; leave it out")
        if args.tf32:
            problems.append("--tf32: is a precision of GPUs, and this machine's device is a CPU; leave it out")
        if args.attn_implementation not in (None, "eager", "sdpa", "sdpa_by_row"):
            problems.append(
                f"--attn_implementation {args.attn_implementation}: trains on a GPU, and this machine's device is a CPU; use sdpa"
            )
        return problems
    if args.tf32 and torch.cuda.get_device_capability() < (8, 0):
        return ["--tf32: this GPU has no TF32; leave it out"]
    if package := FLASH_PACKAGES.get(args.attn_implementation):
        given = f"--attn_implementation {args.attn_implementation}"
        if importlib.util.find_spec(package) is None:
            return [f"{given}: {package} is not installed; install it for this GPU and torch, or use sdpa"]
        if args.mixed_precision == "no":
            return [f"{given}: computes in 16 bits alone; use --mixed_precision bf16, or sdpa"]
    if args.liger and importlib.util.find_spec("liger_kernel") is None:
        return ["--liger: liger-kernel is not installed: pip install -r requirements-gpu.txt"]
    if args.mixed_precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ["--mixed_precision bf16: this GPU has no bf16; use --mixed_precision fp16 (or no)"]
    return []


def check_starter(environment):
    """Return problems with who started this process: one of several that know of no group would train alone on the others' rows."""
    sizes = {name: environment.get(name, "1") for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")}
    if "SLURM_PTY_PORT" not in environment:  # an interactive shell
        sizes["SLURM_STEP_NUM_TASKS"] = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" in environment:
        return []
    return [
        f"{'srun' if name.startswith('SLURM') else 'mpirun'} has started {size} processes ({name}), and train.py knows torchrun's "
        "variables alone; have it start one scripts/launch.sh a machine (docs/clusters.md)"
        for name, size in sizes.items()
        if size != "1"
    ][:1]


def launched_strategy(args):
    """Return the Strategy that `accelerate launch` (or its absence) asks for, checked; raise UserError."""
    choose_deepspeed_accelerator()  # accelerate and transformers import DeepSpeed where it is installed, whatever the strategy
    find_ninja()
    environment = os.environ
    problems = [*check_starter(environment), *check_device(args)]
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", args.mixed_precision):
        problems.append(
            f"the accelerate YAML says mixed_precision {precision}, but --mixed_precision is {args.mixed_precision}; "
            "remove mixed_precision from the YAML (its home is the flag)"
        )
    if environment.get("ACCELERATE_USE_FSDP") == "true":
        problems.append(
            "the accelerate YAML turns FSDP on; train.py runs on one process, DDP or DeepSpeed: see accelerate_configs/"
        )
    config, name = None, "no DeepSpeed"
    if environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        name = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if name == "none":
            problems.append(
                "the accelerate YAML turns DeepSpeed on without deepspeed_config_file; see accelerate_configs/zero2.yaml"
            )
        else:
            config = read_deepspeed_config(name)
    if problems:
        raise UserError(*problems)
    if config is not None:
        check_config(config, name, args)
    parallel = {kind: int(environment.get(f"PARALLELISM_CONFIG_{kind}_SIZE", 1)) for kind in ("SP", *sequence_parallel.OTHERS)}
    if problems := sequence_parallel.launch_problems(parallel, config, name, args):
        raise UserError(*problems)
    num_processes = int(environment.get("WORLD_SIZE", 1))
    num_machines = num_processes // int(environment.get("LOCAL_WORLD_SIZE", num_processes))
    return Strategy(config, name, num_processes, num_machines, parallel["SP"])
