"""A script's main(): a user's mistake is one line and exit code 2, Ctrl-C one line and 130.

Every script imports it before torch: what the environment must hold by then is set here, and Ctrl-C during imports is
handled here.
"""

import concurrent.futures
import contextlib
import errno
import multiprocessing
import os
import shlex
import signal
import sys
import threading
from pathlib import Path

from model import UserError

# Loop turns in which a waiting thread of libgomp, which torch computes with on a CPU, keeps its core busy. Its default,
# some milliseconds, made steps 7 to 8 times as long where two other programs wanted the cores.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# On a GPU memory that is freed in pieces of one size serves another size: 7B GRPO fits into 15 GiB only so (dev/LOG.md)
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# What a disk, a standard output or a name can do to any script at any time: no mistake of ours
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ESTALE}
DISK |= {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}


def command(script, *arguments):
    """How to type one of the repository's scripts, from the folder that this one was started in."""
    return shlex.join(["python", os.path.relpath(Path(__file__).with_name(script)), *arguments])


def cli(main, each_rank=True, at_once=False):
    """Run a script's main(). each_rank: whether every process that a launcher starts prints its mistake; what all ranks
    of a machine report alike only the first one prints. at_once: Ctrl-C ends the process where it is, for nothing has
    to be put away; an exception amid Python that C++ calls would end it by an abort."""
    if not at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:
        interrupted()
    except UserError as error:
        leave(f"error: {error}" if each_rank or os.environ.get("LOCAL_RANK", "0") == "0" else "")
    except RuntimeError as error:
        if not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            raise
        leave("another rank of this run has ended; see what it printed")
    except BrokenPipeError:  # `--help | head`
        leave("", code=141)
    except OSError as error:
        if error.errno not in DISK:
            raise
        what = error.filename or "standard output, or a file"
        leave(f"error: {what}: {error.strerror}; make room or choose another place, then run again")
    finally:
        signal.signal(signal.SIGINT, interrupted)


def leave(line, code=2):
    """End with a line on stderr and this exit code, also where a stream goes to a closed pipe or a full disk."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, line and f"{line}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # Python flushes it once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code) from None


def in_threads(function, items, workers, desc, stop=None, notice=""):
    """[function(item), …] by `workers` threads, with a progress bar. The first Ctrl-C drops what has not begun
    and raises KeyboardInterrupt when the threads are done, the second ends the process. An error drops it too. Both set
    the event `stop`. notice: printed at the first Ctrl-C."""
    from tqdm import tqdm

    stop, noted = stop or threading.Event(), []

    def note(*_):  # raised here, amid the pool's work, it could leave a lock taken, and the pool would wait for ever
        if noted:
            interrupted()
        noted.append(True)
        stop.set()
        os.write(2, notice.encode())

    in_main = threading.current_thread() is threading.main_thread()  # elsewhere signals never come
    before = signal.signal(signal.SIGINT, note) if in_main else None
    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            results = pool.map(lambda item: None if stop.is_set() else function(item), items)
            try:
                return list(tqdm(results, desc, len(items), disable=None, unit="clip"))
            finally:
                stop.set()
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)
        if noted:
            raise KeyboardInterrupt from None


def interrupted(*_):
    """Ctrl-C while modules are imported or after the end: an exception there could end in a traceback."""
    if os.environ.get("LOCAL_RANK", "0") == "0" and multiprocessing.parent_process() is None:
        os.write(2, b"\nstopped by Ctrl-C\n")
    with contextlib.suppress(OSError, RuntimeError):  # a closed pipe; or the signal came in the middle of a write
        sys.stdout.flush()
    os._exit(130)


if (Path(__file__).parent / Path(sys.argv[0]).name).is_file():  # one of this repository's scripts was started
    signal.signal(signal.SIGINT, interrupted)
