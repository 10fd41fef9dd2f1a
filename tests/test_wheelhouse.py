"""scripts/wheelhouse.sh: what a target lacks, by its own markers, and nothing else; sources; mistakes; and a real install."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from pip._vendor.packaging.utils import canonicalize_name

TARGET = ("3.12", "manylinux_2_28_x86_64")


@pytest.fixture
def wheelhouse(tmp_path):
    """Return a function (words, **environment) -> the finished process, run in tmp_path; offline unless PIP_NO_INDEX is empty."""

    def start(*words, **environment):
        environment = {**os.environ, "PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "links", **environment}
        environment = {name: value for name, value in environment.items() if value is not None}
        command = ["bash", ROOT / "scripts" / "wheelhouse.sh", *words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    (tmp_path / "links").mkdir()
    (tmp_path / "list.txt").write_text("app==1.0  # a comment\nbase==2.0\ntool==1.0\n")
    return start


def make_wheel(folder, name, version, *needs, tag="py3-none-any", size=0):
    folder.mkdir(exist_ok=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{name}-{version}.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{name}-{version}.dist-info/RECORD", "")
        archive.writestr(f"{name}.py", "#" * size)


def collected(folder):
    """Return {name: version} of a folder's requirements.txt."""
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines[0].startswith("#") and len(lines) > 1
    return dict(line.split("==") for line in lines[1:])


def test_closure_is_the_targets(wheelhouse, tmp_path):
    """Markers, tags and pins of the target decide, not of the Python that runs; what it has, and needs alone, is left out."""
    links = tmp_path / "links"
    needs = [
        "base", "heavy>=3", "old; python_version < '3.12'", "windows; sys_platform == 'win32'", "Some.Extra[fast]", "narrow",
        "late<2", "arm; platform_machine == 'aarch64'", "new; python_version >= '3.12'", "option; extra == 'all'", "native",
    ]  # fmt: skip
    make_wheel(links, "app", "1.0", *needs)
    make_wheel(links, "some_extra", "1.0", "speed; extra == 'fast'", "slow; extra == 'slow'", "narrow<3")
    make_wheel(links, "late", "1.5", "narrow<2")  # found out when narrow 3 was taken already
    make_wheel(links, "native", "1.0", tag="cp312-cp312-manylinux_2_17_x86_64")
    for tag in ("cp311-cp311-manylinux_2_17_x86_64", "cp312-cp312-manylinux_2_39_x86_64", "cp312-cp312-win_amd64"):
        make_wheel(links, "native", "2.0", tag=tag)
    for name in "base old windows arm new option speed slow heavy of_heavy tool narrow late".split():
        for version in ("1.0", "2.0", "3.0"):
            make_wheel(links, name, version, *(["of_heavy"] if name == "heavy" else []))
    (tmp_path / "have.txt").write_text("heavy==1.0+cu128\n-e git+https://x.invalid/y#egg=mine\nurl @ file:///x.whl\n")
    given = {"REQUIREMENTS": "list.txt", "HAVE": "have.txt"}

    done = wheelhouse(*TARGET, "out", ONLY="app", **given)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    expected = {"app": "1.0", "base": "2.0", "some-extra": "1.0", "speed": "3.0", "narrow": "1.0", "late": "1.5", "new": "3.0"}
    assert collected(out) == {**expected, "native": "1.0"}
    assert "app wants heavy>=3; the target's heavy 1.0+cu128 is left as it is" in done.stdout
    assert not (out / ".partial").exists()

    (tmp_path / "links").rename(tmp_path / "gone")  # a second run takes what is there, and needs nothing else
    again = wheelhouse(*TARGET, "out", ONLY="app", **given)
    assert again.returncode == 0 and "fetching" not in again.stdout and collected(out) == {**expected, "native": "1.0"}
    # More is wanted and cannot be had: the folder must not look complete, and what it has stays.
    before = sorted(out.glob("*.whl"))
    failed = wheelhouse(*TARGET, "out", **given)
    assert failed.returncode == 1 and "pip cannot fetch" in failed.stderr
    assert not (out / "requirements.txt").exists() and sorted(out.glob("*.whl")) == before
    (tmp_path / "gone").rename(tmp_path / "links")
    assert wheelhouse(*TARGET, "out", **given).returncode == 0 and "tool" in collected(out)


BACKEND = """
import os, zipfile
assert os.environ["DS_BUILD_OPS"] == "0" and "DS_BUILD_FUSED_ADAM" not in os.environ
def build_wheel(folder, config_settings=None, metadata_directory=None):
    name = "app-1.0-{tag}.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as archive:
        archive.writestr("app-1.0.dist-info/METADATA", "Metadata-Version: 2.1\\nName: app\\nVersion: 1.0\\n")
        archive.writestr("app-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {tag}\\n")
        archive.writestr("app-1.0.dist-info/RECORD", "")
    return name
"""


