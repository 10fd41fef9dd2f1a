"""Runs of train.py whose ranks are forks of one process that has imported the libraries once: their start is most of a launch.

The environment of each rank is the one that `accelerate launch` makes for the YAML, taken from accelerate itself. A process
of its own does the forking: it has run no operator, so that no thread of torch is lost in a fork.
"""

import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def launch_environment(strategy, processes, environment):
    """Return (number of ranks, the environment that `accelerate launch` gives them all)."""
    from accelerate.commands import launch

    words = ["--config_file", f"accelerate_configs/{strategy}.yaml", *(["--num_processes", str(processes)] if processes else [])]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args([*words, "train.py"]))
    os.environ.clear()
    os.environ.update(environment)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        return args.num_processes, launch.prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu:
        return args.num_processes, launch.prepare_multi_gpu_env(args)
    return 1, launch.prepare_simple_launcher_cmd_env(args)[1]


def run(strategy, processes, flags, log, environment, timeout=600):
    """Run train.py in forks, its output in the file `log`; return the exit code: 0, or that of the first rank that failed.

    strategy: of accelerate_configs/, or None for one process without a launcher. As under torch's launcher, a rank that fails ends
    the others.
    """
    count, ranks = 1, {}
    if strategy is not None:
        own = {key: environment[key] for key in ("ACCELERATE_DEEPSPEED_CONFIG_FILE",) if key in environment}  # a test's JSON
        count, environment = launch_environment(strategy, processes, environment)
        environment |= own
    with socket.socket() as free:
        free.bind(("", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    here = count // int(environment.get("MACHINES", 1))  # a test's: on so many machines the ranks believe to be
    launched = count > 1 or "ACCELERATE_USE_DEEPSPEED" in environment
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank % here, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": here}
        pid = os.fork()
        if pid == 0:
            become_a_rank(flags, log, environment | ({k: str(v) for k, v in place.items()} | address if launched else {}))
        ranks[pid] = None
    end, first = time.time() + timeout, 0
    while None in ranks.values():
        for pid in [pid for pid, code in ranks.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ranks[pid] = os.waitstatus_to_exitcode(status)
                if ranks[pid] and not first:
                    first, end = ranks[pid], time.time() + 30
                    for other in [other for other, code in ranks.items() if code is None]:
                        os.kill(other, signal.SIGTERM)
            elif time.time() > end:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return first


def become_a_rank(flags, log, environment):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    if environment.get("RANK", "0") == environment.get("LIMITED_RANK"):  # a test's: so much more memory and no more
        limit_memory(int(environment["LIMITED_BYTES"]))
    sys.argv = [environment.get("SCRIPT", "train.py"), *flags]
    try:
        runpy.run_path(str(ROOT / environment.get("SCRIPT", "train.py")), run_name="__main__")
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def limit_memory(size):
    """Let this process take `size` bytes of memory beside what it has."""
    status = Path("/proc/self/status").read_text()
    used = 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + size, used + size))


def import_libraries():
    """Import what train.py may: the threads that some libraries start with their first work do not outlive a fork."""
    import bitsandbytes  # noqa: F401
    import cpuinfo
    import deepspeed  # noqa: F401
    import evaluate  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import peft  # noqa: F401
    import transformers

    import train  # noqa: F401

    facts = cpuinfo.get_cpu_info()  # takes a second of a process of its own, each time that DeepSpeed loads an operator
    cpuinfo.get_cpu_info = lambda: facts
    for task in ("CausalLM", "Seq2SeqLM", "SequenceClassification"):
        getattr(transformers, f"AutoModelFor{task}")
    for family in ("t5", "bart", "llama", "gpt2", "bert"):
        __import__(f"transformers.models.{family}.modeling_{family}")


class Server:
    """The process that forks; the environment it was started with decides what the libraries read when they are imported."""

    def __init__(self):
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=ROOT, text=True, **pipes)

    def run(self, strategy, processes, flags, log, environment):
        """Return (exit code, output) of a run."""
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        request = [strategy, processes, [str(flag) for flag in flags], str(log), environment]
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline()), Path(log).read_text(errors="replace")

    def stop(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    import_libraries()
    for line in sys.stdin:
        answers.write(f"{run(*json.loads(line))}\n")
        answers.flush()


if __name__ == "__main__":
    serve()
