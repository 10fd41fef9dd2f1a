"""What a reader is told exists: flags, paths, scripts; and the linters are clean."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from zerotune.arguments import Arguments

SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "ds_configs").glob("*.md")), *SCRIPTS]
OTHER_FLAGS = set(
    "config_file num_processes num_machines machine_rank main_process_ip main_process_port deepspeed_multinode_launcher help config "
    "disable-pip-version-check quiet".split()
)


def test_ruff_and_shellcheck_are_clean():
    assert len(SCRIPTS) >= 6
    tools = Path(sys.executable).parent
    for command in (
        [tools / "ruff", "check", "."],
        [tools / "ruff", "format", "--check", "."],
        [tools / "shellcheck", "-x", "-P", "SCRIPTDIR", *SCRIPTS, ROOT / ".ci" / "run"],
    ):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_flag_in_documents_exists():
    known = set(Arguments.__dataclass_fields__) | OTHER_FLAGS
    found = {(path.name, flag) for path in DOCUMENTS for flag in re.findall(r"(?<![\w-])--([a-z][a-z_-]+)", path.read_text())}
    assert len(found) > 30
    assert not {(name, flag) for name, flag in found if flag not in known}


def test_every_path_in_documents_exists():
    pattern = r"(?<![\w/.-])((?:zerotune|scripts|ds_configs|accelerate_configs|tests|metrics|benchmarks|docs)/[\w./-]*\w)"
    found = {(path.name, place) for path in DOCUMENTS for place in re.findall(pattern, path.read_text())}
    assert len(found) > 15
    assert not {(name, place) for name, place in found if not (ROOT / place).exists()}


@pytest.mark.parametrize("script", [path for path in SCRIPTS if "launch.sh" in path.read_text() and path.stem != "launch"])
def test_worked_examples_parse(script, tmp_path, tiny, rows16):
    """Each script's command lines are accepted as they stand, with its files replaced by tiny ones."""
    from zerotune.arguments import parse_arguments

    lines = script.read_text().replace("\\\n", " ").splitlines()
    common = re.search(r"common=\((.*?)\n\)", script.read_text(), re.S)
    launches = [line for line in lines if "scripts/launch.sh" in line and not line.lstrip().startswith("#")]
    assert launches
    for line in launches:
        words = shlex.split(
            line.partition("launch.sh")[2].replace('"$@"', "").replace('"${common[@]}"', common[1] if common else "")
        )
        words = [word for word in words if word != '"$@"']
        for flag, value in (("--train_file", rows16), ("--validation_file", rows16), ("--test_file", rows16)):
            if flag in words:
                words[words.index(flag) + 1] = str(value)
        words[words.index("--model_name_or_path") + 1] = str(tiny("t5"))
        words[words.index("--output_dir") + 1] = str(tmp_path / "out")
        parse_arguments([word for word in words if not word.startswith("$")])
