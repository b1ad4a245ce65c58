"""Settings of a program: typed defaults declared once, then config files, then the command line.

    @dataclass
    class Settings:
        # data
        batch_size: int = 8  # sequences per process and micro-step

    settings = configure(Settings, "Trains a model.")

    python train.py config/small.py --batch_size=4 --compile

A config file is Python that assigns settings by name (`batch_size = 4`); it runs in a namespace of its own, and names
that begin with an underscore, imported modules and functions are its own affair. Later files and arguments override
earlier ones. `--help` prints the declaration: each setting with its type, default and comment.
"""

import dataclasses
import difflib
import inspect
import io
import json
import math
import os
import re
import runpy
import sys
import textwrap
import time
import tokenize
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

# Types of settings with their least and greatest value.
COUNT = Annotated[int, (1, 2**31 - 1)]
NATURAL = Annotated[int, (0, 2**63 - 1)]
POSITIVE = Annotated[float, (1e-300, 1e300)]
NOT_NEGATIVE = Annotated[float, (0, 1e300)]
SHARE = Annotated[float, (0, 1)]

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class UserError(Exception):
    """A mistake of the user's or a fault from outside, described in one line; a program that meets it exits with 2."""


def run(main, *args):
    """Runs a program's main(*args); a UserError, or an OSError or lack of memory that nothing below explained, ends it
    with one line on standard error and exit code 2, Ctrl-C with one line and 130."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character is no reason to stop
    try:
        main(*args)
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
    else:
        return
    print("error: " + " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)


def configure(declaration, description, argv=None, positional=None):
    """An instance of the dataclass `declaration`, from its defaults, config files and `argv` (the command line)."""
    return build_settings(declaration, read_settings(declaration, description, argv, positional))


def read_settings(declaration, description, argv=None, positional=None):
    """The settings that config files and `argv` (the command line) give, a dict by name; what is not given is not in it.

    Fields of the dataclass `declaration` may be int, float, str, bool, list[str], or one of them `| None`;
    Annotated[int, (least, greatest)] and Annotated[str, {...}] (a table whose keys are the choices) or
    Literal["a", "b"] limit the values. `positional` names a list field that takes the arguments that are neither
    settings nor config files. UserError for an unknown setting, a value of another type, or a config file that fails;
    `--help` prints and exits.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(help_text(declaration, description, positional))
        sys.exit(0)
    hints = typing.get_type_hints(declaration, include_extras=True)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(declaration)}
    values, seen = {}, set()
    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            if arg.endswith(".py"):
                values.update(read_config_file(arg, kinds))
            elif positional:
                values.setdefault(positional, []).append(arg)
            else:
                raise UserError(f"unexpected argument {arg!r}; settings are --name=value, config files end in .py")
            continue
        name, has_value, text = arg[2:].partition("=")
        kind = kind_of(name, kinds, "setting --")
        if is_list(kind):
            texts = [text] if has_value else []
            while not has_value and args and not args[0].startswith("--"):
                texts.append(args.pop(0))
            if not texts:
                raise UserError(f"--{name} expects {kind_name(kind)}, got nothing")
            values[name] = (values[name] if name in seen else []) + texts
        else:
            if not has_value and bool in options(kind):
                text = args.pop(0) if args and args[0].lower() in TRUE + FALSE else "true"
            elif not has_value:
                if not args or args[0].startswith("--"):
                    raise UserError(f"--{name} expects {kind_name(kind)}, got nothing")
                text = args.pop(0)
            values[name] = parse(name, text, kind)
        seen.add(name)
    return values


def build_settings(declaration, values):
    """The dataclass `declaration` of `values`, a dict by name. UserError for a value of another type or beyond its
    limits, and for a ValueError of the dataclass itself."""
    kinds = typing.get_type_hints(declaration, include_extras=True)
    for name, value in values.items():
        if name in kinds and not fits(value, kinds[name]):
            raise UserError(f"{name} expects {kind_name(kinds[name])}, got {value!r}")
        if name in kinds and not is_within(value, limits := limits_of(kinds[name])):
            is_choice = isinstance(limits[0], str)
            what = f"unknown {name} {value!r}; known:" if is_choice else f"{name} is {value}; it must be"
            raise UserError(f"{what} {limits_text(limits, value)}")
    try:
        return declaration(**values)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(str(error)) from None


def kind_of(name, kinds, what):
    """The declared type of setting `name`; UserError with the nearest names if there is none."""
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; --help lists them"
        raise UserError(f"unknown {what}{name}{hint}")
    return kinds[name]


