"""manifest.json: what a folder must hold to be a whole checkpoint, so that damage is found before anything in it is opened.

A ZeRO checkpoint is pickled and therefore code: no file of it is loaded unless its size and SHA-256 are those written here.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"


def file_facts(path):
    """Return {"bytes", "sha256"} of a file."""
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def list_files(folder):
    """Return the relative names of all files below a folder, sorted, without the manifest."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() or path.is_symlink())
    return sorted(name for path in found if (name := path.relative_to(folder).as_posix()) != NAME)


def sync(path):
    """Have the system write a file's or folder's contents to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def seal(content):
    """Return the SHA-256 of a manifest's other entries, by which a damaged manifest is known."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write(folder, content):
    """Write and sync manifest.json; content: {"step", "files": {name: file_facts}, ...} of plain JSON values."""
    content = json.loads(json.dumps(content, default=str))
    path = Path(folder) / NAME
    path.write_text(json.dumps(content | {"seal": seal(content)}, indent=2) + "\n")
    sync(path)


def read(folder):
    """Return a checkpoint's manifest; ValueError says why it is none, PermissionError that it may not be read."""
    path = Path(folder) / NAME
    try:
        content = json.loads(path.read_bytes())
        if content["seal"] != seal(content):
            raise ValueError(f"{NAME} is damaged: its seal does not match")
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(f"{NAME}: {error.strerror}") from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{NAME} is damaged") from None
    return content


def verify(folder):
    """Return (manifest, problems): every listed file is there with its size and SHA-256, no other is, the step fits.

    A file that may not be read is no damage: PermissionError.
    """
    try:
        manifest = read(folder)
    except ValueError as error:
        return None, [str(error)]
    problems = []
    if Path(folder).name.split(".")[0] != f"checkpoint-{manifest['step']}":
        problems.append(f"{NAME} is of step {manifest['step']}")
    present, listed = set(list_files(folder)), manifest["files"]
    problems += [f"{name} is missing" for name in sorted(set(listed) - present)]
    problems += [f"{name} is not listed in {NAME}" for name in sorted(present - set(listed))]
    whole = sorted(present & set(listed))
    with ThreadPoolExecutor(8) as pool:  # hashing large blocks leaves the interpreter free for the other threads
        try:
            found = list(pool.map(lambda name: file_facts(Path(folder) / name), whole))
        except PermissionError:
            raise
        except OSError as error:
            return manifest, [*problems, f"{error.filename}: {error.strerror}"]
    for name, facts in zip(whole, found, strict=True):
        if facts["bytes"] != listed[name]["bytes"]:
            problems.append(f"{name} has {facts['bytes']} bytes, not {listed[name]['bytes']}")
        elif facts["sha256"] != listed[name]["sha256"]:
            problems.append(f"{name} has another SHA-256")
    return manifest, problems
