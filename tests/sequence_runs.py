"""Whole runs of train_sft.py whose ranks share batches, forked from one warm process: started by test_sequence.py.

    python tests/sequence_runs.py FOLDER '{"flag": value, …}'

FOLDER gets: one (a rank alone), square (4 ranks, two groups of 2), parted (a group of 2 whose weights are in parts),
killed (a group of 2, one of them killed in step 4, then resumed), apart and alone (killed's checkpoint-2, gone on from
by 2 ranks that share nothing and by one), and joined (one's checkpoint-2, gone on from by square's ranks).
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import warm

import train_sft


def run(folder: Path, flags: dict, world: int = 1, first=None, whole: bool = True, **more) -> None:
    """A run on so many ranks, as a launcher starts them. whole: it ends well."""
    shared = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": warm.free_port()}
    log = folder.with_suffix(".log")
    lives = []
    for rank in range(world):
        env = {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        lives.append(warm.start("train_sft", flags | {"output_dir": folder} | more, log, None, env, first))
    try:
        code = lives[0].wait(300)
        assert (code == 0) == whole, f"{folder.name}: exit code {code}\n{log.read_text()[-3000:]}"
    finally:
        for life in lives:
            life.kill()
            life.wait()


def killed_in_step_4() -> None:
    """In the child: SIGKILL for the second rank of the group; the first one finds its exchange broken and ends."""
    update = train_sft.update

    def die(engine, micro_batches, loss_of, *args, **kwargs):
        die.calls += 1
        if die.calls == 4 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return update(engine, micro_batches, loss_of, *args, **kwargs)

    die.calls = 0
    train_sft.update = die


def go_on(source: Path, name: str) -> Path:
    """A copy of a run as it was when checkpoint-2 was its last."""
    folder = source.with_name(name)
    shutil.copytree(source, folder)
    for later in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(folder / later, ignore_errors=True)
    return folder


def main(folder: Path, flags: dict) -> None:
    val = Path(flags["data_path"]).with_name("val.json")
    pair = {"per_device_train_batch_size": 8, "sequence_parallel": 2}
    square = {"per_device_train_batch_size": 4, "sequence_parallel": 2}
    run(folder / "one", flags, per_device_train_batch_size=8)
    evaluated = {"eval_data_path": val, "eval_steps": 3, "eval_controls": 0, "max_new_tokens": 4}
    run(folder / "square", flags, 4, **square, **evaluated)
    run(folder / "parted", flags, 2, **pair, partition_weights=True, gradient_checkpointing=True)
    run(folder / "killed", flags, 2, killed_in_step_4, whole=False, **pair)
    apart, alone = go_on(folder / "killed", "apart"), go_on(folder / "killed", "alone")
    run(folder / "killed", flags, 2, **pair, resume=True)
    run(apart, flags, 2, per_device_train_batch_size=8, resume=True)
    run(alone, flags, per_device_train_batch_size=8, resume=True)
    run(go_on(folder / "one", "joined"), flags, 4, **square, resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
