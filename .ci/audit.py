"""Known advisories against every version of the lock files, asked of OSV (google.github.io/osv.dev): `make audit`.

Exit code: 0 none known, 1 some known, 2 not audited, because there is no network.
"""

import re
import sys
from pathlib import Path

import requests

URL = "https://api.osv.dev/v1/querybatch"
LOCKS = ("requirements.lock", "requirements-dev.lock", "requirements-torch.lock")


def locked(folder):
    """[(name, version)] of the lock files, sorted."""
    text = "".join((Path(folder) / name).read_text(encoding="utf-8") for name in LOCKS)
    return sorted(set(re.findall(r"^([\w.-]+)==([\w.+]+)", text, re.M)))


def advisories(packages):
    """{(name, version): ids of known advisories}. Raises requests.RequestException where OSV does not answer."""
    queries = [{"package": {"name": name, "ecosystem": "PyPI"}, "version": version} for name, version in packages]
    answer = requests.post(URL, json={"queries": queries}, timeout=30)
    answer.raise_for_status()
    results = answer.json()["results"]
    assert len(results) == len(packages), f"{len(packages)} versions asked for, {len(results)} answers"
    found = zip(packages, results, strict=True)
    return {package: [v["id"] for v in result.get("vulns", [])] for package, result in found if result.get("vulns")}


def main():
    packages = locked(Path(__file__).resolve().parents[1])
    try:
        found = advisories(packages)
    except requests.RequestException as error:
        reason = str(error).splitlines()[0][:150]
        print(f"NOT audited: no answer from {URL} ({reason}); is there a network?", file=sys.stderr)
        return 2
    for (name, version), ids in found.items():
        print(f"{name} {version}: {', '.join(ids)}")
    print(f"{len(packages)} locked versions, {len(found)} with known advisories")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
