"""From dataclasses of flags to a command line, and from its words to their values.

With the standard library alone, so that --help and a wrong flag answer at once: transformers' HfArgumentParser, whose ways this
keeps, takes half a second to import.
"""

import argparse
import dataclasses
import re
import types
import typing
from pathlib import Path

from zerotune.errors import UserError, nearest


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def truth(word):
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{word!r} is none of true, false")


def truth_or_word(word):
    try:
        return truth(word)
    except argparse.ArgumentTypeError:
        return word  # its flag's range says which words there are


def number_or(kind, words):
    """Return a function from a word of the command line to a number, or to the word if it is one of `words`."""

    def convert(word):
        try:
            return word if word in words else kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{word!r} is no {kind.__name__} and none of {', '.join(words)}") from None

    return convert


def add_flags(parser, group):
    """Add a dataclass's flags to the parser: a word each, several for a list, none or true/false (and --no_...) for a bool."""
    box = parser.add_argument_group(group.title)
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        kind, choices = hints[field.name], None
        convert = None
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:  # X | None, or a number | words
            kind, *others = [part for part in typing.get_args(kind) if part is not types.NoneType]
            if others:
                convert = truth_or_word if kind is bool else number_or(kind, typing.get_args(others[0]))
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        help = field.metadata["help"].replace("%", "%%") + ("" if default in (None, []) else f" (default: {default})")
        if kind is bool:
            metavar = field.metadata["unit"] or "BOOL"
            box.add_argument(
                f"--{field.name}", type=convert or truth, nargs="?", const=True, default=default, metavar=metavar, help=help
            )
            if default:
                box.add_argument(f"--no_{field.name}", dest=field.name, action="store_false", default=default, help="The contrary.")
            continue
        several = typing.get_origin(kind) is list
        if several:
            (kind,) = typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal:
            kind, choices = str, typing.get_args(kind)
        unit = field.metadata["unit"] or {int: "N", float: "X", str: "TEXT"}[kind]
        shown = None if choices else unit.upper()
        nargs = "+" if several else None
        box.add_argument(
            f"--{field.name}", type=convert or kind, nargs=nargs, choices=choices, default=default, metavar=shown, help=help
        )


def config_words(path, known):
    """Return the flags of a YAML file as command-line words; raise UserError for keys that are no flags."""
    import yaml

    try:
        # BaseLoader keeps every scalar as it is written: 'no' stays the word no, 1e-4 stays a number for argparse to read.
        content = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must hold one 'flag: value' a line")
    unknown = [f"--config {path}: {key!r} is no flag of train.py{nearest(key, known)}" for key in content if key not in known]
    if unknown:
        raise UserError(*unknown)
    words = []
    for key, value in content.items():
        if isinstance(value, list):
            words += [f"--{key}", *value] if value else []
        else:
            words.append(f"--{key}={value}")
    return words


USAGE = "train.py --model_name_or_path DIR --train_file FILE --output_dir DIR [--flag VALUE ...]"


def parse(groups, words, usage=USAGE, description="Fine-tune a Hugging Face model."):
    """Return {flag: value} of a command line; raise UserError for words that are no flags or no values of theirs."""
    parser = Parser(prog=usage.partition(" --")[0], usage=usage, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="Flags from a YAML file; the command line wins.")
    for group in groups:
        add_flags(parser, group)
    # --learning-rate is --learning_rate
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
    known = [action.dest for action in parser._actions if action.dest != "help"]
    config = parser.parse_known_args([word for word in words if word not in ("-h", "--help")])[0].config
    values, rest = parser.parse_known_args((config_words(config, set(known) - {"config"}) if config else []) + words)
    if rest:
        names = [word.split("=")[0] for word in rest if word.startswith("--")] or rest
        raise UserError(*(f"{name}: no flag of train.py{nearest(name, [f'--{k}' for k in known])}" for name in names))
    del values.config
    return vars(values)
