"""Tiny models and data for the tests, and the one way in which they start train.py: as a user does, in real processes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import pytest
import torch
from forks import Server

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORDS = [f"w{number}" for number in range(60)]
SPECIALS = ["<pad>", "</s>", "<unk>", "<s>"]  # numbers 0 to 3
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A background job of a shell ignores SIGINT, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Skip what this machine cannot run, with what to install; where CI is set nothing but a GPU may be missing."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if not os.environ.get("CI") and (reason := nvme_lacks()):
        for item in items:
            if "nvme" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
    if not os.environ.get("CI") and not shutil.which("chromium"):
        for item in items:
            if "browser" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no chromium; Debian: apt install chromium"))


def pytest_collection_finish(session):
    """Build DeepSpeed's operators beside the tests that need none, in the time these leave; one that needs them waits for the lock.

    Minutes on a new machine, most of them for NVMe's. Not where there is CUDA, whose operators are others.
    """
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    marks = [{mark.name for mark in item.iter_markers()} for item in session.items]
    wanted = any({"nvme", "launch"} <= names and "skip" not in names for names in marks)
    if folder and wanted and not session.config.option.collectonly and not torch.cuda.is_available():
        command = ["nice", "-n", "19", sys.executable, "-c", OPERATORS]
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet)  # Ctrl-C here would leave the lock of a half-built one


OPERATORS = """
from zerotune.engine.deepspeed_config import choose_deepspeed_accelerator, find_ninja
choose_deepspeed_accelerator()
find_ninja()
from deepspeed.accelerator import get_accelerator
for builder in ("ShareMemCommBuilder", "CPUAdamBuilder", "PinMemoryBuilder", "AsyncIOBuilder"):
    get_accelerator().create_op_builder(builder).load(verbose=False)
"""


def nvme_lacks():
    """Return what NVMe offload lacks here, '' if nothing: libaio for a C++ compiler, or the right to lock memory."""
    command = ["c++", "-x", "c++", "-", "-laio", "-o", os.devnull]
    program = "#include <libaio.h>\nint main() { io_setup(1, nullptr); }"
    try:
        linked = subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0
    except OSError:
        linked = False
    if not linked:
        return "no libaio with its headers; Debian: apt install libaio-dev g++"
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    few = os.geteuid() != 0 and 0 <= locked < 2_000_000_000
    return f"this user may lock {locked:,} bytes of memory, and DeepSpeed locks 2 GB; raise ulimit -l" if few else ""


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Keep the tests' tokenised rows and metric modules out of the user's caches."""
    folder = tmp_path_factory.mktemp("caches")
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE", "NVME_PATH"):
        os.environ[name] = str(folder / name.lower())
    datasets.config.HF_DATASETS_CACHE = folder / "hf_datasets_cache"  # read from the environment when it was imported
    os.environ["HF_HUB_OFFLINE"] = "1"


def tiny_config(family, dropout):
    """Return (model class, configuration) of a two-block model of a family, with its dropout set everywhere."""
    import transformers as t

    size, common = len(WORDS) + len(SPECIALS), {"pad_token_id": 0, "eos_token_id": 1}
    # Smooth activations: a ReLU unit at its edge turns the rounding by which two processors differ into another gradient.
    if family in ("t5", "t5_classifier"):
        config = t.T5Config(
            vocab_size=size, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=dropout, feed_forward_proj="gelu",
            classifier_dropout=dropout, decoder_start_token_id=0, **common,
        )  # fmt: skip
        return t.T5ForConditionalGeneration if family == "t5" else t.T5ForSequenceClassification, config
    if family in ("bart", "bart_classifier"):
        config = t.BartConfig(
            vocab_size=size, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=dropout, attention_dropout=dropout,
            activation_dropout=dropout, classifier_dropout=dropout, bos_token_id=3, decoder_start_token_id=1, forced_eos_token_id=1,
            **common,
        )  # fmt: skip
        return t.BartForConditionalGeneration if family == "bart" else t.BartForSequenceClassification, config
    if family in ("llama", "phi3", "qwen2", "qwen3"):
        name = {"llama": "Llama", "phi3": "Phi3", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        if family.startswith("qwen"):  # two heads share keys and values; --tokenizer_name says whose tokenizer
            common |= {"num_key_value_heads": 2, "head_dim": 8}
        config = getattr(t, f"{name}Config")(
            vocab_size=size, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=128, attention_dropout=dropout, bos_token_id=3, **common,
        )  # fmt: skip
        return getattr(t, f"{name}ForCausalLM"), config
    if family == "gpt2":
        config = t.GPT2Config(
            vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=128, resid_pdrop=dropout, embd_pdrop=dropout,
            attn_pdrop=dropout, bos_token_id=3, **common,
        )  # fmt: skip
        return t.GPT2LMHeadModel, config
    config = t.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, pad_token_id=0,
    )  # fmt: skip
    return t.BertForSequenceClassification, config


