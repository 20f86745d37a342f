"""Trainers killed on purpose: what is promised of them is tried here.

    python tests/chaos.py            everything, some minutes on two cores; `make chaos` keeps the figures
    python tests/chaos.py --quick    a few cases of each, under a minute; part of `make test`
    python tests/chaos.py --only kills saves

The trainers are the real ones, on the embedded model, CPU and fp32, forked from one warm process (tests/warm.py).
Everything is seeded but the machine's own timing: a kill falls where the process happens to be by then, and the table
tells where that was. "Equal" is bit for bit (tests/place.py).
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import machines
from endurance import left_behind
from place import FLAGS, Place, differences, lines, losses, order_of_prompts
from promises import keep, row, verdict
from warm import NAMES, ROOT, Watch

from checkpoint import checkpoints, newest_checkpoint, step_of, what_is_broken

COMMAND = "python tests/chaos.py"

# Kill anywhere


def strike(place: Place, script: str, folder: Path, resume: bool) -> str | None:
    """One life, killed half of the time anywhere, else in a phase chosen in turn. The phase it was in; None if it ended
    before."""
    _, times, counts, whole = place.whole[script]
    rng, watch = place.rng, place.watch
    if rng.random() < 0.5:
        watch.aim = "start", 0, rng.uniform(0, 0.6 * whole)
    else:
        turns = [*times, *["resume: state put back"] * resume]  # the undisturbed run did not come to that
        wanted = turns[place.turn % len(turns)]
        place.turn += 1
        entry = rng.randint(1, max(1, counts[wanted] // (3 if resume else 1)))
        # on a logarithmic scale: of a phase with others inside, the beginning may be all that is its own
        watch.aim = wanted, entry, times.get(wanted, 0.01) * 10 ** rng.uniform(-3, 0.1)
    code = place.start(script, folder, watch=watch, resume=resume).wait()
    watch.aim = None
    assert code in (0, -signal.SIGKILL), folder.with_suffix(".log").read_text()[-3000:]
    return watch.phase if code else None


def killed_run(place: Place, script: str, most: int) -> tuple[Counter, int, list[str]]:
    """A run killed up to `most` times, then left to end: (phases hit, checkpoints left half written, faults)."""
    folder, hit, half, faults = place.new(script), Counter(), 0, []
    for resume in range(most):
        phase = strike(place, script, folder, bool(resume))
        if phase is None:
            break
        hit[phase] += 1
        half += any(folder.glob(".checkpoint-*.tmp"))
        broken = {p.name: what_is_broken(p) for p in checkpoints(folder)}
        faults += [f"{name} after a kill in {phase}: {fault}" for name, fault in broken.items() if fault]
    code = place.start(script, folder, resume=True).wait()
    if code:
        faults.append(f"the last resume ended with {code}: {folder.with_suffix('.log').read_text()[-500:]}")
        return hit, half, faults
    return hit, half, faults + differences(place.undisturbed(script), folder)


def kills(place: Place, wanted: int) -> list[dict]:
    rows = []
    for script in FLAGS:
        place.undisturbed(script)
        place.turn, hit, half, runs, good, faults = 0, Counter(), 0, 0, 0, []
        least = set(place.whole[script][1]) if wanted >= 50 else set()
        while hit.total() < wanted or (least - set(hit) and hit.total() < 3 * wanted):
            found, left, wrong = killed_run(place, script, min(12, max(2, wanted)))
            hit, half, runs, good = hit + found, half + left, runs + 1, good + (not wrong) * found.total()
            faults += wrong
            to_come = f"; not hit yet: {', '.join(sorted(least - set(hit)))}" if least - set(hit) else ""
            print(f"  {script}: run {runs}, {hit.total()} kills; {wrong or 'equal'}{to_come}", flush=True)
        told = ", ".join(f"{name} {hit[name]}" for name in NAMES if hit[name])
        told = f"{runs} runs, {half} checkpoints caught half written; killed in: {told}"
        promise = f"{script}.py killed with SIGKILL at any moment and resumed equals the undisturbed run bit for bit"
        rows.append(row(promise, hit.total(), good, f"{COMMAND} --only kills", "; ".join([*faults[:3], told])))
    return rows


# Killed before each file operation of a save, and of the resume that follows

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.copyfile")


def die_before(number: int, watch: Watch, folder: Path, count_only: bool = False):
    """For the child: SIGKILL itself before its number-th change of a file in the folder. Counts them in watch.cells."""

    def hook(event, args):
        if event not in FILE_EVENTS or str(folder) not in f"{args[0]}":
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        watch.cells[-1] += 1
        if watch.cells[-1] == number and not count_only:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def saves(place: Place, every: int) -> list[dict]:
    """A short run that writes three checkpoints: killed before its k-th file operation, for each `every`-th k."""
    rows = []
    for script in FLAGS:
        short = {"max_steps": 3, "save_steps": 1, "eval_steps": 2, "save_total_limit": 1}
        whole, watch = place.new(script), Watch()
        code = place.start(script, whole, first=die_before(0, watch, whole, True), **short).wait()
        assert code == 0, whole.with_suffix(".log").read_text()[-3000:]
        total, tried, good, faults = int(watch.cells[-1]), 0, 0, []
        for number in range(1, total + 1, every):
            folder = place.new(script)
            code = place.start(script, folder, first=die_before(number, watch, folder), **short).wait()
            watch.clear()
            codes = [code]
            if number % 2:  # every other one is killed in its resume as well, where that changes files
                first = die_before(number // 2 % 20 + 1, watch, folder)
                codes.append(place.start(script, folder, first=first, resume=True, **short).wait())
            codes.append(place.start(script, folder, resume=True, **short).wait())
            wrong = differences(whole, folder) if codes[-1] == 0 else [f"exit codes {codes}"]
            tried, good, faults = tried + 1, good + (not wrong), faults + [f"operation {number}: {w}" for w in wrong]
            watch.clear()
            shutil.rmtree(folder)
        print(f"  {script}: {tried} of {total} file operations; {faults or 'equal'}", flush=True)
        told = f"{total} operations that change files in a run of three checkpoints"
        promise = f"{script}.py killed before each single file operation, then resumed, equals the undisturbed run"
        rows.append(row(promise, tried, good, f"{COMMAND} --only saves", "; ".join([*faults[:3], told])))
    return rows


# Signals, the folder, the same seed


def signals(place: Place, times: int) -> list[dict]:
    """SIGTERM and SIGINT at random moments of training: the step ends, a checkpoint, 128 + number; resumed: equal."""
    tried = good = 0
    faults, told = [], Counter()
    for script in FLAGS:
        whole = place.undisturbed(script)
        for number in [signal.SIGTERM, signal.SIGINT] * times:
            folder = place.new(script)
            life = place.start(script, folder, watch=place.watch)
            wanted = place.rng.randint(1, 4)
            while life.poll() is None and place.watch.count[NAMES.index("metrics written")] < wanted:
                time.sleep(1e-4)
            time.sleep(place.rng.uniform(0, 0.05))
            phase = place.watch.phase
            life.kill(number)
            code, last = life.wait(), newest_checkpoint(folder)
            steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
            wrong = [f"exit code {code}"] * (code != 128 + number)
            wrong += ["no checkpoint of the last step"] * (last is None or step_of(last) != steps[-1])
            wrong += [f"resume: {place.start(script, folder, resume=True).wait()}"] * bool(wrong)
            if not wrong and place.start(script, folder, resume=True).wait() == 0:
                # a stop writes a checkpoint that the undisturbed run does not: only the last ones are compared
                wrong = [d for d in differences(whole, folder) if not d.startswith("files")]
            tried, good = tried + 1, good + (not wrong)
            told[f"{signal.Signals(number).name} in {phase}"] += 1
            faults += wrong
    print(f"  {tried} signals; {faults or 'equal'}", flush=True)
    told = ", ".join(f"{name} {n}" for name, n in told.items())
    promise = "SIGTERM, SIGINT: the step ends, a checkpoint is written, exit code 143 or 130; resumed it is equal"
    return [row(promise, tried, good, f"{COMMAND} --only signals", "; ".join([*faults[:3], told]))]


def folders(place: Place) -> list[dict]:
    """A second run into a folder that is trained in is refused; a lock left by SIGKILL holds up nobody."""
    tried = good = 0
    for script in FLAGS:
        folder = place.new(script)
        life = place.start(script, folder, watch=place.watch)
        while life.poll() is None and not place.watch.count[NAMES.index("step")]:
            time.sleep(1e-3)
        second = [place.start(script, folder, **{how: True}) for how in ("resume", "overwrite")]
        codes = [each.wait() for each in second]
        refused = folder.with_suffix(".log").read_text().count("another process trains in")
        alive = life.poll() is None
        life.kill()
        ended = life.wait() == -signal.SIGKILL
        after = place.start(script, folder, resume=True).wait()
        wrong = differences(place.undisturbed(script), folder)
        tried += 2
        good += (codes == [2, 2] and refused == 2 and alive) + (ended and not after and not wrong)
    print(f"  folder: {good} of {tried}", flush=True)
    promise = "a second run into one folder is refused and the first goes on; after SIGKILL the folder is free"
    return [row(promise, tried, good, f"{COMMAND} --only folders", "two refusals (--resume, --overwrite) a trainer")]


def twice(place: Place, times: int) -> list[dict]:
    """The same seed: the same run; another one: another run."""
    rows = []
    for script in FLAGS:
        good, other = 0, place.new(script)
        for _ in range(times):
            folder = place.new(script)
            code = place.start(script, folder).wait()
            good += code == 0 and not differences(place.undisturbed(script), folder)
        assert place.start(script, other, seed=7).wait() == 0
        assert differences(place.undisturbed(script), other), "another seed gave the same run"
        print(f"  {script}: {good} of {times} runs equal", flush=True)
        promise = f"{script}.py with the same seed is the same run bit for bit (CPU, fp32)"
        rows.append(row(promise, times, good, f"{COMMAND} --only twice", "another seed gives another run"))
    return rows


# Several ranks


def elastic(place: Place, worlds: list[int]) -> list[dict]:
    """Four steps on two ranks, then on from there on 1, 2 and 4: against one rank from beginning to end."""
    rows = []
    more = {"max_steps": 8, "save_steps": 4, "eval_steps": 0, "save_total_limit": "none", "lora_dropout": 0}
    more["eval_data_path"] = "none"
    sizes = {"train_sft": 8, "train_grpo": 16}
    names = ("step", "loss", "grad_norm", "lr", "answer_tokens", "prompt_tokens", "trained_tokens")
    for script, size in sizes.items():
        one, two = place.new(script), place.new(script)
        codes = [place.start(script, one, per_device_train_batch_size=size, **more).wait()]
        halves = more | {"per_device_train_batch_size": size // 2}
        codes += [life.wait() for life in place.ranks(script, two, 2, 29651, **halves)]
        assert not any(codes), two.with_suffix(".log").read_text()[-3000:]
        shutil.rmtree(two / "checkpoint-8")
        good, faults, gap = 0, [], 0.0
        for world in worlds:
            folder = place.new(script)
            shutil.copytree(two, folder)
            lives = place.ranks(script, folder, world, 29652 + world, resume=True, **halves)
            wrong = [f"exit code {code}" for code in (life.wait() for life in lives) if code]
            mine, theirs = losses(folder, *names), losses(one, *names)
            gaps = [abs(a - b) / max(1.0, abs(b)) for m, t in zip(mine, theirs) for a, b in zip(m, t) if b is not None]
            gap = max([gap, *gaps])
            wrong += ["losses"] * (len(mine) != len(theirs) or gap > 1e-4)
            wrong += ["other prompts or completions"] * (order_of_prompts(folder) != order_of_prompts(one))
            good, faults = good + (not wrong), faults + [f"{world} ranks: {w}" for w in wrong]
        print(f"  {script}: on {worlds} ranks, largest difference {gap:.1e}; {faults or 'equal'}", flush=True)
        told = f"loss, gradient norm, rate and token counts of 8 steps at most {gap:.0e} apart"
        told += ", every completion's ids equal" if script == "train_grpo" else ""
        promise = f"{script}.py saved on 2 ranks goes on on {', '.join(map(str, worlds))} as one rank would have"
        rows.append(row(promise, len(worlds), good, f"{COMMAND} --only elastic", "; ".join([*faults[:3], told])))
    return rows


def rank_killed(place: Place, times: int) -> list[dict]:
    """Of two ranks one is killed at a random moment: the other ends by itself; both resumed: as if nothing had been."""
    tried, good, faults, seconds = 0, 0, [], []
    more = {"max_steps": 30, "save_steps": 2, "eval_data_path": "none"}
    for script in FLAGS:
        whole = place.new(script)
        codes = [life.wait() for life in place.ranks(script, whole, 2, 29659, **more)]
        assert not any(codes), whole.with_suffix(".log").read_text()[-3000:]
        for k in range(times):
            folder, victim = place.new(script), k % 2
            lives = place.ranks(script, folder, 2, 29660 + k, **more)
            while not losses(folder, "loss") and all(life.poll() is None for life in lives):
                time.sleep(0.01)
            time.sleep(place.rng.uniform(0, 0.5))
            lives[victim].kill()
            began = time.monotonic()
            code = lives[1 - victim].wait(60)
            seconds.append(time.monotonic() - began)
            wrong = ["the other rank took no notice"] * (lives[victim].wait() != 0 and code == 0)
            again = [life.wait() for life in place.ranks(script, folder, 2, 29670 + k, resume=True, **more)]
            wrong += [f"resume ended with {again}"] * any(again)
            wrong += [] if wrong else differences(whole, folder)
            tried, good, faults = tried + 1, good + (not wrong), faults + wrong
    print(f"  {good} of {tried}, at most {max(seconds):.1f} s; {faults or 'all ended'}", flush=True)
    told = f"the other one ends after {max(seconds):.1f} s at most"
    promise = "a rank killed with SIGKILL ends the others within a minute; the run resumed is equal bit for bit"
    return [row(promise, tried, good, f"{COMMAND} --only ranks", "; ".join([*faults[:3], told]))]


def launcher_killed(place: Place, times: int) -> list[dict]:
    """The deepspeed command with two ranks: a rank is killed, or the command itself. Nothing is left after a minute."""
    tried, good, faults, slowest = 0, 0, [], 0.0
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port"]
    for k in range(max(1, times)):
        for script in FLAGS if times else ["train_sft"]:
            for victim in ("the command", "a rank") if times else ["the command"]:
                folder = place.new(script)
                flags = place.flags(script, folder, max_steps=100_000, eval_data_path="none", save_total_limit=1)
                command = [*launcher, str(29680 + k), f"{script}.py"]
                command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
                with folder.with_suffix(".log").open("w") as log:
                    run = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
                while len(lines(folder / "metrics.jsonl")) < 3 and run.poll() is None:
                    time.sleep(0.1)
                pids = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in left_behind(run.pid)}
                ranks = [p for p, words in pids.items() if b"deepspeed" not in words and b".py" in words]
                began = time.monotonic()
                os.kill(place.rng.choice(ranks) if victim == "a rank" else run.pid, signal.SIGKILL)
                code = run.wait(60)
                while (left := left_behind(run.pid)) and time.monotonic() - began < 60:
                    time.sleep(0.1)
                slowest = max(slowest, time.monotonic() - began)
                for each in left:
                    os.kill(each, signal.SIGKILL)
                wrong = [f"{victim}: {len(left)} processes left"] * bool(left) + ["exit code 0"] * (code == 0)
                wrong += ["no whole checkpoint"] * (newest_checkpoint(folder) is None)
                tried, good, faults = tried + 1, good + (not wrong), faults + wrong
    print(f"  {good} of {tried}, at most {slowest:.1f} s; {faults or 'nothing left'}", flush=True)
    told = f"a rank or the deepspeed command killed; all gone after {slowest:.1f} s at most"
    promise = "deepspeed with 2 ranks: after SIGKILL of a rank or of the command no process is left after a minute"
    return [row(promise, tried, good, f"{COMMAND} --only launcher", "; ".join([*faults[:3], told]))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases of each")
    parser.add_argument("--save", action="store_true", help="write dev/chaos.json and dev/CHAOS.md")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=None, metavar="PART", help="kills saves signals folders …")
    parser.add_argument("--folder", type=Path, default=None, help="scratch; default: a temporary one, deleted")
    args = parser.parse_args()
    few = args.quick
    parts = {
        "kills": lambda place: kills(place, 4 if few else 60),
        "saves": lambda place: saves(place, 23 if few else 1),
        "signals": lambda place: signals(place, 1 if few else 6),
        "folders": folders,
        "twice": lambda place: twice(place, 1 if few else 5),
        "elastic": lambda place: elastic(place, [1, 4] if few else [1, 2, 4]),
        "ranks": lambda place: rank_killed(place, 1 if few else 6),
        "launcher": lambda place: launcher_killed(place, 0 if few else 2),
        **machines.parts(few),
    }
    rows, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="chaos") as scratch:
        folder = (args.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder, args.seed)
        for name in args.only or parts:
            print(f"{name} ({time.monotonic() - began:.0f} s)", flush=True)
            found = parts[name](place)
            if args.save:
                keep(found)
            rows += found
    print(f"{time.monotonic() - began:.0f} s")
    return verdict(rows)


if __name__ == "__main__":
    sys.exit(main())
