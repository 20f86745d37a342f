"""The table of what is promised, how many cases were tried and how many survived: dev/chaos.json, read as dev/CHAOS.md.

Each long test adds its rows by keep(); a row of the same promise is replaced, so that a part can be run again alone.
"""

import json
import platform
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROWS, TABLE = ROOT / "dev" / "chaos.json", ROOT / "dev" / "CHAOS.md"
HEAD = """# What was broken on purpose, and what became of it

Written by `make chaos`; the fast part of each row runs in `make test`. The figures are those of the last run.

"""


def row(promise: str, tried: int, survived: int, command: str, told: str) -> dict:
    """told: the figures behind it, in a few words."""
    found = {"promise": promise, "tried": tried, "survived": survived, "command": command, "told": told}
    return found | {"date": date.today().isoformat(), "python": platform.python_version()}


def table(rows: list[dict]) -> str:
    lines = ["| promise | tried | survived | figures | command | date |", "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(
            f"| {r['promise']} | {r['tried']:,} | {r['survived']:,} | {r['told']} | `{r['command']}` | {r['date']} |"
        )
    return "\n".join(lines) + "\n"


def keep(rows: list[dict]) -> None:
    """Put rows into dev/chaos.json and write dev/CHAOS.md anew."""
    known = {r["promise"]: r for r in (json.loads(ROWS.read_text()) if ROWS.exists() else [])}
    known |= {r["promise"]: r for r in rows}
    ROWS.write_text(json.dumps([*known.values()], indent=1, ensure_ascii=False) + "\n")
    TABLE.write_text(HEAD + table([*known.values()]))


def verdict(rows: list[dict]) -> int:
    """Print the rows; the exit code: 1 if a case did not survive."""
    print(table(rows), end="")
    return int(any(r["survived"] < r["tried"] for r in rows))
