"""Settings of a program: typed defaults declared once, then config files, then the command line.

    @dataclass
    class Settings:
        # data
        batch_size: int = 8  # sequences per process and micro-step

    settings = configure(Settings, "Trains a model.")

    python train.py config/small.py --batch_size=4 --compile

A config file is Python that assigns settings by name (`batch_size = 4`). It runs in a namespace of its own; its names
that begin with an underscore, modules, functions and classes are ignored. Later files and arguments override earlier
ones; arguments for a list of texts, such as --input, add up. A program may accept lists of values too:
`--batch_size=4,8`. `--help` prints the declaration: each setting with its type, default, limits and the comment at the
end of its line, which must be one line, under the headings that are comments of their own. Methods come after all
settings.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import runpy
import sys
import textwrap
import time
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

# Types of settings with their least and greatest value. model.py, which needs nothing but torch, has its own: there
# NATURAL ends at 2**31 - 1.
COUNT = Annotated[int, (1, 2**31 - 1)]
NATURAL = Annotated[int, (0, 2**63 - 1)]
POSITIVE = Annotated[float, (1e-300, 1e300)]
NOT_NEGATIVE = Annotated[float, (0, 1e300)]
SHARE = Annotated[float, (0, 1)]

SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


class UserError(Exception):
    """A mistake of the user's or a fault from outside, described in one line; a program that meets it exits with 2."""


def run(main):
    """Runs a program's main(). A UserError, or an OSError or lack of memory that no function has turned into one, ends
    it with one line on standard error and exit code 2, Ctrl-C with one line and 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        main()
        return
    except UserError as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = f"{error.filename or 'writing'}: {error.strerror or error}", 2
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("(allocate|out of) memory", str(error)):
            raise
        message, code = f"not enough memory: {error}", 2
    except KeyboardInterrupt:
        message, code = "interrupted; what was saved before is untouched", 130
    sys.stderr.write("error: " + " ".join(message.splitlines()) + "\n")  # at once: no other process writes into it
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------
# Reading settings


def configure(declaration, description, argv=None, positional=None):
    """An instance of the dataclass `declaration`, from its defaults, config files and `argv` (the command line)."""
    return build_settings(declaration, read_settings(declaration, description, argv, positional))


def read_settings(declaration, description, argv=None, positional=None, may_be_lists=()):
    """The settings that config files and `argv` (the command line) give: a dict by name, without those not given.

    Fields of the dataclass `declaration` may be int, float, str, bool, list[str], or one of them `| None`; a value of
    another type, such as a dict, comes from a config file alone. Annotated[int, (least, greatest)], Annotated[str, ...]
    (a table whose keys, or a tuple whose elements, are the choices) and Literal["a", "b"] limit the values.

    `positional` names a list field that takes the arguments that are neither settings nor config files. The settings in
    `may_be_lists` may also be a list of values: with commas between them on the command line, a Python list in a config
    file. The dict has the order in which the settings were given last. UserError for an unknown setting, a value of
    another type, or a config file that fails; `--help` prints and exits.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if "--help" in args or "-h" in args:
        print(help_text(declaration, description, positional))
        sys.exit(0)
    values, lists = {}, {}  # lists: the values of list[str] so far, to which arguments add until a file gives others
    while args:
        arg = args.pop(0)
        if positional and not arg.startswith("--") and not arg.endswith(".py"):
            arg = f"--{positional}={arg}"
        if arg.startswith("--"):
            name, has_value, text = arg[2:].partition("=")
            kinds, _ = kind_of(declaration, name, "setting --")
            texts = [text] if has_value else take_values(args, kinds)
            if not texts:
                raise UserError(f"--{name} expects {kind_name(kinds)}, got nothing")
            if list[str] in kinds:
                lists[name] = lists.get(name, []) + texts
                given = {name: lists[name]}
            elif name in may_be_lists and "," in texts[0]:
                parts = [part.strip() for part in texts[0].split(",")]
                if "" in parts:
                    raise UserError(f"--{name} is a list with an empty element: {texts[0]!r}")
                given = {name: [parse(declaration, name, part) for part in parts]}
            else:
                given = {name: parse(declaration, name, texts[0])}
        elif arg.endswith(".py"):
            given = read_config_file(declaration, arg, may_be_lists)
            lists = {name: texts for name, texts in lists.items() if name not in given}
        else:
            raise UserError(f"unexpected argument {arg!r}; settings are --name=value, config files end in .py")
        values = {name: value for name, value in values.items() if name not in given} | given  # what is given goes last
    return values


