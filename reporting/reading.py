"""A run's folder -> a Run: whatever is there, as Python has it; what is broken is a note for the page."""

import json
from dataclasses import dataclass
from pathlib import Path

from model import UserError, nearest_path
from reporting.rollouts import Rollouts, read_rollouts


@dataclass
class Run:
    """What a run's folder holds; {} and [] for what is not there."""

    name: str
    folder: Path
    about: dict  # run.json
    rows: list[dict]  # metrics.jsonl
    best: dict  # best.json
    data: dict  # data.json
    rollouts: Rollouts | None
    measured: list[dict]  # objects with a confusion table or controls: of metrics.jsonl, then of eval*.json
    notes: list[str]  # what could not be read

    @property
    def config(self) -> dict:
        found = self.about.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def data_path(self) -> Path | None:
        found = self.config.get("data_path")
        return Path(found) if isinstance(found, str) and found else None


def read_object(path: Path, notes: list[str]) -> dict:
    """A JSON object; {} if the file is not there, or with a note for the page if it holds something else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        notes.append(f"{path} is left out: not JSON ({error})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path} is left out: a JSON {type(value).__name__}, expected an object")
        return {}
    return value


def read_rows(path: Path, notes: list[str]) -> list[dict]:
    """The JSON objects of a .jsonl file; other lines (cut by a crash, say) are counted in a note."""
    if not path.is_file():
        return []
    rows, broken = [], 0
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        notes.append(f"{path}: {broken} of {broken + len(rows)} lines are no JSON objects and are left out")
    return rows


OF_A_RUN = ("run.json", "metrics.jsonl", "rollouts.jsonl")


def read_run(folder: Path) -> Run:
    """UserError if there is no such folder; whatever is missing inside is missing on the page."""
    if not folder.is_dir():
        expected = f"expected a run's folder, the --output_dir of a training{nearest_path(folder)}"
        raise UserError(f"{folder}: no such folder; {expected}")
    if not any((folder / name).is_file() for name in OF_A_RUN):
        runs = sorted(str(path.parent) for path in folder.glob("*/run.json"))[:3]
        below = f"; did you mean {' or '.join(runs)}?" if runs else ""
        raise UserError(f"{folder}: none of {', '.join(OF_A_RUN)} is there; expected the --output_dir of a run{below}")
    notes = []
    about, best, data = (read_object(folder / name, notes) for name in ("run.json", "best.json", "data.json"))
    rows = read_rows(folder / "metrics.jsonl", notes)
    found = rows + [read_object(path, notes) for path in sorted(folder.glob("eval*.json"))]
    measured = [{"step": row.get("step"), **inner} for row in found if (inner := evaluation_of(row))]
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    return Run(folder.resolve().name, folder, about, rows, best, data, rollouts, measured, notes)


def evaluation_of(row: dict) -> dict | None:
    """The object in a row that holds a confusion table or controls: the row itself or one nested in it."""
    if isinstance(row.get("confusion"), dict) or isinstance(row.get("controls"), dict):
        return row
    nested = (evaluation_of(value) for value in row.values() if isinstance(value, dict))
    return next((found for found in nested if found), None)
