"""Collect the wheels that an air-gapped machine lacks; scripts/wheelhouse.sh is the front and explains the inputs.

pip alone cannot: `pip download --python-version` evaluates markers for the Python that runs it, and its resolver refuses a target
that has another version than the list pins. So the dependencies are walked here, from each wheel's own metadata, with the target's
markers and without what it has; pip fetches, and builds what has no wheel. Tests: tests/test_wheelhouse.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

# pip's own copy, because a bare Python with pip has no other.
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.tags import compatible_tags, cpython_tags, mac_platforms
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
from pip._vendor.packaging.version import InvalidVersion, Version

from zerotune.errors import RunError, UserError, nearest

ROOT = Path(__file__).resolve().parents[2]
PLATFORM = re.compile(
    r"(manylinux(?:1|2010|2014|_2_\d+)|linux)_(x86_64|aarch64|ppc64le|s390x)|(macosx_\d+_\d+)_(x86_64|arm64)|(win)_(amd64|arm64)"
)
GLIBC = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}  # the older names of manylinux_2_<minor>
HEAD = "# wheelhouse:"  # begins each requirements.txt that is written here; one without it is somebody's own


class Wheelhouse:
    """A folder of wheels for one target: a Python version, a platform, and what is installed there, {name: Version or None}."""

    def __init__(self, folder, python, platform, had):
        self.folder, self.had = folder, had
        self.target = f"Python {python} on {platform}"
        names, self.markers = describe(platform)
        self.markers |= {"python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython"}
        self.markers["platform_python_implementation"] = "CPython"
        version = tuple(map(int, python.split(".")))
        abi = "cp{}{}".format(*version)
        self.tags = {*cpython_tags(version, [abi], names), *compatible_tags(version, abi, names)}
        self.options = ["--python-version", python, "--implementation", "cp", "--abi", abi]
        self.options += [word for name in names for word in ("--platform", name)]

    def best(self, folder, name, specifier):
        """Return (version, path) of the newest wheel in a folder that the target can install, or None."""
        found = [
            (version, path)
            for path, wheel, version, tags in wheels(folder)
            if wheel == name and specifier.contains(version, prereleases=True) and not self.tags.isdisjoint(tags)
        ]
        return max(found, default=None)

    def closure(self, asker, roots, constraints):
        """Return ({name: (version, path)} of all that `roots` need and the target lacks, notes on what it has)."""
        specifiers = dict(constraints)  # only ever narrowed, so that the rounds end
        while True:
            before, chosen, notes = dict(specifiers), {}, set()
            queue, seen = [(asker, requirement, ()) for requirement in roots], set()
            while queue:
                asked_by, requirement, of_extras = queue.pop()
                name, extras, marker = canonicalize_name(requirement.name), frozenset(requirement.extras), requirement.marker
                if marker and not any(marker.evaluate({**self.markers, "extra": extra}) for extra in ("", *of_extras)):
                    continue
                if name in self.had:
                    version = self.had[name]
                    if extras or (version and not requirement.specifier.contains(version, prereleases=True)):
                        wants = f"{name}[{','.join(sorted(extras))}]".replace("[]", "") + str(requirement.specifier)
                        notes.add(f"{asked_by} wants {wants}; the target's {name} {version or ''} is left as it is")
                    continue
                specifiers[name] = specifiers.get(name, SpecifierSet()) & requirement.specifier
                if (name, extras) not in seen:
                    seen.add((name, extras))
                    chosen[name] = self.best(self.folder, name, specifiers[name])
                    queue += [(name, need, extras) for need in needs(chosen[name][1])] if chosen[name] else []
            missing = {name: specifiers[name] for name, found in chosen.items() if found is None}
            if missing:
                self.fetch(missing)
            elif specifiers == before:
                return chosen, sorted(notes)

    def fetch(self, missing):
        """Bring a wheel for each name and specifier into the folder, downloaded or built from its sources."""
        wanted = [f"{name}{specifier}" for name, specifier in sorted(missing.items())]
        print(f"wheelhouse: fetching {' '.join(wanted)}", flush=True)
        partial = self.folder / ".partial"  # a wheel leaves it by a rename, so that none in the folder is cut short
        shutil.rmtree(partial, ignore_errors=True)
        if pip("download", "--prefer-binary", "--dest", partial, *self.options, *wanted):
            raise RunError(f"pip cannot fetch all of these for {self.target}; its message is above")
        for source in [path for path in sorted(partial.iterdir()) if path.suffix != ".whl"]:
            if pip("wheel", "--no-cache-dir", "--wheel-dir", partial, source):
                raise RunError(f"{source.name} has no wheel for {self.target}, and pip cannot build one; its message is above")
        for name, specifier in missing.items():
            found = self.best(partial, name, specifier)
            if found is None:
                made = [path.name for path, wheel, *_ in wheels(partial) if wheel == name]
                raise RunError(
                    f"{name} has no wheel for {self.target}, and its sources build into one that is only for machines like this "
                    f"({', '.join(made)}); build it on the target and add {name} to HAVE"
                )
            found[1].replace(self.folder / found[1].name)
        shutil.rmtree(partial)


def describe(platform):
    """Return (the platforms whose wheels run on this one, best first; what markers ask of it)."""
    match = PLATFORM.fullmatch(platform)
    if match is None:
        raise UserError(
            f"PLATFORM {platform} is not known; allowed: manylinux_2_28_x86_64 (or another 2_N; manylinux2014; aarch64), "
            "linux_x86_64, macosx_14_0_arm64, win_amd64; give the target's"
        )
    kind, machine = (group for group in match.groups() if group)
    if kind == "win":
        systems, names = ("nt", "win32", "Windows"), [platform]
        machine = machine.upper()
    elif kind.startswith("macosx"):
        systems = ("posix", "darwin", "Darwin")
        names = list(mac_platforms(tuple(map(int, kind.split("_")[1:])), machine))
    else:
        systems = ("posix", "linux", "Linux")
        # linux_* says nothing of the C library; glibc 2.17 is the oldest for which packages are built.
        newest = 17 if kind == "linux" else GLIBC.get(kind) or int(kind.split("_")[-1])
        names = [platform] if kind == "linux" else []
        for minor in range(newest, 4, -1):
            names += [f"{name}_{machine}" for name in (f"manylinux_2_{minor}", *GLIBC) if GLIBC.get(name, minor) == minor]
    return names, dict(zip(("os_name", "sys_platform", "platform_system", "platform_machine"), (*systems, machine), strict=True))


def pip(command, *words):
    """Run a pip command on single packages, never their dependencies; return its exit code."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DS_BUILD_")}
    environment["DS_BUILD_OPS"] = "0"  # DeepSpeed's operators would be for the torch and the CUDA of this machine
    command = [sys.executable, "-m", "pip", command, "-qq", "--disable-pip-version-check", "--no-deps", *words]
    return subprocess.run(command, env=environment).returncode


