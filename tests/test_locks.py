"""The lock files hold everything that is installed, exactly."""

import re
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RUN, DEV, TORCH = "requirements.lock", "requirements-dev.lock", "requirements-torch.lock"


def blocks(name):
    """{package: (its requirement, its hashes)} of a lock file."""
    text = (ROOT / name).read_text()
    found = re.findall(r"^([^\s#][^\\\n]*)((?:\\\n .*)*)\n", text, re.M)
    read = [(Requirement(head.strip()), re.findall(r"--hash=sha256:([0-9a-f]{64})", hashes)) for head, hashes in found]
    assert len(read) == len(re.findall("^[^ #]", text, re.M)), f"{name}: lines of another form"
    return [(canonicalize_name(requirement.name), requirement, hashes) for requirement, hashes in read]


def test_everything_is_pinned_exactly_and_hashed():
    for name in (RUN, DEV, TORCH):
        for package, requirement, hashes in blocks(name):
            assert [s.operator for s in requirement.specifier] == ["=="], f"{name}: {requirement}"
            assert bool(hashes) == (name != TORCH), f"{name}: {package} has {len(hashes)} hashes"
    torchs = [package for package, *_ in blocks(TORCH)]
    assert all(re.match("torch$|triton$|nvidia-|cuda-", package) for package in torchs), torchs


def test_the_locks_say_what_the_requirements_say():
    locked = {(p, str(r.specifier)) for name in (RUN, DEV, TORCH) for p, r, _ in blocks(name)}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if re.match(r"\w", line)]
        for wanted in map(Requirement, lines):
            assert (canonicalize_name(wanted.name), str(wanted.specifier)) in locked, f"{wanted}: make lock"


def test_the_locks_are_complete():
    """Whatever the installed packages say they need, on this Python and machine, is locked."""
    locked = {package for name in (RUN, DEV, TORCH) for package, *_ in blocks(name)}
    seen, waiting = set(), [p for name in (RUN, DEV) for p, *_ in blocks(name)] + ["torch"]
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        try:
            needs = map(Requirement, requires(package) or [])
        except PackageNotFoundError:  # for another platform or Python
            continue
        needs = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
        waiting += [canonicalize_name(n.name) for n in needs]
    assert seen <= locked, f"needed and not locked: {sorted(seen - locked)}; make lock"
