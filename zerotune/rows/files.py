"""Read a data file row by row with its line numbers, so that a bad row can be named; nothing is guessed about types.

The readers of `datasets` stop at the first broken row without its line, and turn a CSV's text "None" or "1" into something else.
"""

import contextlib
import csv
import io
import json
from pathlib import Path

from zerotune.errors import UserError

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def kind_of(path):
    """Return the ending that says how a file is read; that of its compression is left out."""
    path = Path(path)
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextlib.contextmanager
def opened(path):
    """Open a file, compressed or not, to read bytes."""
    import pyarrow as pa  # not for the ending of a file's name, which is asked for before the libraries are there

    compression = COMPRESSED.get(Path(path).suffix)
    try:
        with open(path, "rb") if compression is None else pa.input_stream(str(path), compression=compression) as file:
            yield file if compression is None else io.BufferedReader(file, 2**20)
    except (OSError, EOFError, pa.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())[:200]}") from None


def read_rows(path):
    """Yield (line, record, error) for each row of a file: record is a dict, error says why there is none."""
    suffix = kind_of(path)
    if suffix == ".txt":
        return ((line, {"text": text}, "") for line, text in text_lines(path) if text.strip())
    if suffix in (".csv", ".tsv"):
        return csv_rows(path, "," if suffix == ".csv" else "\t")
    return json_rows(path)


def text_lines(path):
    """Yield (line number, text without its line break); bytes that are not UTF-8 raise UserError."""
    with opened(path) as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def csv_rows(path, delimiter):
    """Yield (line, record, error) of a delimited file with a header; the line is the one on which the row begins."""
    csv.field_size_limit(2**31 - 1)
    with opened(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
        begin = 1
        try:
            header, begin = next(reader, []), 2
            for fields in reader:
                if fields and len(fields) != len(header):
                    yield begin, {}, f"{len(fields)} fields, but the header has {len(header)}"
                elif fields:
                    yield begin, dict(zip(header, fields, strict=True)), ""
                begin = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{begin}: the rest of the file cannot be read: {error}") from None


def json_rows(path):
    """Yield (line, record, error) of JSON Lines, or of a file that is one JSON array of objects."""
    lines = text_lines(path)
    first = next(((number, text) for number, text in lines if text.strip()), None)
    if first and first[1].lstrip().startswith("["):
        yield from json_array(path)
        return
    if first:
        yield json_line(*first)
    for number, text in lines:
        if text.strip():
            yield json_line(number, text)


def json_line(number, text):
    try:
        record = json.loads(text)
    except ValueError as error:
        return number, {}, f"broken JSON: {error}"
    return (number, record, "") if isinstance(record, dict) else (number, {}, f"a JSON {type(record).__name__}, not an object")


def json_array(path):
    with opened(path) as file:
        text = file.read().decode("utf-8-sig")
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            record, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise UserError(f"{path}:{line}: broken JSON, the rest of the file cannot be read: {error}") from None
        yield (line, record, "") if isinstance(record, dict) else (line, {}, f"a JSON {type(record).__name__}, not an object")
