"""A dataclass as a command line: its defaults, then --config files, then flags. The comment behind a field is its help.

config.py holds the options. Standard library only: --help must not wait for torch. Imported before torch by every
script, so what the environment must hold by then is set here, and Ctrl-C during imports is handled here.
"""

import argparse
import ast
import dataclasses
import errno
import inspect
import math
import multiprocessing
import os
import re
import runpy
import signal
import sys
import types
import typing
from pathlib import Path

from model import UserError, nearest, nearest_path

# libgomp, which torch computes with on a CPU, reads this when torch is imported: so long (loop turns) a thread that
# waits for the others keeps its core busy. Its own default is some milliseconds, in which the thread that it waits for
# cannot run where other programs want the cores too: steps took 7 to 8 times as long beside two of them.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

# Options that were there once. What to say to whoever still uses them; docs/migrating.md lists them.
CONVERT = "adapters of both key styles are read here; for use elsewhere: python lora.py merge ADAPTER OUT"
DOWNLOAD = "download the files first, and name them in the records"
REMOVED = {
    "sequence_parallel": "use data parallelism; for a long video on a small card --gradient_checkpointing True",
    "partition_weights": "the frozen base stands whole on each card: 32B in bf16 needs an 80 GB card",
    "offload_weights": "the frozen base stands whole on the card: 32B in bf16 needs an 80 GB card",
    "rollout_rows": "each rank samples the groups of its own prompts, as many at a time as memory holds",
    "dry_run_gib": "--dry_run True prints the memory that a run needs; compare it with the card's",
    "keys": CONVERT,
    "allow_outside_files": "any regular file that a record names is read",
    "allow_remote_files": DOWNLOAD,
    "remote_folder": DOWNLOAD,
    "remote_max_mb": DOWNLOAD,
    "remote_seconds": DOWNLOAD,
}


# -- Checks of values, for the dataclasses' check()


def require(ok, name, value, expected):
    if not ok:
        raise UserError(f"--{name}: found {value!r}, expected {expected}")


def at_least(cfg, low, *names):
    for name in names:
        value = getattr(cfg, name)
        require(value is None or value >= low, name, value, f"at least {low}")


def within(cfg, low, high, *names):
    """Closed interval [low, high]."""
    for name in names:
        value = getattr(cfg, name)
        require(value is None or low <= value <= high, name, value, f"a number from {low} to {high}")


def positive(cfg, *names):
    for name in names:
        value = getattr(cfg, name)
        require(value is None or value > 0, name, value, "a number above 0")


def one_of(cfg, name, *choices):
    value = getattr(cfg, name)
    require(value in choices, name, value, "one of " + ", ".join(filter(None, choices)) + nearest(value, choices))


def names_of(cfg, name, *choices):
    """A list of names, separated by commas; none or "" is the empty one."""
    wrong = [word for word in split_list(getattr(cfg, name) or "") if word not in choices]
    expected = "none, or names out of " + ", ".join(choices) + (nearest(wrong[0], choices) if wrong else "")
    require(not wrong, name, getattr(cfg, name), expected)


# -- Values


def split_list(text):
    """'a,b', "['a', 'b']" or '[a,b]' -> ['a', 'b']; '' -> []."""
    parts = (part.strip(" '\"") for part in text.strip().strip("[]()").split(","))
    return [part for part in parts if part]


def type_name(kind):
    if kind is bool:
        return "True or False"
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("None", "none")


def reader(kind):
    """A function from a flag's text to a value of the field's type; it raises argparse's error with both."""

    def convert(text, kind):
        if isinstance(kind, types.UnionType):
            return None if text.lower() == "none" else convert(text, typing.get_args(kind)[0])
        if typing.get_origin(kind) is list:
            return [convert(part, typing.get_args(kind)[0]) for part in split_list(text)]
        if kind is bool:
            return BOOLS[text.lower()]
        if kind is float and not math.isfinite(float(text)):
            raise ValueError(text)
        return kind(text)

    def read(text):
        try:
            return convert(text, kind)
        except (ValueError, KeyError):
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {type_name(kind)}") from None

    return read


def fits(value, kind):
    """Whether a value from a config file has the type `kind`; an int is a float too, a bool is no int."""
    if isinstance(kind, types.UnionType):
        return value is None or fits(value, typing.get_args(kind)[0])
    if typing.get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# -- Config files


