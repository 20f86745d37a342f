"""The lock files hold everything that is installed, exactly, and `make audit` says when it could not ask."""

import json
import re
import runpy
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
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


class OSV(BaseHTTPRequestHandler):
    """Answers as OSV's querybatch does: one package has an advisory."""

    def do_POST(self):
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        vulns = [{"vulns": [{"id": "PYSEC-1"}]} if q["package"]["name"] == "jinja2" else {} for q in queries]
        body = json.dumps({"results": vulns}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_the_audit_tells_advisories_and_a_missing_network(monkeypatch, capsys):
    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))
    main, names = audit["main"], audit["main"].__globals__
    with HTTPServer(("127.0.0.1", 0), OSV) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setitem(names, "URL", f"http://127.0.0.1:{server.server_port}")
        assert main() == 1 and re.search(r"jinja2 [\d.]+: PYSEC-1\n\d+ locked", capsys.readouterr().out)
        server.shutdown()
    assert main() == 2 and "NOT audited" in capsys.readouterr().err  # the server is gone
    assert len(audit["locked"](ROOT)) == sum(len(blocks(name)) for name in (RUN, DEV, TORCH))