def save_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(SPECIALS + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_max_length=128,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return a function (family, dropout=0.0) -> folder of a saved tiny model with its tokenizer."""
    made = {}

    def make(family, dropout=0.0):
        if (family, dropout) not in made:
            folder = tmp_path_factory.mktemp(f"{family}_{dropout}")
            model_class, config = tiny_config(family, dropout)
            torch.manual_seed(1)
            model_class(config).save_pretrained(folder)
            save_tokenizer(folder)
            made[family, dropout] = folder
        return made[family, dropout]

    return make


def text(number, length):
    return " ".join(WORDS[(number * 7 + place * (number % 5 + 1)) % len(WORDS)] for place in range(length))


@pytest.fixture(scope="session")
def rows16(tmp_path_factory):
    """Return a file of 16 rows of very unequal length (sources of 1 to 61 words, targets of 1 to 31), where means of means show."""
    path = tmp_path_factory.mktemp("rows") / "rows16.jsonl"
    rows = [{"source": text(n, 1 + 4 * n), "target": text(n + 3, 1 + (n * 11) % 31), "label": n % 3} for n in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


OWN_CODE = """
import os
from transformers import LlamaForCausalLM

class OwnModel(LlamaForCausalLM):
    passes = 0

    def forward(self, *args, **kwargs):
        OwnModel.passes += self.training
        if OwnModel.passes == 3 and os.environ["RANK"] == "1":
            raise ValueError("rows of rank 1 are odd\\nand that is bad")
        return super().forward(*args, **kwargs)
"""


@pytest.fixture
def fails_on_rank_1(tiny, tmp_path):
    """Return the folder of a Llama that brings its own code, which raises in the third pass of rank 1."""
    folder = shutil.copytree(tiny("llama"), tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "own_model.OwnModel"}}))
    (folder / "own_model.py").write_text(OWN_CODE)
    return folder


@dataclass
class Result:
    code: int
    output: str
    folder: Path

    def records(self, key):
        """Return the metrics.jsonl records that have `key`."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if key in record]

    @property
    def run(self):
        return json.loads((self.folder / "run.json").read_text())

    def weights(self):
        from safetensors.torch import load_file

        return load_file(self.folder / "final" / "model.safetensors")


def flags_of(options):
    """Return {name: value} as a command line."""
    words = []
    for name, value in options.items():
        if value is None:
            continue
        words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return words


@pytest.fixture(scope="session")
def forks(caches):
    """Return the server whose forks are ranks of train.py, or None where there is CUDA, which does not outlive a fork."""
    server = None if torch.cuda.is_available() else Server()
    yield server
    if server:
        server.stop()


@pytest.fixture
def train(tmp_path, forks):
    """Return a function that runs train.py under a strategy of accelerate_configs/ and gives a Result.

    strategy None runs `python train.py` without a launcher. check=True fails the test unless train.py succeeds and the engine in
    run.json is the one asked for. Ranks are forks of a warmed process; real=True starts them by `accelerate launch`.
    """

    def start(strategy, processes=None, check=True, environment=None, name="run", real=False, **options):
        folder = tmp_path / name
        options.setdefault("output_dir", folder)
        options.setdefault("end_report", "false")  # seconds of each run; what looks at it asks for it
        options.setdefault("generation_max_length", 16)  # an untrained model writes to the end
        options.setdefault("reduce", "once")  # what auto comes to here, by a plan of seconds (tests/test_reduction.py)
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})}
        if forks and not real:
            log = tmp_path / "logs" / f"{name}{len(list(tmp_path.glob('logs/*')))}.log"
            result = Result(*forks.run(strategy, processes, flags_of(options), log, environment), Path(options["output_dir"]))
        else:
            result = launch(strategy, processes, environment, options)
        if check:
            assert result.code == 0, result.output[-6000:]
            check_engine(result.run["engine"], strategy, processes)
        return result

    def launch(strategy, processes, environment, options):
        command = [sys.executable]
        if strategy is not None:
            command += ["-m", "accelerate.commands.accelerate_cli", "launch"]
            command += ["--config_file", f"accelerate_configs/{strategy}.yaml"]
            command += ["--num_processes", str(processes)] if processes else []
        command += ["train.py", *flags_of(options)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        return Result(done.returncode, done.stdout + done.stderr, Path(options["output_dir"]))

    return start


def check_engine(engine, strategy, processes):
    """Assert that run.json names the engine that the strategy stands for, so that no fall-back passes as it."""
    if strategy is None or strategy == "single":
        assert engine["num_processes"] == 1 and engine["backend"] is None
    elif strategy in ("ddp", "cpu"):
        assert (engine["class"], engine["num_processes"]) == ("DistributedDataParallel", processes or 2)
    else:
        assert engine["class"] == "DeepSpeedEngine" and engine["num_processes"] == (processes or 2)
        assert f"zero{engine['zero_stage']}" == strategy.split("_")[0]
        kind = {"offload": "cpu", "nvme": "nvme"}.get(strategy.partition("_")[2], "none")
        assert engine["offload_optimizer"] == kind
        assert engine["offload_param"] == (kind if engine["zero_stage"] == 3 else "none")
        assert engine["base_optimizer"] == ("AdamW" if kind == "none" else "DeepSpeedCPUAdam")
        assert (engine["parameters_partitioned_at_load"] > 0) == (engine["zero_stage"] == 3)