def read_config(cls, path):
    """The settings of a config file as {name: value}.

    The file is Python: plain assignments (a diff against the defaults; names with a leading _ are its own), or a copy
    of config.py whose class of the same name has other defaults. UserError for unknown names and wrong types.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config: no file {str(path)!r}, expected a .py file of assignments{nearest_path(path)}")
    if path.resolve() == Path(inspect.getfile(cls)).resolve():
        return {}
    if path.suffix != ".py":
        expected = "a .py file of assignments, such as learning_rate = 1e-4"
        raise UserError(f"--config: {path} is a {path.suffix or 'nameless'} file, expected {expected}")
    refuse_annotations(path)
    try:
        space = runpy.run_path(str(path))
    except (NameError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError, LookupError) as error:
        raise UserError(f"--config {path}: the file does not run: {error!r}; expected plain assignments") from error
    if dataclasses.is_dataclass(space.get(cls.__name__)):
        mine, theirs = as_dict(cls()), dataclasses.asdict(space[cls.__name__]())
        settings = {name: value for name, value in theirs.items() if name not in mine or mine[name] != value}
    else:
        skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
        settings = {name: value for name, value in space.items() if name[0] != "_" and not isinstance(value, skip)}
        if not settings:
            raise UserError(f"--config: {path} sets nothing, expected assignments such as learning_rate = 1e-4")
    return {field_name(cls, name, f"{path}: "): from_file(cls, name, value, path) for name, value in settings.items()}


def refuse_annotations(path):
    """UserError for `learning_rate: float` in a config file: a type without a value sets nothing."""
    try:
        lines = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:  # UnicodeDecodeError among them
        raise UserError(f"--config {path}: is not Python ({error}); expected plain assignments") from None
    for line in lines:
        if isinstance(line, ast.AnnAssign) and line.value is None:
            name = ast.unparse(line.target)
            where = f"--config {path}: line {line.lineno}: {name} has a type and no value"
            raise UserError(f"{where}; expected an assignment such as {name} = 1")


def from_file(cls, name, value, path):
    """A value from a file, checked against the field's type."""
    kind = {f.name: f.type for f in dataclasses.fields(cls)}[field_name(cls, name, f"{path}: ")]
    if not fits(value, kind):
        raise UserError(f"{path}: {name}: found {value!r}, expected {type_name(kind)}")
    return list(value) if isinstance(value, tuple) else value


def field_name(cls, name, origin):
    """The field that `name` means in cls, through aliases; UserError with the nearest names otherwise."""
    plain = name.replace("-", "_")
    plain = getattr(cls, "aliases", {}).get(plain, plain)
    names = [f.name for f in dataclasses.fields(cls)]
    if plain in names:
        return plain
    if plain in REMOVED:
        raise UserError(f"{origin}{name}: was removed; {REMOVED[plain]}")
    names += getattr(cls, "aliases", {})
    hint = abbreviated(plain, names) or nearest(plain, names) or "; --help lists them"
    raise UserError(f"{origin}{name}: no such option of {Path(sys.argv[0]).name}{hint}")


def abbreviated(word, names):
    """"; did you mean X or Y?" with the names whose initials are `word`, or that go on behind it; "" of too many."""
    initials = lambda name: "".join(part[0] for part in name.split("_"))
    meant = sorted(name for name in names if initials(name) == word or name.startswith(f"{word}_"))
    if not 0 < len(meant) < 4:
        return ""
    return f"; did you mean {', '.join(meant[:-1])}{' or ' * (len(meant) > 1)}{meant[-1]}?"


# -- The command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        message = re.sub(r"^argument (--\w+)(?:/--\w+)*", r"\1", message)
        raise UserError(message.replace("expected one argument", "found no value, expected one"))


def documented(cls):
    """[(heading, [(field, comment)])] of a dataclass and its bases, from their source; fields keep their group."""
    groups, comments = {}, {}
    for klass in cls.__mro__[:-1]:
        heading = ""
        for line in inspect.getsource(klass).splitlines():
            if line.startswith("    def "):
                break
            if line.startswith("    # -- "):
                heading = line[9:]
            elif match := re.match(r"    (\w+): .*?  # (.*)", line):
                name, comment = match.groups()
                comments.setdefault(name, comment)  # the class asked for speaks first
                owner = [k for k in cls.__mro__ if name in getattr(k, "__annotations__", {})][-1]
                if owner is klass:
                    groups.setdefault(heading, []).append(name)
    return [(heading, [(name, comments[name]) for name in names]) for heading, names in groups.items()]


def build_parser(cls):
    fields, aliases = {f.name: f for f in dataclasses.fields(cls)}, getattr(cls, "aliases", {})
    positional = " ".join(f"[{name}{' ...' * (typing.get_origin(f.type) is list)}]" for name, f in fields.items()
                          if f.metadata.get("positional"))  # fmt: skip
    usage = f"python {Path(sys.argv[0]).name} {positional} [--config FILE.py] [--name value or --name=value]"
    settings = {"allow_abbrev": False, "add_help": False, "argument_default": argparse.SUPPRESS}
    parser = Parser(usage=usage.replace("  ", " "), **settings)
    parser.add_argument("--config", action="append", metavar="FILE.py", help="assignments; several in their order")
    parser.add_argument("--help", action="store_true", help="show this and exit")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher inserts it
    default = cls()
    for heading, names in documented(cls):
        group = parser.add_argument_group(heading)
        for name, comment in names:
            text = f"{comment} (default {getattr(default, name)!r})".replace("%", "%%")
            flags = [f"--{name}", *(f"--{alias}" for alias, target in aliases.items() if target == name)]
            kind = fields[name].type
            group.add_argument(*flags, dest=name, type=reader(kind), help=text, metavar=type_name(kind))
    return parser


