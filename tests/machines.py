"""Several machines, on one: two launchers side by side over loopback, CPU ranks. Parts of tests/chaos.py.

What stands for SLURM here, srun and scontrol of SLURM_TOOLS, does what its manual says of the options that
configs/slurm.sh uses: a task for each number, with SLURM_PROCID and SLURM_LOCALID, signals passed on, the largest exit
code of all, and all ended when one fails.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from endurance import left_behind
from place import Place, differences, lines, losses, order_of_prompts
from promises import row
from warm import ROOT, Life, free_port

import trainer
from training import heartbeat, meeting
from training.heartbeat import LOST

COMMAND = "python tests/chaos.py --only"
MORE = {"max_steps": 16, "save_steps": 2, "eval_data_path": "none"}
MINUTE = 60.0

SRUN = """
import os, signal, subprocess, sys, time
command = sys.argv[next(i for i, word in enumerate(sys.argv) if word == "bash"):]
a_node, tasks = int(os.environ["SLURM_NTASKS_PER_NODE"]), []
for number in range(int(os.environ["SLURM_NTASKS"])):
    env = {"SLURM_PROCID": number, "SLURM_LOCALID": number % a_node, "SLURM_NODEID": number // a_node}
    tasks.append(subprocess.Popen(command, env=os.environ | {k: str(v) for k, v in env.items()}))
signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
ended = 0
while any(task.poll() is None for task in tasks):
    if ended == 0 and any(task.poll() for task in tasks):
        ended = time.monotonic()
        [task.terminate() for task in tasks]
    if ended and time.monotonic() > ended + 30:
        [task.kill() for task in tasks]
    time.sleep(0.05)
sys.exit(max(128 - task.returncode if task.returncode < 0 else task.returncode for task in tasks))
"""
SCONTROL = 'import sys; assert sys.argv[1:] == ["show", "hostnames", "node[0-1]"]; print("127.0.0.1\\nnode1")'


def words(flags: dict) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


# Two launchers


def launch(place: Place, script: str, folder: Path, slots: int, address="127.0.0.1", inside=((), ()), **more):
    """A machine each, as two terminals would: the logs are folder-0.log and folder-1.log. inside: words before each
    command."""
    hosts, port, runs = folder.with_suffix(".hosts"), free_port(), []
    hosts.write_text(f"first slots={slots}\nsecond slots={slots}\n")
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hosts, "--no_ssh"]
    for number in range(2):
        command = [*inside[number], *runner, "--node_rank", number, "--master_addr", address, "--master_port", port]
        command = [*map(str, command), f"{script}.py", *words(place.flags(script, folder, **MORE | more))]
        with log_of(folder, number).open("a") as log:
            runs.append(subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True))
    return runs


def log_of(folder: Path, number: int) -> Path:
    return folder.with_name(f"{folder.name}-{number}.log")


def until_steps(folder: Path, count: int, alive) -> None:
    while len(lines(folder / "metrics.jsonl")) < count and alive():
        time.sleep(0.01)


def kill_session(run: subprocess.Popen) -> None:
    """All of a machine at once, as when its power is cut; but its connections are closed, which then they are not."""
    for pid in left_behind(run.pid):
        os.kill(pid, signal.SIGKILL)
    run.wait()


def lose(place: Place, script: str, slots: int, victim: int, whole: Path, again: str) -> tuple[list[str], float]:
    """Two launchers, one is killed with its ranks, the other one must end; resumed it must come to what `whole` did.
    (faults, seconds until the other one had ended)"""
    folder = place.new(script)
    runs = launch(place, script, folder, slots)
    until_steps(folder, place.rng.randint(3, 10), lambda: all(run.poll() is None for run in runs))
    wrong = [f"machine {k} ended before the kill" for k, run in enumerate(runs) if run.poll() is not None]
    kill_session(runs[victim])
    began = time.monotonic()
    other = runs[1 - victim]
    code = other.wait(2 * MINUTE)
    seconds = time.monotonic() - began
    wrong += [f"exit code {code}"] * (code != LOST) + [f"{seconds:.0f} s"] * (seconds > MINUTE)
    wrong += [f"{len(left_behind(other.pid))} processes left"] * bool(left_behind(other.pid))
    told = [line for line in log_of(folder, 1 - victim).read_text().splitlines() if "ended before the others" in line]
    first = victim * slots  # its first rank, or any other: they die one after the other
    names = [f"rank {first} ", f"ranks {first}, ", f"rank {first + slots - 1} "]
    wrong += [f"told: {told[:1]}"] * (not told or not any(told[0].startswith(name) for name in names))
    wrong += ["a traceback"] * ("Traceback" in log_of(folder, 1 - victim).read_text())
    wrong += resumed(place, script, folder, slots, whole, again)
    return wrong, seconds


def resumed(place: Place, script: str, folder: Path, slots: int, whole: Path, again: str) -> list[str]:
    """Go on with two machines again, by launchers or without, or on one rank. Faults."""
    if again == "launchers":
        codes = [run.wait(5 * MINUTE) for run in launch(place, script, folder, slots, resume=True)]
    else:
        world = 2 * slots if again == "two machines" else 1
        codes = [life.wait() for life in place.ranks(script, folder, world, free_port(), resume=True, **MORE)]
    wrong = [f"resume on {again} ended with {codes}"] * any(codes)
    if again == "one rank":
        pairs = zip(losses(folder, "step", "loss"), losses(whole, "step", "loss"), strict=False)
        gap = max((abs(a - b) for mine, theirs in pairs for a, b in zip(mine, theirs, strict=True)), default=1)
        return wrong + [f"losses {gap:.0e} apart"] * (gap > 1e-4 or len(losses(folder, "loss")) != MORE["max_steps"])
    return wrong + [d for d in differences(whole, folder) if "config" not in d]


def lost_machines(place: Place, cases: list[tuple[str, int, int, str]]) -> list[dict]:
    tried, good, faults, seconds, wholes = 0, 0, [], [0.0], {}
    for script, slots, victim, again in cases:
        if (script, slots) not in wholes:
            wholes[script, slots] = one_launcher(place, script, 2 * slots, by_deepspeed=len(cases) > 1)
        wrong, took = lose(place, script, slots, victim, wholes[script, slots], again)
        print(f"  {script}, 2 x {slots}, machine {victim} killed, then {again}: {wrong or 'equal'}", flush=True)
        tried, good, faults, seconds = tried + 1, good + (not wrong), faults + wrong, [*seconds, took]
    told = "2 launchers x 1 or 2 ranks over loopback, one killed with its ranks; the other names a rank of it and ends "
    told += f"after {max(seconds):.1f} s at most; resumed on 2 machines equal bit for bit, on one rank within 1e-4"
    promise = "a lost machine ends the run within a minute, by name; resumed it equals one launcher's run"
    return [row(promise, tried, good, f"{COMMAND} machines", "; ".join([*faults[:3], told]))]


def one_launcher(place: Place, script: str, world: int, by_deepspeed: bool, **more) -> Path:
    """The undisturbed run of so many ranks on one machine."""
    folder = place.new(script)
    if by_deepspeed:
        flags = words(place.flags(script, folder, **MORE | more))
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(world)]
        command += ["--master_port", str(free_port()), f"{script}.py", *flags]
        with folder.with_suffix(".log").open("w") as log:
            codes = [subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=5 * MINUTE).returncode]
    else:
        codes = [life.wait() for life in place.ranks(script, folder, world, free_port(), **MORE | more)]
    assert not any(codes), folder.with_suffix(".log").read_text()[-3000:]
    return folder


# Two machines with a network between them, whose cable is pulled: nothing is closed, nothing comes any more


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def cable(place: Place) -> list[dict]:
    """Two network namespaces with host names of their own (Linux, as root). No row where they cannot be made."""
    spaces = [f"chaos{os.getpid()}{letter}" for letter in "ab"]
    try:
        for number, space in enumerate(spaces):
            ip(f"netns add {space}")
            if number:
                ip(f"link add v0 netns {spaces[0]} type veth peer name v1 netns {space}")
        for number, space in enumerate(spaces):
            for rest in (f"addr add 10.99.0.{number + 1}/24 dev v{number}", f"link set v{number} up", "link set lo up"):
                ip(f"-n {space} {rest}")
        return pulled(place, spaces)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"  NOT run: no network namespaces here ({getattr(error, 'stderr', None) or error})", flush=True)
        return []
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


def pulled(place: Place, spaces: list[str]) -> list[dict]:
    tried, good, faults, seconds = 0, 0, [], []
    names = ["alpha", "beta"]
    for script in ("train_sft", "train_grpo"):
        folder, inside = place.new(script), []
        for number, space in enumerate(spaces):
            first = f'hostname {names[number]}; export GLOO_SOCKET_IFNAME=v{number}; exec "$@"'
            inside.append(["ip", "netns", "exec", space, "unshare", "--uts", "bash", "-c", first, "machine"])
        ip(f"-n {spaces[1]} link set v1 up")
        runs = launch(place, script, folder, 1, "10.99.0.1", inside, max_steps=100_000)
        until_steps(folder, 5, lambda runs=runs: all(run.poll() is None for run in runs))
        ip(f"-n {spaces[1]} link set v1 down")
        began = time.monotonic()
        codes = [run.wait(2 * MINUTE) for run in runs]
        seconds.append(time.monotonic() - began)
        wrong = [f"exit codes {codes}"] * (codes != [LOST, LOST]) + [f"{seconds[-1]:.0f} s"] * (seconds[-1] > MINUTE)
        for number in range(2):
            lost = f"nothing was heard of rank {1 - number} on {names[1 - number]} for "
            wrong += [f"{names[number]} does not tell"] * (log_of(folder, number).read_text().count(lost) != 1)
            wrong += ["processes left"] * bool(left_behind(runs[number].pid))
        on = MORE | {"max_steps": len(losses(folder, "loss")) + 2, "resume": True}
        one = [life.wait() for life in place.ranks(script, folder, 1, free_port(), **on)]
        wrong += [f"resume on one rank: {one}"] * any(one)
        tried, good, faults = tried + 1, good + (not wrong), faults + wrong
    print(
        f"  {good} of {tried}, after {max(seconds):.0f} s at most; {faults or 'both sides name the other'}", flush=True
    )
    told = f"two network namespaces, their link set down: both sides name the other and end after {max(seconds):.0f} s"
    promise = "two machines whose network is cut end within a minute, each naming the other"
    return [row(promise, tried, good, f"{COMMAND} cable", "; ".join([*faults[:3], told]))]


# Ranks that stand still, and ranks that only seem to


def sooner(silence: float, asleep: float = 0.0):
    """For a child: heartbeats by shorter limits, and a checkpoint that takes rank 0 so many seconds."""

    def first():
        heartbeat.BEAT, heartbeat.SILENCE = silence / 10, silence
        fill = trainer.fill
        trainer.fill = lambda *args: (time.sleep(asleep), fill(*args))

    return first


def ended_by_name(lives: list[Life], victim: int, log: Path) -> tuple[list[str], float]:
    """All but the victim must end with LOST and its name; then the victim is ended. (faults, seconds)"""
    began, wrong = time.monotonic(), []
    for rank, life in enumerate(lives):
        if rank != victim:
            code = life.wait(2 * MINUTE)
            wrong += [f"rank {rank}: exit code {code}"] * (code != LOST)
    seconds = time.monotonic() - began
    lives[victim].kill()
    lives[victim].wait()
    told = [line for line in log.read_text().splitlines() if f"nothing was heard of rank {victim} on " in line]
    wrong += [f"{len(told)} lines name rank {victim}"] * (len(told) != len(lives) - 1)
    return wrong + [f"{seconds:.0f} s"] * (seconds > MINUTE), seconds


def stopped(place: Place, victims: list[int], silence: float | None) -> list[dict]:
    """One of two or three ranks gets SIGSTOP in the middle of its steps."""
    tried, good, faults, seconds = 0, 0, [], []
    for number, victim in enumerate(victims):
        script, folder = ("train_sft", "train_grpo")[number % 2], place.new("stopped")
        first = sooner(silence) if silence else None
        lives = place.ranks(script, folder, len(victims) + 1, free_port(), first, **MORE | {"max_steps": 10_000})
        until_steps(folder, 3, lambda lives=lives: all(life.poll() is None for life in lives))
        lives[victim].kill(signal.SIGSTOP)
        wrong, took = ended_by_name(lives, victim, folder.with_suffix(".log"))
        tried, good, faults, seconds = tried + 1, good + (not wrong), faults + wrong, [*seconds, took]
    print(f"  {good} of {tried}, after {max(seconds):.0f} s at most; {faults or 'all named'}", flush=True)
    told = f"SIGSTOP of rank {', '.join(map(str, victims))}; the others end after {max(seconds):.0f} s at most"
    promise = "a rank that stands still is told by name, and the others end within a minute"
    return [row(promise, tried, good, f"{COMMAND} stopped", "; ".join([*faults[:3], told]))]


def patient(place: Place, silence: float | None) -> list[dict]:
    """What must end nobody: rank 0 writes a checkpoint for longer than SILENCE while the others wait in a collective;
    meanwhile all ranks are suspended for longer than that, and go on together."""
    folder, limit = place.new("patient"), silence or heartbeat.SILENCE
    first = sooner(limit, asleep=1.5 * limit)
    lives = place.ranks("train_sft", folder, 2, free_port(), first, **MORE | {"max_steps": 2})
    until_steps(folder, 2, lambda: all(life.poll() is None for life in lives))
    time.sleep(0.3 * limit)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for life in lives:
            life.kill(number)
        time.sleep(1.5 * limit * (number == signal.SIGSTOP))
    codes = [life.wait() for life in lives]
    print(f"  patient: {codes}", flush=True)
    told = f"a checkpoint of {1.5 * limit:.0f} s, all ranks suspended for {1.5 * limit:.0f} s: none ended"
    promise = "a long checkpoint, or all ranks suspended together, ends no run"
    return [row(promise, 1, int(not any(codes)), f"{COMMAND} patient", told)]


# Machines that do not fit together


CHEAP = ("data", "no data", "folder", "rank 1 elsewhere")


def at_odds(place: Place, few: bool) -> list[dict]:
    """Rank 1 has other data, other flags, no data, no checkpoint, another number of ranks, is a second rank 0, or looks
    for rank 0 elsewhere; or the folder is not empty, which only rank 0 looks at."""
    records = (place.folder / "data/train.json").read_text()
    other = place.folder / "data/other.json"
    other.write_text(records.replace("Answer: (A)", "Answer: (B)", 1))
    half = place.new("half")
    for life in () if few else place.ranks("train_sft", half, 2, free_port(), **MORE | {"max_steps": 2}):
        assert life.wait() == 0, half.with_suffix(".log").read_text()[-3000:]
    empty = {"output_dir": place.new("empty"), "resume": True}
    cases = {  # what is different on rank 1 -> (its flags, its variables, exit codes, what is told)
        "data": ({"data_path": other}, {}, [2, 2], "training data: found 48 records, file "),
        "flag": ({"seed": 7}, {}, [2, 2], "--seed: found 7 on rank 1 ("),
        "no data": ({"data_path": place.folder / "nowhere.json"}, {}, [LOST, 2], "no such file"),
        "checkpoint": (empty, {}, [2, 2], "to go on from: found no "),
        "folder": ({}, {}, [2, 2], "already holds other things (notes.txt), expected nothing"),
        "ranks": ({}, {"WORLD_SIZE": "3"}, [2, 2], "number of ranks: found 3 on rank 1 ("),
        "rank 0 twice": ({}, {"RANK": "0"}, [2, 2], "is there a second machine with --node_rank 0?"),
        "rank 1 elsewhere": ({}, {"MASTER_PORT": str(free_port())}, [2, 2], "(1) did not come in 4 s"),
    }
    cases = {name: case for name, case in cases.items() if not few or name in CHEAP}
    running, soon = {}, lambda: setattr(meeting, "JOIN", 4.0)
    for name, (flags, env, *_) in cases.items():
        folder, port, resume = half if name == "checkpoint" else place.new("odd"), free_port(), name == "checkpoint"
        if name == "folder":
            folder.mkdir()
            (folder / "notes.txt").touch()
        shared = {"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = str(port)
        lives = []
        for rank in range(2):
            mine = MORE | {"max_steps": 3, "resume": resume} | (flags if rank else {})
            mine_env = shared | {"RANK": str(rank)} | (env if rank else {})
            first = soon if name.startswith("rank ") else None  # of these one waits for a rank that does not come
            lives.append(place.start("train_sft", folder, mine_env, first, **mine))
            time.sleep(0.3 * (name == "rank 0 twice"))
        running[name] = lives, folder.with_suffix(".log")
    faults = []
    for name, (lives, log) in running.items():
        codes, text = [life.wait() for life in lives], log.read_text()
        *_, expected, told = cases[name]
        faults += [f"{name}: {codes}, told: {text[-300:]}"] * (codes != expected or told not in text)
        faults += [f"{name}: a traceback"] * ("Traceback" in text)
    print(f"  at odds: {len(cases)} cases; {faults or 'all refused'}", flush=True)
    promise = "machines with other data, flags, checkpoints or numbers of ranks are refused at the start, in one line"
    return [row(promise, len(cases), len(cases) - len(faults), f"{COMMAND} odds", "; ".join([*faults[:3], *cases]))]


# SLURM


def slurm_environment(place: Place, nodes: int, a_node: int) -> dict:
    tools = place.folder / "slurm"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(f"#!{sys.executable}\n{text}")
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": free_port() - 29500, "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NTASKS": nodes * a_node}
    job |= {"SLURM_NTASKS_PER_NODE": a_node, "PYTHON": sys.executable, "PATH": f"{tools}:{os.environ['PATH']}"}
    return os.environ | {name: str(value) for name, value in job.items()}


def slurm_script(place: Place) -> list[dict]:
    """configs/slurm.sh hands each task its numbers and the flags."""
    stub = place.folder / "python"
    names = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_SIZE $MASTER_ADDR"
    stub.write_text(f'#!/bin/bash\necho "{names} $*" >>{place.folder}/tasks\n')
    stub.chmod(0o755)
    script, env = ROOT / "configs/slurm.sh", slurm_environment(place, 2, 2) | {"PYTHON": str(stub)}
    checked = subprocess.run(["bash", "-n", script]).returncode
    code = subprocess.run(["bash", script, "train_sft.py", "--seed", "a b"], env=env).returncode
    refused = subprocess.run(["bash", script], env=env, stderr=subprocess.DEVNULL).returncode
    found = sorted((place.folder / "tasks").read_text().splitlines())
    wanted = [f"{rank} {rank % 2} 4 2 127.0.0.1 -u train_sft.py --resume --seed a b" for rank in range(4)]
    wrong = [f"exit codes {checked}, {code}, {refused}"] * ((checked, code, refused) != (0, 0, 2))
    wrong += [f"tasks: {found}"] * (found != wanted)
    print(f"  slurm.sh: {wrong or 'each task its numbers'}", flush=True)
    return [row("configs/slurm.sh gives each task its rank", 4, 4 * (not wrong), f"{COMMAND} slurm", "; ".join(wrong))]


def slurm(place: Place) -> list[dict]:
    """The script with real trainers: a task is killed, then the same job again on one node."""
    tried, good, faults = 0, 0, []
    for script in ("train_sft", "train_grpo"):
        still = {"lora_dropout": 0}  # its masks are a rank's own
        whole, folder = one_launcher(place, script, 2, by_deepspeed=False, **still), place.new(script)
        command = ["bash", str(ROOT / "configs/slurm.sh"), f"{script}.py"]
        command += words(place.flags(script, folder, **MORE | still))
        codes = []
        for nodes in (2, 1):
            with folder.with_suffix(".log").open("a") as log:
                env = slurm_environment(place, nodes, 1)
                run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log, start_new_session=True)
            if nodes == 2:
                until_steps(folder, 3, lambda run=run: run.poll() is None)
                commands = {p: Path(f"/proc/{p}/cmdline").read_bytes() for p in left_behind(run.pid)}
                ranks = [pid for pid, words in commands.items() if f"{script}.py".encode() in words and b"-u" in words]
                os.kill(max(ranks), signal.SIGKILL)
            codes.append(run.wait(2 * MINUTE))
        wrong = [f"exit codes {codes}"] * (codes != [128 + signal.SIGKILL, 0])
        wrong += ["no name"] * ("ended before the others" not in folder.with_suffix(".log").read_text())
        pairs = zip(losses(folder, "loss"), losses(whole, "loss"), strict=False)
        gap = max((abs(a - b) for (a,), (b,) in pairs), default=1)
        wrong += [f"losses {gap:.0e} apart"] * (gap > 1e-4 or len(losses(folder, "loss")) != MORE["max_steps"])
        wrong += ["other completions"] * (order_of_prompts(folder) != order_of_prompts(whole))
        tried, good, faults = tried + 1, good + (not wrong), faults + wrong
    print(f"  slurm: {good} of {tried}; {faults or 'equal'}", flush=True)
    told = "2 nodes x 1 task by stand-ins for srun and scontrol, a task killed with SIGKILL; again on 1 node: losses "
    promise = "configs/slurm.sh: a killed task ends the job by name; the same job goes on with fewer nodes"
    return [row(promise, tried, good, f"{COMMAND} slurm", "; ".join([*faults[:3], told + "within 1e-4"]))]


def parts(few: bool) -> dict:
    """For tests/chaos.py: what each --only runs."""
    cases = [  # trainer, ranks a machine, which machine is killed, what is resumed on
        ("train_sft", 1, 0, "launchers"), ("train_sft", 2, 1, "two machines"),
        ("train_grpo", 1, 1, "one rank"), ("train_grpo", 2, 0, "launchers"),
    ]  # fmt: skip
    return {
        "machines": lambda place: lost_machines(place, [("train_sft", 1, 1, "two machines")] if few else cases),
        "stopped": lambda place: stopped(place, [1] if few else [1, 0, 2], 2.0 if few else None),
        "patient": lambda place: patient(place, 2.0 if few else None),
        "odds": lambda place: at_odds(place, few),
        **({} if few else {"cable": cable}),
        "slurm": lambda place: slurm_script(place) if few else slurm_script(place) + slurm(place),
    }
