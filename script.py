"""A script's main(): a user's mistake is one line and exit code 2, Ctrl-C one line and 130.

Every script imports it before torch: what the environment must hold by then is set here, and Ctrl-C during imports is
handled here.
"""

import errno
import multiprocessing
import os
import shlex
import signal
import sys
from pathlib import Path

from model import UserError

# Loop turns in which a waiting thread of libgomp, which torch computes with on a CPU, keeps its core busy. Its default,
# some milliseconds, made steps 7 to 8 times as long where two other programs wanted the cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What a disk or a standard output can do to any script at any time: no mistake of ours
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE}


def command(script, *arguments):
    """How to type one of the repository's scripts, from the folder that this one was started in."""
    folder = os.path.relpath(Path(__file__).parent)
    return shlex.join(["python", os.path.normpath(os.path.join(folder, script)), *arguments])


def cli(main, each_rank=True):
    """Run a script's main(). each_rank: whether every process that a launcher starts prints its mistake; what all ranks
    of a machine report alike only the first one prints."""
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
    """From now on Ctrl-C ends the process at once: while modules are imported an exception could end in a traceback."""
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