def normalised(cls, argv):
    """Flags with underscores, and a bare --cot as --cot=true."""
    kinds, out = {f.name: f.type for f in dataclasses.fields(cls)}, []
    for i, arg in enumerate(argv):
        if arg.strip() in ("", "\\", "#"):
            raise UserError(
                f"found an argument {arg!r}: a backslash continues a shell line only as its very last character; "
                "remove the blanks or the comment behind it, the lines below it were not read"
            )
        if arg == "-h":
            arg = "--help"
        if arg.startswith("--"):
            name, equals, value = arg[2:].partition("=")
            name = name.replace("-", "_")
            kind = kinds.get(getattr(cls, "aliases", {}).get(name, name))
            words = {*BOOLS, *(["none"] if kind == bool | None else [])}
            following = argv[i + 1].lower() if i + 1 < len(argv) else ""
            if kind in (bool, bool | None) and not equals and following not in words:
                equals, value = "=", "true"
            arg = f"--{name}{equals}{value}"
        out.append(arg)
    return out


def read_flags(cls, argv):
    """Command line -> (settings {name: value}, config files [path]). UserError for what it does not know."""
    parser = build_parser(cls)
    argv = normalised(cls, argv)
    if "--help" in argv:
        print(parser.format_help())
        raise SystemExit(0)
    known, rest = parser.parse_known_args(argv)
    settings = vars(known)
    for arg in rest:
        if arg.startswith("--"):
            name = arg[2:].partition("=")[0]
            field_name(cls, name, "--")
    positional = [f for f in dataclasses.fields(cls) if f.metadata.get("positional")]
    for f in positional:
        if rest and typing.get_origin(f.type) is list:  # the last one takes all that follow
            settings[f.name], rest = rest, []
        elif rest:
            settings[f.name] = rest.pop(0)
    if rest:
        raise UserError(f"found {rest[0]!r} without a flag; expected --name value or --name=value (--help lists them)")
    files = settings.pop("config", [])
    settings.pop("local_rank", None)
    return settings, files


def parse(cls, argv=None):
    """Defaults of the dataclass cls, then each --config file in order, then the flags of argv (default sys.argv[1:]).

    Returns an instance whose `given` is the set of names that were set. A layer's setting beats a conflicting one of
    the layers below it (`settle`). UserError for unknown names, wrong types and values that check() refuses. --help
    prints all options and exits.
    """
    flags, files = read_flags(cls, sys.argv[1:] if argv is None else list(argv))
    cfg = cls()
    cfg.given = frozenset()
    for settings in [*(read_config(cls, path) for path in files), flags]:
        for name, value in settings.items():
            setattr(cfg, name, value)
        cfg.given |= set(settings)
        if hasattr(cfg, "settle"):
            cfg.settle(settings)
    cfg.check()
    return cfg


def as_dict(cfg):
    """All fields, as JSON can hold them."""
    return dataclasses.asdict(cfg)


def changed(cfg):
    """The fields that differ from their defaults, for the lines printed at the start."""
    default = as_dict(type(cfg)())
    return {name: value for name, value in as_dict(cfg).items() if value != default[name]}


# -- A script's main()

# What a disk or a standard output can do to any script at any time: no mistake of ours
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE}


def cli(main, each_rank=True):
    """Run a script's main(); a user's mistake becomes one line and exit code 2, Ctrl-C one line and 130.

    each_rank: whether every process that a launcher starts prints its own; what all ranks of a machine report alike
    only the first one prints.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        interrupted()
    except UserError as error:
        if not each_rank and os.environ.get("LOCAL_RANK", "0") != "0":
            raise SystemExit(2) from None
        fail(str(error))
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            raise
        print("another rank of this run has ended; see what it printed", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:  # `--help | head`
        silence(sys.stdout)
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        if error.filename is None:  # so it may be this one
            silence(sys.stdout)
        what = error.filename or "standard output, or a file"
        fail(f"{what}: {error.strerror}; make room or choose another place, then run again")
    finally:
        watch_imports()


def watch_imports():
    """From now on Ctrl-C ends the process in one line: while modules are imported there is nothing to clean up, and an
    exception could end in a traceback, or in one of a library's own handlers."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def interrupted(*_):
    if os.environ.get("LOCAL_RANK", "0") == "0" and multiprocessing.parent_process() is None:
        os.write(2, b"\nstopped by Ctrl-C\n")
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, RuntimeError):  # a closed pipe; or the signal came in the middle of a write
            pass
    os._exit(130)


def fail(text):
    """One line on stderr, exit code 2; the code also where stderr goes to a disk that is full."""
    try:
        print(f"error: {text}", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)
    raise SystemExit(2) from None


def silence(stream):
    """Python flushes its streams at its end, and would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
if _script.parent == Path(__file__).resolve().parent:
    watch_imports()  # a script of this repository, which imports this first
