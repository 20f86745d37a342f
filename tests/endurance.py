"""Long runs: does anything grow? SFT and GRPO on the embedded model, watched from outside.

    python tests/endurance.py                                     5,000 and 1,000 steps; part of `make chaos`
    python tests/endurance.py --sft_steps 400 --grpo_steps 100    the same, faster

Every half second the process is looked at: resident memory, open files, threads, children. After a fifth of the run
(every clip decoded once, every buffer made) each must stay as it is: memory within BOUND of its median over the second
fifth, the rest without a trend. Draws assets/endurance.svg.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from promises import keep, row, verdict

from reporting.charts import HEIGHT, WIDTH, Axes, curve

BOUND = 32.0  # MiB that resident memory may differ by: twice what glibc's arenas were seen to breathe
PANELS = (("memory", "resident memory, MiB"), ("files", "open files"), ("threads", "threads"))
STYLE = """text{font:11px sans-serif;fill:#57606a}.grid{stroke:#d8dee4}.line{fill:none;stroke:#0969da;stroke-width:1.4}
.pale{opacity:.35}.band{fill:#0969da;opacity:.15}.dots{stroke:#0969da;stroke-width:4;stroke-linecap:round}
.mark{stroke:#cf222e;stroke-dasharray:4 3}"""
SFT = ["--per_device_train_batch_size", "4", "--nframes", "4", "--save_steps", "250", "--logging_steps", "250"]
SFT += ["--eval_steps", "250", "--eval_samples", "8", "--max_new_tokens", "12"]
GRPO = ["--per_device_train_batch_size", "16", "--num_generations", "4", "--nframes", "4", "--save_steps", "50"]
GRPO += ["--logging_steps", "50", "--eval_steps", "50", "--eval_samples", "8", "--max_new_tokens", "12"]
GRPO += ["--max_completion_length", "12", "--log_completions", "0", "--model_ckpt", "none"]


def children(pid: int) -> list[int]:
    """All processes below pid."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        direct = [int(c) for c in (task / "children").read_text().split()]
        found += [c for child in direct for c in (child, *children(child))]
    return found


def look(pid: int) -> dict[str, float]:
    """Memory (MiB), files, threads and number of processes of pid and all below it, added up."""
    total = {"memory": 0.0, "files": 0, "threads": 0, "processes": 0}
    for each in (pid, *children(pid)):
        total["memory"] += int(Path(f"/proc/{each}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        total["files"] += len(os.listdir(f"/proc/{each}/fd"))
        total["threads"] += len(os.listdir(f"/proc/{each}/task"))
        total["processes"] += 1
    return total


def left_behind(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def watch(script: str, folder: Path, flags: list[str]) -> tuple[list[dict], int, list[int]]:
    """Run a trainer to its end: (a row a look, its exit code, processes it left behind)."""
    log, seen, step = folder.with_suffix(".log"), [], 0
    command = [sys.executable, script, "--output_dir", str(folder), "--overwrite", *flags]
    with log.open("w") as out:
        run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        metrics = folder / "metrics.jsonl"
        metrics.unlink(missing_ok=True)
        file = None
        while run.poll() is None:
            time.sleep(0.5)
            if file is None and metrics.exists():
                file = metrics.open()
            if file is not None:
                step += sum('"loss"' in line or '"trained_tokens"' in line for line in file)
            try:
                if step:
                    seen.append({"step": step, **look(run.pid)})
            except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                continue
    if file is not None:
        file.close()
    return seen, run.returncode, left_behind(run.pid)


def flat(seen: list[dict], steps: int) -> dict[str, tuple[float, float]]:
    """(median over the second fifth, largest of the last four fifths) of each quantity."""
    found = {}
    for name in ("memory", "files", "threads", "processes"):
        late = [r[name] for r in seen if r["step"] >= steps / 5]
        found[name] = float(np.median([r[name] for r in seen if steps / 5 <= r["step"] < 2 * steps / 5])), max(late)
    return found


def trend(seen: list[dict], steps: int, name: str) -> float:
    """What a straight line through the last four fifths gains over them."""
    x, y = np.array([(r["step"], r[name]) for r in seen if r["step"] >= steps / 5], float).T
    return float(np.polyfit(x, y, 1)[0] * (x[-1] - x[0]))


def judge(name: str, seen: list[dict], steps: int) -> list[str]:
    """What is not flat, in words."""
    found, faults = flat(seen, steps), []
    if found["memory"][1] - found["memory"][0] > BOUND:
        faults.append(f"memory {found['memory'][0]:.0f} -> {found['memory'][1]:.0f} MiB")
    for what in ("files", "threads", "processes"):
        if trend(seen, steps, what) > 0.5:
            faults.append(f"{what} grow by {trend(seen, steps, what):.1f}")
    told = ", ".join(f"{what} {a:g} (at most {b:g})" for what, (a, b) in found.items() if what != "memory")
    a, b = found["memory"]
    print(f"{name}: memory {a:.1f} MiB, at most {b:.1f}, trend {trend(seen, steps, 'memory'):+.1f} MiB; {told}")
    return faults


def picture(runs: dict[str, list[dict]]) -> str:
    """One SVG: a line of panels for each run."""
    parts, tall = [], HEIGHT + 30
    for i, (title, seen) in enumerate(runs.items()):
        x = np.array([r["step"] for r in seen], float)
        for k, (name, words) in enumerate(PANELS):
            y = np.array([r[name] for r in seen], float)
            axes = Axes("", "", (0.0, x[-1]), np.r_[0.0, y])
            axes.y0 = 0.0  # from nothing: a rise must not be hidden by the axis, nor made large by it
            paths = [*curve(axes, x, y)[0], ("mark", f"M{axes.x(x[-1] / 5):.1f} 8V{HEIGHT - 24}")]
            drawn = "".join(f'<path class="{kind} s0" d="{d}"/>' for kind, d in paths)
            for at, text in axes.ticks()["y_ticks"]:
                drawn += f'<text x="38" y="{at + 4}" text-anchor="end">{text}</text>'
            for at, text in axes.ticks()["x_ticks"]:
                drawn += f'<text x="{at}" y="{HEIGHT - 7}" text-anchor="middle">{text}</text>'
            head = f'<text x="44" y="14" font-weight="600">{title}: {words}</text>'
            parts.append(f'<g transform="translate({k * WIDTH} {i * tall})">{head}<g transform="translate(0 18)">')
            parts.append(f"{drawn}</g></g>")
    size = f'viewBox="0 0 {WIDTH * len(PANELS)} {tall * len(runs)}"'
    back = '<rect width="100%" height="100%" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{back}{"".join(parts)}</svg>\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sft_steps", type=int, default=5000)
    parser.add_argument("--grpo_steps", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=ROOT / "output" / "endurance")
    parser.add_argument("--save", action="store_true", help="write dev/chaos.json, dev/CHAOS.md, assets/endurance.svg")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    data = args.folder / "data"
    flags = ["--num_samples", "60", "--split", "0.8", "--video_length", "12", "--seed", "1", "--overwrite"]
    subprocess.run([sys.executable, "generate.py", "--output_dir", data, *flags], cwd=ROOT, check=True, stdout=-3)
    rows, runs = [], {}
    for name, script, steps, more in (
        ("SFT", "train_sft.py", args.sft_steps, SFT),
        ("GRPO", "train_grpo.py", args.grpo_steps, GRPO),
    ):
        if not steps:
            continue
        given = ["--data_path", str(data / "train.json"), "--max_steps", str(steps), *more]
        began = time.monotonic()
        seen, code, left = watch(script, args.folder / name.lower(), given)
        seen = [r for r in seen if r["step"] < steps]  # what it is like on its way out is not asked
        faults = judge(name, seen, steps) if code == 0 else [f"exit code {code}, see {args.folder / name.lower()}.log"]
        faults += [f"{len(left)} processes left"] * bool(left)
        found = flat(seen, steps) if code == 0 else {}
        told = "; ".join(faults) or (
            f"{found['memory'][0]:.0f} MiB, at most {found['memory'][1] - found['memory'][0]:+.1f} after; "
            f"{found['files'][1]:g} files, {found['threads'][1]:g} threads, {time.monotonic() - began:.0f} s"
        )
        promise = f"{name} for {steps:,} steps: memory, open files and threads stay, no process is left"
        rows.append(row(promise, steps, 0 if faults else steps, "python tests/endurance.py", told))
        runs[f"{name}, {steps:,} steps"] = seen
    if args.save:
        (ROOT / "assets" / "endurance.svg").write_text(picture(runs))
        keep(rows)
    return verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
