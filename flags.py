"""How options are read: a dataclass, then config files, then the command line; checked, and told in one line.

config.py holds the options themselves. Standard library only: --help must not wait for torch.
"""

import ast
import dataclasses
import errno
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

# -- Checks of values, for the dataclasses' check()

def require(ok, name, found, expected):
    if not ok:
        raise UserError(f"--{name}: found {found!r}, expected {expected}")


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
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("None", "none")


def _convert(text, kind):
    """A flag's text as `kind`. Raises ValueError when it is none."""
    if isinstance(kind, types.UnionType):
        inner, _ = typing.get_args(kind)
        return None if text.lower() == "none" else _convert(text, inner)
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return [_convert(part, inner) for part in split_list(text)]
    if kind is bool:
        return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
    if kind is float and not math.isfinite(float(text)):
        raise ValueError(text)
    return kind(text)


def _fits(value, kind):
    """Whether a value from a config file has the type `kind`; an int is a float too, a bool is no int."""
    if isinstance(kind, types.UnionType):
        return value is None or _fits(value, typing.get_args(kind)[0])
    if typing.get_origin(kind) is list:
        return isinstance(value, (list, tuple)) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _source(cls):
    return Path(sys.modules[cls.__module__].__file__)


def _kinds(cls):
    return {f.name: f.type for f in dataclasses.fields(cls)}


def _known(cls, name, origin):
    """The field that `name` means in cls, through aliases and dashes; UserError with the nearest names otherwise."""
    plain = name.replace("-", "_")
    plain = getattr(cls, "aliases", {}).get(plain, plain)
    if plain in _kinds(cls):
        return plain
    names = [*_kinds(cls), *getattr(cls, "aliases", {})]
    hint = _abbreviated(plain, names) or nearest(plain, names) or "; --help lists them"
    raise UserError(f"{origin}{name}: no such option of {cls.__name__}{hint}")


def _abbreviated(word, names):
    """"; did you mean X or Y?" with the names whose initials are `word`, or that go on behind it; "" of too many."""
    initials = lambda name: "".join(part[0] for part in name.split("_"))
    found = sorted(name for name in names if initials(name) == word or name.startswith(f"{word}_"))
    if not 0 < len(found) < 4:
        return ""
    return f"; did you mean {', '.join(found[:-1])}{' or ' * (len(found) > 1)}{found[-1]}?"


def read_config_file(cls, path):
    """The settings of a config file as {name: value}.

    The file is Python: plain assignments (a diff against the defaults; names with a leading _ are its own), or a copy
    of config.py whose class of the same name has other defaults. Raises UserError for unknown names and wrong types.
    """
    path = Path(path)
    if not path.is_file():
        found = f"found no file {str(path)!r}, expected a .py file of assignments"
        raise UserError(f"--config: {found}{nearest_path(path)}")
    if path.resolve() == _source(cls).resolve():
        return {}
    if path.suffix != ".py":
        expected = "a .py file of assignments, such as learning_rate = 1e-4"
        raise UserError(f"--config: {path} is a {path.suffix or 'nameless'} file, expected {expected}")
    refuse_annotations(path)
    try:
        space = runpy.run_path(str(path))
    except (SyntaxError, NameError, TypeError, ValueError, AttributeError, ArithmeticError, ImportError) as error:
        raise UserError(f"--config {path}: the file does not run: {error!r}; expected plain assignments") from error
    if dataclasses.is_dataclass(space.get(cls.__name__)):
        mine, theirs = as_dict(cls()), dataclasses.asdict(space[cls.__name__]())
        found = {name: value for name, value in theirs.items() if name not in mine or mine[name] != value}
    else:
        skip = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
        found = {name: value for name, value in space.items() if name[0] != "_" and not isinstance(value, skip)}
        if not found:
            raise UserError(f"--config: {path} sets nothing, expected assignments such as learning_rate = 1e-4")
    return {_known(cls, name, f"{path}: "): from_file(cls, name, value, path) for name, value in found.items()}


def refuse_annotations(path):
    """UserError for `learning_rate: float` in a config file: a type without a value sets nothing."""
    try:
        lines = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:  # UnicodeDecodeError among them
        raise UserError(f"--config {path}: is not Python ({error}); expected plain assignments") from None
    for line in lines:
        if isinstance(line, ast.AnnAssign) and line.value is None:
            name = ast.unparse(line.target)
            told = f"--config {path}: line {line.lineno}: {name} has a type and no value"
            raise UserError(f"{told}; expected an assignment such as {name} = 1")


def from_file(cls, name, value, path):
    kind = _kinds(cls)[_known(cls, name, f"{path}: ")]
    if not _fits(value, kind):
        raise UserError(f"{path}: {name}: found {value!r}, expected {type_name(kind)}")
    return list(value) if isinstance(value, tuple) else value


