"""What scripts/launch.sh would start, read from the same environment variables, and how the doctor starts processes itself."""

import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zerotune.engine.deepspeed_config import read_deepspeed_config, section
from zerotune.errors import UserError
from zerotune.tools.benchmark.cells import REASON
from zerotune.tools.benchmark.main import child_limits, end
from zerotune.tools.machines import place_of

ROOT = Path(__file__).resolve().parents[3]


def count_gpus(strategy, environment):
    """Return how many GPUs of this machine launch.sh counts: those visible, else the driver's; none for STRATEGY=cpu."""
    if strategy == "cpu":
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len(visible.split(",")) if visible.strip() else 0
    with suppress(OSError):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
        return sum(line.startswith("GPU") for line in listed.splitlines())
    return 0


def launch_of(environment):
    """Return the Launch of an environment; raise UserError with launch.sh's words for what it would refuse."""
    strategy = environment.get("STRATEGY") or "zero2"
    allowed = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
    if strategy not in allowed:
        raise UserError(f"STRATEGY={strategy} is not known; allowed: {' '.join(allowed)}")
    numbers = {}
    for name in ("NUM_MACHINES", "NUM_PROCESSES"):
        word = environment.get(name) or ""
        if word and (not word.isdigit() or (name.startswith("NUM") and int(word) < 1)):
            raise UserError(f"{name}={word} is not a whole number; give one")
        numbers[name] = int(word) if word else None
    machines = 1 if strategy == "single" else numbers["NUM_MACHINES"] or 1
    gpus = count_gpus(strategy, environment)
    processes = 1 if strategy == "single" else numbers["NUM_PROCESSES"] or gpus * machines or 2
    # That the machines do not divide the processes is a finding, and no mistake that ends the doctor.
    _, rank, address, port = place_of(environment, machines) if machines > 1 else (1, 0, "127.0.0.1", 0)
    return Launch(strategy, processes, machines, rank, address, port, gpus)


def reason_of(log):
    """Return the line of a failed run's output that says why: of a refusal its first, of an error its last, else its very last."""
    reasons = [line for line in REASON.findall(log) if "ChildFailedError" not in line]  # the launcher's, about some rank's
    refusals = [line for line in reasons if ": error" in line]
    lines = refusals[:1] or reasons[-1:] or log.strip().splitlines()[-1:]
    return lines[0].strip()[:300] if lines else ""


def stop(process):
    """End a launcher that may hang where it hears no signal."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    process.kill()
    process.wait()


def run_to_end(command, environment, log, timeout=None, stop=end):
    """Run a command, its output in the file `log`; return its exit code, or "timeout" after that many seconds.

    stop: ends the process where it is not waited for any longer.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    environment = {**environment, "PYTHON": sys.executable, "PYTHONPATH": path}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [str(word) for word in command], env=environment, stdout=file, stderr=subprocess.STDOUT, preexec_fn=child_limits(0)
        )
        try:
            return process.wait(timeout=timeout)
        except BaseException as error:
            stop(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            return "timeout"


@dataclass(frozen=True)
class Launch:
    """processes: over all machines; rank: this machine's; port 0: any free one; gpus: of this machine."""

    strategy: str
    processes: int
    machines: int
    rank: int
    address: str
    port: int
    gpus: int

    @property
    def yaml(self):
        return ROOT / "accelerate_configs" / f"{self.strategy}.yaml"

    @property
    def here(self):
        """Return the number of processes on this machine."""
        return self.processes // self.machines

    @property
    def json(self):
        """Return the strategy's DeepSpeed JSON as it is written, {} without DeepSpeed; UserError if it cannot be read."""
        import yaml

        try:
            content = yaml.safe_load(self.yaml.read_text()) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{self.yaml}: {' '.join(str(error).split())}") from None
        path = section(content, "deepspeed_config").get("deepspeed_config_file")
        return read_deepspeed_config(path) if path else {}

    def __str__(self):
        machines = f" on {self.machines} machines" if self.machines > 1 else ""
        devices = f"{self.gpus} GPU(s) here" if self.gpus else "no GPU"
        return f"{self.strategy}, {self.processes} process(es){machines}, {devices}"