@pytest.mark.parametrize("compiled", [False, True])
def test_sources_are_built_but_not_for_another_machine(wheelhouse, tmp_path, compiled):
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    tag = f"{here}-{here}-linux_{platform.machine()}" if compiled else "py3-none-any"
    source = tmp_path / "app-1.0"
    source.mkdir()
    (source / "backend.py").write_text(BACKEND.format(tag=tag))
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: app\nVersion: 1.0\n")
    (source / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n')
    subprocess.run(["tar", "czf", "links/app-1.0.tar.gz", "app-1.0"], cwd=tmp_path, check=True)
    done = wheelhouse("3.99", TARGET[1], "out", REQUIREMENTS="list.txt", ONLY="app", DS_BUILD_FUSED_ADAM="1")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.*") if path.is_file())
    if compiled:
        assert done.returncode == 1 and files == []
        assert f"app has no wheel for Python 3.99 on {TARGET[1]}" in done.stderr and tag in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert files == ["app-1.0-py3-none-any.whl", "requirements.txt"]


def test_mistakes_cost_a_line(wheelhouse, tmp_path):
    (tmp_path / "empty.txt").write_text("# nothing\nPackage    Version\n")
    (tmp_path / "broken.txt").write_text("app==1.0\nnot a package\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "requirements.txt").write_text("precious\n")
    out = (*TARGET, "out")
    for words, environment, said in [
        ((), {}, "needs PYTHON_VERSION PLATFORM DIR"),
        (TARGET, {}, "given: 3.12 manylinux_2_28_x86_64"),
        (("3.12.1", TARGET[1], "out"), {}, "PYTHON_VERSION 3.12.1 is not of the form 3.N"),
        (("3.12", "ubuntu", "out"), {}, "PLATFORM ubuntu is not known; allowed: manylinux_2_28_x86_64"),
        (("3.12", "manylinux_2_28_amd64", "out"), {}, "PLATFORM manylinux_2_28_amd64 is not known"),
        (out, {"HAVE": "nowhere.txt"}, "HAVE=nowhere.txt cannot be read (No such file"),
        (out, {"HAVE": "empty.txt"}, "HAVE=empty.txt names no package"),
        (out, {"REQUIREMENTS": "nowhere.txt"}, "REQUIREMENTS=nowhere.txt cannot be read"),
        (out, {"REQUIREMENTS": "broken.txt"}, "'not a package' is not a package"),
        (out, {"ONLY": "deepspede"}, "did you mean deepspeed?"),
        (out, {"MAX_MIB": "1G"}, "MAX_MIB=1G is not a whole number"),
        (out, {"PYTHON": "nowhere/python"}, "PYTHON=nowhere/python is no Python"),
        ((*TARGET, "mine"), {}, "was not written by this script"),
        ((*TARGET, "list.txt"), {}, "list.txt"),
    ]:
        done = wheelhouse(*words, **environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and said in done.stderr, (words, environment, done.stderr)
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "requirements.txt").read_text() == "precious\n"


def test_a_folder_over_the_limit_is_refused_with_sizes(wheelhouse, tmp_path):
    out = tmp_path / "out"
    for name, mib in (("app", 1), ("base", 3), ("tool", 2)):
        make_wheel(out, name, "2.0" if name == "base" else "1.0", size=mib * 2**20)
    given = {"REQUIREMENTS": "list.txt"}
    assert wheelhouse(*TARGET, "out", MAX_MIB="7", **given).returncode == 0
    done = wheelhouse(*TARGET, "out", MAX_MIB="5", **given)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "more than MAX_MIB=5" in done.stderr and done.stderr.endswith("base 3.0, tool 2.0, app 1.0\n")
    assert not (out / "requirements.txt").exists()
    (out / "app-1.0-py3-none-any.whl").write_bytes(b"PK cut short")
    done = wheelhouse(*TARGET, "out", **given)
    assert done.returncode == 1 and "app-1.0-py3-none-any.whl is damaged; remove it" in done.stderr


LACKED = {"deepspeed", "hjson", "msgpack"}  # one has no wheel, one is compiled


@pytest.mark.launch
def test_what_is_collected_installs_without_network(wheelhouse, tmp_path):
    """For this Python and platform, from the real index, into a fresh environment."""
    online = {"PIP_NO_INDEX": os.environ.get("PIP_NO_INDEX"), "PIP_FIND_LINKS": os.environ.get("PIP_FIND_LINKS")}
    freeze = {canonicalize_name(item.name): item.version for item in importlib.metadata.distributions()}
    (tmp_path / "have.txt").write_text("".join(f"{name}=={freeze[name]}\n" for name in sorted(freeze) if name not in LACKED))
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    target = f"manylinux_{platform.libc_ver()[1].replace('.', '_')}_{platform.machine()}"
    done = wheelhouse(python, target, "out", HAVE="have.txt", ONLY="deepspeed", **online)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert set(collected(out)) == LACKED and len(list(out.glob("*.whl"))) == len(LACKED)
    assert list(out.glob("deepspeed-*-py3-none-any.whl"))

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    command = done.stdout.splitlines()[-1].split()
    assert command[:4] == ["python3", "-m", "pip", "install"] and {"--no-index", "--no-deps", "-r"} <= set(command)
    command[0] = tmp_path / "fresh" / "bin" / "python"
    # A proxy to nowhere: whatever pip is configured to, it has the folder alone.
    nowhere = {"PIP_PROXY": "http://127.0.0.1:9", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **nowhere}, check=True, capture_output=True)
    show = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    shown = subprocess.run([command[0], "-c", show], check=True, capture_output=True, text=True).stdout
    installed = {canonicalize_name(name): version for name, version in json.loads(shown).items()}
    assert {name: installed[name] for name in LACKED} == collected(out)
    assert f"deepspeed=={installed['deepspeed']}" in (ROOT / "requirements.txt").read_text().splitlines()