def read_flags(cls, argv):
    """Command line -> (settings {name: value}, config files [path]). Raises UserError for what it does not know."""
    kinds, settings, files = _kinds(cls), {}, []
    free = [f.name for f in dataclasses.fields(cls) if f.metadata.get("positional")]
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            name = _next_positional(cls, arg, free)
            if typing.get_origin(kinds[name]) is list:  # the last one takes all that follow
                free.insert(0, name)
                arg = [*settings.get(name, []), arg]
            settings[name] = arg
            continue
        name, equals, value = arg[2:].partition("=")
        special = name.replace("-", "_") in ("config", "local_rank")
        kind = str if special else kinds[_known(cls, name, "--")]
        if not equals and kind in (bool, bool | None) and not (rest and _is_bool(rest[0], kind)):
            value = "true"  # bare --cot
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: found no value, expected {type_name(kind)}")
            value = rest.pop(0)
        if not special:
            settings[_known(cls, name, "--")] = _from_flag(name, value, kind)
        elif name == "config":
            files.append(value)
        # else: --local_rank, which the deepspeed launcher inserts and which LOCAL_RANK in the environment says too
    return settings, files


def _next_positional(cls, arg, free):
    if arg.strip() in ("", "\\", "#"):
        raise UserError(
            f"found an argument {arg!r}: a backslash continues a shell line only as its very last character; "
            "remove the blanks or the comment behind it, the lines below it were not read"
        )
    if not free:
        expected = f"{cls.__name__} takes --name value or --name=value (--help lists them)"
        raise UserError(f"found {arg!r} without a flag; {expected}")
    return free.pop(0)


def _is_bool(text, kind):
    words = ("true", "false", "1", "0", "yes", "no")
    return text.lower() in words + (("none",) if kind is not bool else ())


def _from_flag(name, value, kind):
    try:
        return _convert(value, kind)
    except (ValueError, KeyError) as error:
        expected = "True or False" if kind is bool else type_name(kind)
        raise UserError(f"--{name}: found {value!r}, expected {expected}") from error


def _apply(cfg, settings):
    """Set a layer of settings (a file, or the flags). What it says beats a conflicting setting of the layers below."""
    for name, value in settings.items():
        setattr(cfg, name, value)
    cfg.given = cfg.given | set(settings)
    if hasattr(cfg, "settle"):
        cfg.settle(settings)


def parse(cls, argv=None):
    """Defaults of the dataclass cls, then each --config file in order, then the flags of argv (default sys.argv[1:]).

    Returns an instance whose `given` is the set of names that were set. Raises UserError for unknown names (naming the
    nearest), wrong types and values that check() refuses. --help prints all options and exits.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        raise SystemExit(0)
    settings, files = read_flags(cls, argv)
    cfg = cls()
    cfg.given = frozenset()
    for path in files:
        _apply(cfg, read_config_file(cls, path))
    _apply(cfg, settings)
    cfg.check()
    return cfg


def as_dict(cfg):
    """All fields, as JSON can hold them."""
    return dataclasses.asdict(cfg)


def changed(cfg):
    """The fields that differ from their defaults, for the lines printed at the start."""
    default = as_dict(type(cfg)())
    return {name: value for name, value in as_dict(cfg).items() if value != default[name]}


# A field's line in its class: name, type, default, comment.
_FIELD = re.compile(r"    (\w+): .*?  # (.*)")


def _documented(cls):
    """[(heading, [(field, comment)])] of a dataclass and its bases, from their source; fields keep their group."""
    source = _source(cls).read_text(encoding="utf-8").splitlines()
    groups, comments = {}, {}
    for klass in cls.__mro__[:-1]:
        start = next(i for i, line in enumerate(source) if re.match(rf"class {klass.__name__}\b", line))
        heading = ""
        for line in source[start + 1 :]:
            if line.startswith(("    def ", "class ")):
                break
            if line.startswith("    # -- "):
                heading = line[9:]
            elif match := _FIELD.match(line):
                name, comment = match.groups()
                comments.setdefault(name, comment)  # the class asked for speaks first
                owner = [k for k in cls.__mro__ if name in getattr(k, "__annotations__", {})][-1]
                if owner is klass:
                    groups.setdefault(heading, []).append(name)
    return [(heading, [(name, comments[name]) for name in names]) for heading, names in groups.items()]


def _shown(f):
    return f.name.upper() + (" ..." if typing.get_origin(f.type) is list else "")


def help_text(cls):
    """Grouped options with types, defaults, units and reasons."""
    default, kinds = cls(), _kinds(cls)
    free = "".join(f"[{_shown(f)}] " for f in dataclasses.fields(cls) if f.metadata.get("positional"))
    usage = f"usage: python {Path(sys.argv[0]).name} {free}[--config FILE.py] [--name value or --name=value]"
    lines = [usage, "       config files in their order, then flags; each line: type, default, what it is", ""]
    for heading, names in _documented(cls):
        lines.append(f"{heading}:")
        for name, comment in names:
            flag = f"--{name} {type_name(kinds[name])}"
            lines.append(f"  {flag:<44} {getattr(default, name)!r:<26} {comment}")
        lines.append("")
    return "\n".join(lines)


# What a disk or a standard output can do to any script at any time: no mistake of ours
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE}


def cli(main, each_rank=True):
    """Run a script's main(); a user's mistake becomes one line and exit code 2, Ctrl-C one line and 130. each_rank:
    whether every process that a launcher starts tells its own; what all of a machine find alike, its first one tells.
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
    except BrokenPipeError:  # `--help | head`
        hush(sys.stdout)
        raise SystemExit(141) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        if error.filename is None:  # so it may be this one
            hush(sys.stdout)
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
        hush(sys.stderr)
    raise SystemExit(2) from None


def hush(stream):
    """Python flushes its streams at its end, and would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


_script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
if _script.parent == Path(__file__).resolve().parent:
    watch_imports()  # a script of this repository, which imports this first
