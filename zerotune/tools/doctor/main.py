"""Check a launch before it costs anything: the machine, the configuration, and the numbers of a few steps.

    python -m zerotune doctor                                              the machine alone
    STRATEGY=zero3 NUM_PROCESSES=8 python -m zerotune doctor --model_name_or_path ... --train_file ... --output_dir ...

The environment is that of scripts/launch.sh, with its defaults: STRATEGY (zero2), NUM_PROCESSES, CUDA_VISIBLE_DEVICES, NVME_PATH;
for several machines NUM_MACHINES, MACHINE_RANK, MAIN_PROCESS_IP and MAIN_PROCESS_PORT: run it on each of them at once then. All
other flags are train.py's. Exit code: 0 all is fine, 1 something will hurt, 2 something will fail.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from zerotune.engine.deepspeed_checks import check_build_locks, check_locked_memory, check_nvme
from zerotune.engine.deepspeed_config import section, uses_nvme
from zerotune.errors import UserError
from zerotune.run.parsing import Parser
from zerotune.tools.doctor import configuration, losses, machine, ranks
from zerotune.tools.doctor.finding import exit_code, of_problem, report
from zerotune.tools.doctor.launch import ROOT, launch_of


def nvme_folder(config, environment):
    """Return the folder of NVMe offload: the DeepSpeed JSON's, or NVME_PATH; None where neither names one."""
    for kind in ("optimizer", "param"):
        path = section(config, f"zero_optimization.offload_{kind}").get("nvme_path")
        if path and path != "auto":
            return path
    return environment.get("NVME_PATH") or None


def check_machine(launch, environment, size, partly_frozen, alone):
    """Return the findings on this machine; size: bytes to write to the disk.

    alone: no flags are given, so that what a launch would check of this machine is checked here.
    """
    import torch

    config, on_gpu = launch.json, launch.gpus > 0
    nvme, device = uses_nvme(config), section(config, "zero_optimization.offload_optimizer").get("device", "none")
    pins = machine.read_pins(ROOT / "requirements.txt")
    installed = machine.installed_versions(pins)
    required = machine.REQUIRED | ({"deepspeed"} if config else set())
    findings = machine.compare_versions(pins, installed, required)
    findings += machine.known_bad(installed, section(config, "zero_optimization").get("stage", 0), partly_frozen)
    torch_cuda = tuple(map(int, torch.version.cuda.split(".")[:2])) if torch.version.cuda else None
    findings.append(machine.check_cuda(torch_cuda, machine.driver_cuda(), launch.gpus, torch.cuda.is_available()))
    if on_gpu and torch_cuda:
        findings.append(machine.check_nvcc(torch_cuda, machine.nvcc_version(), nvme))
    findings += [machine.check_compiler(device != "none"), machine.check_libaio(nvme)]
    folder = nvme_folder(config, environment)
    if folder:
        findings.append(machine.check_disk(folder, size, nvme))
    problems = []
    if alone:
        problems += check_nvme("auto", "nvme_path") if nvme and not folder else []
        problems += check_build_locks() if device != "none" else []
        problems += check_locked_memory(config, launch.strategy, "bf16")
    findings += [of_problem("NVMe" if nvme else "compiler", problem) for problem in problems]
    joined = machine.NCCL_SHARED_MEMORY if on_gpu and launch.here > 1 else 0
    findings.append(machine.check_shared_memory(machine.shared_memory_free(), joined))
    infiniband = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    return findings + machine.check_limits(machine.soft_limits(), launch.gpus, launch.machines, launch.processes, infiniband)


def check_numbers(launch, environment, args, folder, speed):
    """Return the findings on some steps of a launch: that they run, their losses beside one process's, and what slows them."""
    from zerotune.model.loading import hidden_size, load_config_and_tokenizer

    try:
        config = load_config_and_tokenizer(args)[0]
        findings, run = losses.compare(launch, environment, args, config, folder)
    except UserError as error:
        return [of_problem("configuration", problem) for problem in error.problems]
    if run is None:
        return findings
    content, training = run
    learn, total = content["parameters"]["trainable"], content["parameters"]["total"]
    cut = content["arguments"]  # as it ran
    accumulation, precision = cut["gradient_accumulation_steps"], args.mixed_precision
    stage = section(launch.json, "zero_optimization").get("stage", 0)
    findings += configuration.check_sizes(launch.json, hidden_size(config), learn, total, precision, launch.processes)
    facts = stage, learn, total, precision, accumulation, launch.processes, speed, training[-1]["step_seconds"]
    findings += configuration.check_network(*facts)
    padding = sum(record["padding_fraction"] for record in training) / len(training)
    rows = cut["per_device_train_batch_size"]
    return [
        *findings,
        configuration.check_padding(padding, 1 if args.max_tokens_per_micro_batch else rows, accumulation, args.group_by_length),
    ]


@contextlib.contextmanager
def folder_of(launch, parent):
    """Make a folder for the doctor's files, and remove it; on several machines it is one for all, which machine 0 removes."""
    if launch.machines == 1:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=parent, ignore_cleanup_errors=True) as folder:
            yield folder
        return
    folder = Path(parent or tempfile.gettempdir()) / f"doctor-{launch.address}-{launch.port}"
    folder.mkdir(exist_ok=True)
    try:
        yield folder
    finally:
        if launch.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def examine(words, environment, size, say=lambda text: None):
    """Return all findings on a launch; words: train.py's flags, none for the machine alone; say: hears what is going on."""
    launch = launch_of(environment)
    say(f"{launch}; the machine")
    args, of_configuration = configuration.check_configuration(launch, words) if words else (None, [])
    findings = check_machine(launch, environment, size, configuration.check_frozen(args), alone=not words)
    places = ranks.check_places(launch.processes, launch.machines, launch.gpus)
    findings.append(places)
    reached, speed = places.verdict != "will fail", None
    # final/ is written into it: it has to be where there is room for one.
    parent = next(path for path in Path(args.output_dir).resolve().parents if path.is_dir()) if args else None
    with folder_of(launch, parent) as folder:
        if reached and launch.processes > 1:
            say("a round trip between all ranks")
            found, speed = ranks.measure(launch, environment, folder)
            findings, reached = findings + found, speed is not None
        findings += of_configuration
        if args and reached:
            say(f"{losses.STEPS} steps under {launch.strategy}, and the same of one process")
            findings += check_numbers(launch, environment, args, folder, speed)
    return findings


def main(words):
    parser = Parser(
        prog="python -m zerotune doctor",
        usage="[STRATEGY=zero2 NUM_PROCESSES=N ...] python -m zerotune doctor [--json] [--size_mib N] [train.py's flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print a list of findings: verdict, check, found, fix")
    parser.add_argument(
        "--size_mib", type=int, default=256, metavar="MIB", help="written to NVME_PATH and read back (default: 256)"
    )
    own, words = parser.parse_known_args(words)
    if own.size_mib < 1:
        raise UserError(f"--size_mib {own.size_mib}: must be greater than 0")

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what was started ends, and its files go

    def say(text):
        print(f"doctor: {text} ...", file=sys.stderr, flush=True)

    findings = examine(words, dict(os.environ), own.size_mib * machine.MIB, say)
    print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2) if own.json else report(findings))
    return exit_code(findings)
