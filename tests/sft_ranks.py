"""train_sft.py on 1, 2 and 4 CPU ranks, with a slow rank: run by test_sft_ranks.py, in a process that imports
everything once.

    python tests/sft_ranks.py BASE OUT  BASE: tiny/ and data/mixed.json; OUT/NAME/ are the runs, OUT/NAME.RANK what each
                                        rank trained on: a line a step, a list a pass of (sample, has a clip)
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

from warm import start  # it sets the environment, and the paths

import train_sft

COMMON = {"eval_data_path": "none", "max_steps": 4, "save_steps": 1, "save_total_limit": "none", "logging_steps": 1}
COMMON |= {"nframes": 4, "dataloader_num_workers": 0, "learning_rate": 1e-3, "lora_rank": 4}
COMMON["seed"] = 3  # 1, 3 and 0 samples without a clip in the first three steps
SLOW = 0.15  # seconds that one rank sleeps in each pass
# samples a micro-batch and micro-batches of each number of ranks: 8 samples a step
SPLIT = {1: (8, 1), 2: (1, 4), 4: (1, 2)}


def note_samples(path):
    """Write down what this rank trains on."""
    update = train_sft.update

    def noting(engine, micro_batches, *rest):
        with path.open("a") as file:
            file.write(json.dumps([[(n, not n.startswith("text")) for n in m.names] for m in micro_batches]) + "\n")
        return update(engine, micro_batches, *rest)

    train_sft.update = noting


def be_slow():
    loss = train_sft.micro_loss

    def slow(*args):
        time.sleep(SLOW)
        return loss(*args)

    train_sft.micro_loss = slow


def lose_answers():
    """In the second step no rank finds an answer token."""
    count, steps = train_sft.count, []

    def counting(micro_batches):
        steps.append(1)
        answers, tokens = count(micro_batches)
        return (0 if len(steps) == 2 else answers), tokens

    train_sft.count = counting


def launch(base, out, name, world, act=lambda rank: None, **more):
    """One run, its ranks side by side; prints the log where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    size, accumulation = SPLIT[world]
    flags = COMMON | {"model_id": base / "tiny", "data_path": base / "data/mixed.json", "output_dir": out / name}
    flags |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation} | more
    log, lives = out / f"{name}.log", []
    for rank in range(world):
        env = {k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        first = lambda rank=rank: (note_samples(out / f"{name}.{rank}"), act(rank))
        lives.append(start("train_sft", flags, log, env=env, first=first))
    codes = [life.wait(200) for life in lives]
    assert not any(codes), f"{name}: {codes}\n{log.read_text()[-3000:]}"


def main(base, out):
    os.environ["OMP_NUM_THREADS"] = "1"
    for packing, tokens in (("plain", "none"), ("packed", 120)):
        for world in SPLIT:
            launch(base, out, f"{packing}{world}", world, pack_tokens=tokens)
    launch(base, out, "slow", 2, lambda rank: rank and be_slow(), pack_tokens="none", max_steps=3)
    launch(base, out, "lost", 2, lambda rank: lose_answers(), pack_tokens="none", max_steps=3)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