def wheels(folder):
    """Return (path, name, version, tags) of each wheel in a folder."""
    try:
        parsed = [(path, *parse_wheel_filename(path.name)) for path in sorted(folder.glob("*.whl"))]
    except ValueError as error:
        raise UserError(f"{folder}: {error}; remove it") from None
    return [(path, name, version, tags) for path, name, version, _, tags in parsed]


def needs(path):
    """Return the Requirements of a wheel, with their markers."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
            metadata = BytesParser().parsebytes(archive.read(name), headersonly=True)
    except zipfile.BadZipFile:
        raise RunError(f"{path} is damaged; remove it and run this again") from None
    return [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]


def lines_of(variable, path):
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{variable}={path} cannot be read ({error.strerror}); give the path of a file") from None


def read_had(path):
    """Return {name: Version, or None where it is not known} of a `pip freeze`, with its editable and URL installs."""
    had = {}
    for line in lines_of("HAVE", path):
        match = re.match(r"([A-Za-z0-9][\w.-]*)\s*(?:===?\s*(\S+)|@.*)?$", line.strip())
        match = match or re.search(r"#egg=([\w.-]+)()", line) or re.match(r"# Editable.*\(([\w.-]+)==(.+)\)", line)
        if match:
            try:
                had[canonicalize_name(match[1])] = Version(match[2] or "")
            except InvalidVersion:
                had[canonicalize_name(match[1])] = None
    if not had:
        raise UserError(f"HAVE={path} names no package; give the output of `pip freeze` on the target")
    return had


def read_list(path):
    """Return {name: Requirement} of a requirements file."""
    lines = [line.split("#")[0].strip() for line in lines_of("REQUIREMENTS", path)]
    listed = {}
    for line in filter(None, lines):
        try:
            listed[canonicalize_name(Requirement(line).name)] = Requirement(line)
        except InvalidRequirement:
            raise UserError(f"REQUIREMENTS={path}: {line!r} is not a package; write lines of the form name==version") from None
    return listed


def collect(words, given):
    """Fill the folder, and write its requirements.txt last; `words` are the arguments and `given` is the environment."""
    if len(words) != 3 or not all(words):
        raise UserError(f"needs PYTHON_VERSION PLATFORM DIR, such as 3.12 manylinux_2_28_x86_64 wheels; given: {shlex.join(words)}")
    python, platform, folder = words[0], words[1], Path(words[2])
    if not re.fullmatch(r"3\.\d+", python):
        raise UserError(f"PYTHON_VERSION {python} is not of the form 3.N; give the target's, such as 3.12")
    limit = given.get("MAX_MIB") or "0"
    if not re.fullmatch(r"\d+", limit):
        raise UserError(f"MAX_MIB={limit} is not a whole number of MiB; give one, or 0 for no limit")
    path = Path(given.get("REQUIREMENTS") or ROOT / "requirements.txt")
    listed = read_list(path)
    only = [canonicalize_name(name) for name in given.get("ONLY", "").split()] or list(listed)
    for name in only:
        if name not in listed:
            raise UserError(f"ONLY: {name} is not in {path}{nearest(name, listed)}; allowed: {' '.join(listed)}")
    house = Wheelhouse(folder, python, platform, read_had(given["HAVE"]) if given.get("HAVE") else {})
    result = folder / "requirements.txt"
    if result.exists() and not result.read_text(errors="replace").startswith(HEAD):
        raise UserError(f"{result} was not written by this script and would be lost; give another DIR")
    folder.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)  # it says that the folder is complete
    shutil.rmtree(folder / ".partial", ignore_errors=True)

    constraints = {name: requirement.specifier for name, requirement in listed.items()}
    chosen, notes = house.closure(path.name, [listed[name] for name in only], constraints)
    present = [path for path, *_ in wheels(folder)]
    needed = {path for _, path in chosen.values()}
    notes += [f"{path} is not needed by this list; remove it if nothing else needs it" for path in present if path not in needed]
    print("".join(f"wheelhouse: note: {note}\n" for note in notes), end="")
    sizes = sorted(((path.stat().st_size / 2**20, path.name.split("-")[0]) for path in present), reverse=True)
    total = sum(size for size, _ in sizes)
    if 0 < int(limit) < total:
        each = ", ".join(f"{name} {size:.1f}" for size, name in sizes)
        raise RunError(f"{folder} holds {total:.1f} MiB, more than MAX_MIB={limit}; leave some out by HAVE or ONLY: {each}")
    lines = [f"{HEAD} what {house.target} lacks", *(f"{name}=={chosen[name][0]}" for name in sorted(chosen))]
    written = folder / "requirements.txt.partial"
    written.write_text("\n".join(lines) + "\n")
    written.replace(result)
    print(f"wheelhouse: {len(chosen)} wheels, {total:.1f} MiB in {folder}; copy it to the target and run there:")
    print("python3 -m pip install --no-index --no-deps --find-links", shlex.join([str(folder), "-r", str(result)]))


def main(words):
    try:
        collect(words, os.environ)
    except OSError as error:
        raise UserError(str(error)) from None
    return 0