def take_values(args, kinds):
    """Removes from the front of `args` the values of a setting that has no "=": several for a list, one for others. A
    switch may stand alone, which means true, also before an argument that is not its value."""
    if bool in kinds and not (args and args[0].lower() in SWITCH):
        return ["true"]
    texts = []
    while args and not args[0].startswith("--") and (list[str] in kinds or not texts):
        texts.append(args.pop(0))
    return texts


def parse(declaration, name, text):
    """`text` as a value of the setting `name`. UserError if there is no such setting, or if it has another type."""
    kinds, _ = kind_of(declaration, name, "setting --")
    if str in kinds:  # "none" too is a text
        return text
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in SWITCH:
        return SWITCH[text.lower()]
    try:
        if int in kinds:
            is_exponential = "e" in text.lower() and float(text).is_integer()  # 5e9
            return int(float(text)) if is_exponential else int(text)
        if float in kinds and not math.isnan(float(text)):
            return float(text)
    except ValueError:
        pass
    raise UserError(f"--{name} expects {kind_name(kinds)}, got {text!r}")


def read_config_file(declaration, path, may_be_lists=()):
    """The settings that the Python file `path` assigns; UserError for one that is unknown or of another type."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from None
    values = {}
    for name, value in names.items():
        is_helper = isinstance(value, types.ModuleType) or callable(value)
        if name.startswith("_") or (is_helper and name not in declaration.__dataclass_fields__):
            continue
        kinds, _ = kind_of(declaration, name, f"setting in {path}: ")
        is_list = name in may_be_lists and isinstance(value, list)
        if is_list and not value:
            raise UserError(f"config file {path}: {name} is an empty list")
        if not all(fits(one, kinds) for one in (value if is_list else [value])):
            raise UserError(f"config file {path}: {name} expects {kind_name(kinds)}, got {value!r}")
        values[name] = value
    return values


def build_settings(declaration, values):
    """The dataclass `declaration` of `values`, a dict by name. UserError for a value of another type or beyond its
    limits, and for a ValueError of the dataclass itself."""
    for name, value in values.items():
        kinds, limits = kind_of(declaration, name)
        if not fits(value, kinds):
            raise UserError(f"{name} expects {kind_name(kinds)}, got {value!r}")
        if limits is None or value is None:
            continue
        if isinstance(limits[0], str):
            if value not in limits:
                raise UserError(f"unknown {name} {value!r}; known: {', '.join(limits)}")
        elif not limits[0] <= value <= limits[1]:
            raise UserError(f"{name} is {value}; it must be at least {limits[0]} and at most {limits[1]}")
    try:
        return declaration(**values)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------------------------------------------------------------
# Declared types


hints_of = functools.cache(typing.get_type_hints)


def kind_of(declaration, name, what="setting "):
    """The plain types that the setting `name` may have, and its limits: (least, greatest), the choices, or None.

    COUNT | None: (int, NoneType), (1, 2147483647).  Literal["a", "b"]: (str,), ("a", "b"). UserError with the nearest
    names if there is no such setting.
    """
    hints = hints_of(declaration, include_extras=True)
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists them"
        raise UserError(f"unknown {what}{name}{hint}")
    limits = None
    for part in (hints[name], *typing.get_args(hints[name])):  # of `X | None`, X
        if typing.get_origin(part) is Annotated:
            limits = tuple(part.__metadata__[0])
        elif typing.get_origin(part) is Literal:
            limits = typing.get_args(part)
    plain = hints_of(declaration)[name]  # without the limits
    kinds = typing.get_args(plain) if typing.get_origin(plain) in (typing.Union, types.UnionType) else (plain,)
    return tuple(str if typing.get_origin(kind) is Literal else kind for kind in kinds), limits


def fits(value, kinds):
    """Whether a value is of the declared types. An int under 2**53 is a float too; a text with a zero byte cannot name
    a file."""
    if isinstance(value, list) and list[str] in kinds:
        return all(fits(text, [str]) for text in value)
    if type(value) is int and float in kinds:
        return abs(value) < 2**53
    return type(value) in kinds and not (type(value) is str and "\0" in value)


def kind_name(kinds):
    """Declared types for a reader. On the command line a str cannot be none: "none" could be its text."""
    if str in kinds:
        return "str"
    names = {type(None): "none", list[str]: "one or more str"}
    return " or ".join(names.get(kind) or kind.__name__ for kind in kinds)


def help_text(declaration, description, positional=None):
    """The declaration for a reader: every setting under its heading, with its type, default, limits and comment."""
    classes = [c for c in reversed(declaration.__mro__) if dataclasses.is_dataclass(c)]
    source = "".join(inspect.getsource(c).partition("    def ")[0] for c in classes)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)", source, re.MULTILINE))
    headings = {name: text for text, name in re.findall(r"^    # (.*)\n    (\w+):", source, re.MULTILINE)}
    program, paths = Path(sys.argv[0]).name, " [PATH ...]" if positional else ""
    lines = [description, "", f"usage: python {program} [config.py ...] [--name=value ...]{paths}"]
    for field in dataclasses.fields(declaration):
        kinds, limits = kind_of(declaration, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in headings:
            lines += ["", headings[field.name]]
        accepted = ""
        if limits and isinstance(limits[0], str):
            accepted = f"; {', '.join(limits)}"
        elif limits:
            accepted = f"; at least {limits[0]}" + f" and at most {limits[1]}" * (limits[1] < 2**31 - 1)
        text = f"  --{field.name} ({kind_name(kinds)}, {default}{accepted})  {comments.get(field.name, '')}"
        lines += textwrap.wrap(text, 110, subsequent_indent=" " * 8)
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# What the programs share about files and waiting


def save_whole(path, write):
    """Writes a file whole or not at all: `write(file)` fills a binary file beside `path`, which then takes its name.

    UserError with the system's reason if that fails; what was at `path` is then untouched.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        cause = error
        while cause.__context__ and not isinstance(cause, OSError):  # torch.save hides what the disk said
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise UserError(f"cannot save {path}: {reason}; what was saved before is untouched") from None


def read_log(path):
    """The objects of a run's log.jsonl as dicts, [] without the file; a last line that was cut off is left out.

    UserError for a line that is not a JSON object with a whole number `step`.
    """
    path = Path(path)
    text = path.read_text(errors="replace") if path.exists() else ""
    records = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            record = json.loads(line)
            if type(record["step"]) is not int:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            fault = "is not a JSON object with a step; mend the line or move the file away"
            raise UserError(f"{path}:{number} {fault}") from None
        records.append(record)
    return records


def progress(items, label):
    """The items; on standard error, how many are done and how long the rest takes."""
    start, is_terminal = time.monotonic(), sys.stderr.isatty()
    for i, item in enumerate(items, 1):
        yield item
        seconds = time.monotonic() - start
        if i == len(items):
            print(f"{label}: {seconds:.1f} s" + " " * 30, file=sys.stderr, flush=True)
        elif is_terminal or i == 1:
            text = f"{label}: {i} of {len(items)}, {seconds * (len(items) - i) / i:.0f} s left"
            print(text, file=sys.stderr, flush=True, end="   \r" if is_terminal else "\n")