def options(kind):
    """The plain types that a declared type allows: the members of a union, without their limits."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(option for member in typing.get_args(kind) for option in options(member))
    if typing.get_origin(kind) is Annotated:
        return options(typing.get_args(kind)[0])
    return (str,) if typing.get_origin(kind) is Literal else (kind,)


def limits_of(kind):
    """(least, greatest) or the names of the choices that a declared type has, None without."""
    for member in (kind, *typing.get_args(kind)):  # of `X | None`, X
        if typing.get_origin(member) is Annotated:
            return tuple(member.__metadata__[0])
        if typing.get_origin(member) is Literal:
            return typing.get_args(member)


def is_within(value, limits):
    """Whether a value keeps to its limits; None, which leaves the choice to the program, does."""
    if value is None or limits is None:
        return True
    return value in limits if isinstance(limits[0], str) else limits[0] <= value <= limits[1]


def limits_text(limits, value=0):
    """The limits for a reader; an upper one that is out of reach is left out, unless `value` is beyond it."""
    if isinstance(limits[0], str):
        return ", ".join(limits)
    least, greatest = limits
    return f"at least {least}" + (f" and at most {greatest}" if greatest < 2**31 - 1 or value > greatest else "")


def fits(value, kind):
    """Whether a value is of the declared type; a text with a zero byte is none, since no file can be named so."""
    if isinstance(value, list) and is_list(kind):
        return all(type(v) is str and "\0" not in v for v in value)
    is_number = type(value) is int and float in options(kind) and abs(value) < 2**53
    return (is_number or type(value) in options(kind)) and not (type(value) is str and "\0" in value)


def is_list(kind):
    return any(typing.get_origin(k) is list for k in options(kind))


def kind_name(kind):
    """A declared type for a reader. On the command line a str cannot be none: its text could be a value."""
    names = {type(None): "none", list[str]: "one or more str"}
    kinds = [k for k in options(kind) if k is not type(None) or str not in options(kind)]
    return " or ".join(names.get(k, getattr(k, "__name__", str(k))) for k in kinds)


def parse(name, text, kind):
    """`text` from the command line as a value of type `kind`; UserError names the type expected."""
    for k in options(kind):
        try:
            if k is type(None) and text.lower() == "none" and str not in options(kind):
                return None
            if k is bool and text.lower() in TRUE + FALSE:
                return text.lower() in TRUE
            if k is int:
                return int(text)
            if k is float and not math.isnan(float(text)):
                return float(text)
            if k is str:
                return text
        except ValueError:
            continue
    raise UserError(f"--{name} expects {kind_name(kind)}, got {text!r}")


def read_config_file(path, kinds):
    """The settings that the Python file `path` assigns; UserError for one that is unknown or of another type."""
    try:
        names = runpy.run_path(path)
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror or error}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"config file {path}: {type(error).__name__}: {error}") from None
    values = {}
    for name, value in names.items():
        if name.startswith("_") or (name not in kinds and (isinstance(value, types.ModuleType) or callable(value))):
            continue
        kind = kind_of(name, kinds, f"setting in {path}: ")
        if not fits(value, kind):
            raise UserError(f"config file {path}: {name} expects {kind_name(kind)}, got {value!r}")
        values[name] = value
    return values


def comments(declaration):
    """{field: its comment} and {field: the heading before it}, from the source of the dataclass and of its bases."""
    texts, headings = {}, {}
    for cls in reversed([c for c in declaration.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(cls))
        fields = [f.name for f in dataclasses.fields(cls)]
        heading = name = None
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.string == "def":  # what follows are not fields
                break
            before = token.line[: token.start[1]]
            if token.type == tokenize.NAME and token.start[1] == 4 and token.string in fields:
                name = token.string
                if heading:
                    headings[name], heading = heading, None
            elif token.type == tokenize.COMMENT and before.strip() and name:
                texts[name] = token.string.lstrip("# ")
            elif token.type == tokenize.COMMENT and token.start[1] == 4:
                heading = token.string.lstrip("# ")
    return texts, headings


def help_text(declaration, description, positional=None):
    """The declaration for a reader: every setting with its type, default and comment."""
    hints, (texts, headings) = typing.get_type_hints(declaration, include_extras=True), comments(declaration)
    program, paths = Path(sys.argv[0]).name, " [PATH ...]" if positional else ""
    lines = [description, "", f"usage: python {program} [config.py ...] [--name=value ...]{paths}"]
    for field in dataclasses.fields(declaration):
        if field.name in headings:
            lines += ["", headings[field.name]]
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        limits = limits_of(hints[field.name])
        accepted = f"; {limits_text(limits)}" if limits else ""
        head = f"  --{field.name} ({kind_name(hints[field.name])}, {default}{accepted})"
        lines += textwrap.wrap(f"{head}  {texts.get(field.name, '')}", 110, subsequent_indent=" " * 8)
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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name survives a loss of power too
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
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
    lines = path.read_text(errors="replace").splitlines(True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
            is_record = type(records[-1]["step"]) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            is_record = False
        if not is_record:
            raise UserError(f"{path}:{number} is not a JSON object with a step; mend the line or move the file away")
    return records


def progress(items, label):
    """The items; on standard error, how many are done and how long the rest takes."""
    start, rewrite = time.monotonic(), sys.stderr.isatty()
    for i, item in enumerate(items, 1):
        yield item
        seconds = time.monotonic() - start
        if i == len(items):
            print(f"{label}: {seconds:.1f} s" + " " * 30, file=sys.stderr, flush=True)
        elif rewrite or i == 1:
            text = f"{label}: {i} of {len(items)}, {seconds * (len(items) - i) / i:.0f} s left"
            print(text, file=sys.stderr, flush=True, end="   \r" if rewrite else "\n")
