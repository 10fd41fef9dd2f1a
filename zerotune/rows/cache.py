"""From a file to tokenised rows on disk, mapped into memory.

A file is read row by row with its line numbers, checked and tokenised once; the result is an Arrow file in the datasets cache, in a
folder named by the SHA-256 of all that went into it (file contents, tokenizer, flags), so that every other process, and the next
run, only maps it. encoding.py says what columns a row has.
"""

import contextlib
import gc
import hashlib
import itertools
import json
import mmap
import multiprocessing
import os
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import pyarrow as pa

from zerotune.errors import UserError
from zerotune.flags import ROWS, names_deciding
from zerotune.rows.chat import Chats
from zerotune.rows.encoding import FORMAT, encode
from zerotune.rows.files import kind_of, read_rows

ROWS_FILE = "rows.arrow"
LAYOUT = 2  # of the files in a folder of cached rows
CHUNK = 1000  # rows that are tokenised in one go
LARGE_FILE = 2**26  # bytes, which take a tenth of a second to hash


def file_sha256(path):
    """Return the SHA-256 of a file's content; a large file's, which takes seconds, is kept while the file is the same.

    The same is: size, inode and times of content and inode as before, and not so young that a change could have left them so.
    """
    stat = os.stat(path)
    state = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]
    note = Path(datasets.config.HF_DATASETS_CACHE) / "zerotune" / f"{name}.sha256"
    if stat.st_size >= LARGE_FILE:
        with contextlib.suppress(OSError, ValueError):
            known, digest = json.loads(note.read_text())
            if known == state:
                return digest
    begin = time.time_ns()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    settled = begin - max(stat.st_mtime_ns, stat.st_ctime_ns) > 2_000_000_000  # the coarsest clock of a file system
    if stat.st_size >= LARGE_FILE and settled:
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(json.dumps([state, digest]))  # of one that is half written nothing is read
    return digest


def tokenizer_identity(tokenizer):
    """Return a text that differs when the tokenizer does, wherever its files are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return vocabulary + repr(tokenizer).replace(repr(tokenizer.name_or_path), "")


def load_hub(args):
    """Return the hub data set's splits, {} if the rows come from files; raise UserError if it cannot be had."""
    if args.dataset_name is None:
        return {}
    try:
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name)
    except Exception as error:  # datasets raises whatever its loaders raise
        raise UserError(f"--dataset_name {args.dataset_name}: {' '.join(str(error).split())[:300]}") from None


def load_file(split, path, args, tokenizer, identity, hub):
    """Return (tokenised rows, the mmap they lie in, their SHA-256 name, whether this process did the work).

    path: of the file; None: it is a hub's split.

    identity: tokenizer_identity, taken before the first use, which changes the tokenizer's state. hub: load_hub's splits. The
    first process to come builds the folder beside its final name and renames it, so that no one reads half of it.
    """
    source = file_sha256(path) if path is not None else hub[split]._fingerprint
    flags = (getattr(args, name) for name in names_deciding(args, ROWS))
    parts = [FORMAT, source, kind_of(path) if path else "", *flags]
    chats = Chats(tokenizer, args) if args.messages_column else None
    parts += [tokenizer.chat_template] * bool(chats)
    all_targets = args.targets == "all" and split == "train"  # evaluations count each row once
    parts += ["all targets"] * all_targets
    digest = hashlib.sha256((json.dumps(parts) + identity).encode()).hexdigest()[:32]
    root = Path(datasets.config.HF_DATASETS_CACHE) / "zerotune"
    folder, built = root / f"{digest}-{LAYOUT}", False
    if not folder.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as scratch:
            done = Path(scratch) / "done"
            done.mkdir()
            records = records_of(path, hub[split] if path is None else None, scratch)
            if write_rows(done / ROWS_FILE, records, args, (tokenizer, args, chats, all_targets)) == 0:
                raise UserError(f"{path or args.dataset_name}: the {split} split has no rows")
            try:
                os.rename(done, folder)
            except OSError:
                if not folder.exists():  # else another node was first, with the same rows
                    raise
        built = True
    try:
        with open(folder / ROWS_FILE, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:  # each file of rows stays open
        raise UserError(f"{path or split}: its tokenised rows cannot be opened: {error.strerror}; raise `ulimit -n`?") from None
    table = pa.ipc.open_stream(pa.py_buffer(mapped)).read_all()
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest), mapped, digest, built


def write_rows(path, records, args, given):
    """Tokenise (line, record, error) tuples into an Arrow file, with several processes if the flags say so; return their number.

    given: the further arguments of encode.
    """
    count, writer = 0, None
    chunks = iter(lambda: list(itertools.islice(records, CHUNK)), [])
    with contextlib.ExitStack() as stack:
        gc.freeze()  # the libraries' objects: looking through them again every few thousand rows costs a tenth of the time
        stack.callback(gc.unfreeze)
        for batch in encoded(chunks, args, given, stack):
            if writer is None:
                writer = stack.enter_context(
                    pa.RecordBatchStreamWriter(stack.enter_context(pa.OSFile(str(path), "wb")), batch.schema)
                )
            writer.write_batch(batch)
            count += batch.num_rows
    return count


def encoded(chunks, args, given, stack):
    """Yield the record batches of chunks of records, in their order; not more than a few chunks are in memory at a time."""
    if args.preprocessing_num_workers == 1:
        for chunk in chunks:
            yield encode(chunk, *given)
        return
    workers, fork = args.preprocessing_num_workers, multiprocessing.get_context("fork")  # the tokenizer goes along unpickled
    pool = stack.enter_context(ProcessPoolExecutor(workers, fork, initializer=give, initargs=given))
    waiting = deque()
    for chunk in chunks:
        waiting.append(pool.submit(encode_given, chunk))
        if len(waiting) > 2 * workers:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


GIVEN = []  # to a worker: the further arguments of encode


def give(*values):
    GIVEN[:] = values


def encode_given(chunk):
    return encode(chunk, *GIVEN)


def records_of(path, hub_split, scratch):
    """Return an iterator of (line, record, error); tables (Parquet, hub) count rows in place of lines."""
    if path is not None and kind_of(path) != ".parquet":
        return read_rows(str(path))
    try:
        table = hub_split if path is None else datasets.Dataset.from_parquet(path, cache_dir=scratch)
    except Exception as error:  # the reader's own errors have no common base
        raise UserError(f"{path}: not a Parquet file: {' '.join(str(error).split())[:200]}") from None
    return table_rows(table)


def table_rows(table):
    for number, record in enumerate(table, 1):
        record = json.loads(json.dumps(record, default=str))  # dates and the like become texts
        yield number, {name: without_nulls(value) for name, value in record.items()}, ""


def without_nulls(value):
    """Return a nested value without the empty entries that a table's rows get for all that any other row has."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
