"""Parted weights against whole ones on 1, 2 and 4 ranks of this machine; test_partition.py runs it and reads its lines.

    python tests/parted.py FOLDER      one JSON object a line: {"what": …, "wrong": [what differs]}

The ranks are forked from one warm process; CPU, fp32, gloo. Gathering is copying, so everything is equal bit for bit.
"""

import json
import os
import sys
import time
from pathlib import Path

import place
from conftest import Sequence, config_dict, pack_sequences
from place import Place, differences
from warm import Life

import lora
from config import SFT
from model.partition import Share
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL, not_finite
from training.engine import leave_processes, start_processes
from training.memory import Memory

import torch  # isort: skip

place.TYPED += ("partition_weights", "offload_weights")
PARTED = {"partition_weights": True}
RUNS = (  # (script, ranks, flags)
    ("train_sft", 2, PARTED), ("train_sft", 4, PARTED), ("train_sft", 1, PARTED | {"offload_weights": True}),
    ("train_grpo", 2, PARTED), ("train_grpo", 4, PARTED), ("train_grpo", 1, PARTED | {"offload_weights": True}),
)  # fmt: skip


def tell(what: str, wrong: list[str]) -> None:
    print(json.dumps({"what": what, "wrong": wrong}), flush=True)


def forked(function, world: int, port: int) -> list[int]:
    """Exit codes of function(rank) on so many ranks."""
    lives = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world}
            os.environ.update({k: str(v) for k, v in names.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            code = 1
            try:
                function(rank)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        lives.append(Life(pid))
    return [life.wait(120) for life in lives]


def passes(model, count: int) -> list[torch.Tensor]:
    """Hidden states and adapters' gradients of `count` training passes, the second of text alone; and of one without
    gradients, as an evaluation makes them."""
    torch.manual_seed(0)
    lora.inject(model, SFT())
    model.gradient_checkpointing = True
    trained = [p for _, p in lora.trainable_parameters(model)]
    with torch.no_grad():
        for p in trained:
            p.add_(0.02 * torch.randn(p.shape))
    found, clip = [], [5, ("video", 2, 4, 4, 1.0), 20]
    for number in range(count):
        parts = [30] if number == 1 else clip
        hidden = model.train()(pack_sequences([Sequence(model.config, parts, number)]))
        found += [hidden.detach(), *torch.autograd.grad((hidden**2).sum(), trained, allow_unused=number == 1)]
    with torch.no_grad():
        found.append(model.eval()(pack_sequences([Sequence(model.config, clip, 9)])))
    return found


def compare(rank: int, folder: Path, shape: str) -> None:
    """Rank 0 makes one pass, rank 1 two and so on: nobody waits for anybody."""
    start_processes()
    share = Share.here()
    config = ModelConfig.from_dict(config_dict(shape))
    whole = passes(Qwen2_5_VL.from_pretrained(folder), rank + 1)
    for model in (Qwen2_5_VL.from_pretrained(folder, share=share), Qwen2_5_VL.random(config, seed=3, share=share)):
        mine = passes(model, rank + 1)
        same = [a is b is None or torch.equal(a, b) for a, b in zip(mine, whole, strict=True)]
        assert all(same), f"rank {rank}: {same.count(False)} of {len(same)} differ"
        held = {p.data_ptr(): p.nbytes for p in model.parameters() if p not in model.partition.parted}
        flags = {"partition_weights": True, "gradient_checkpointing": True}
        static = Memory(model, SFT(**flags), 4, len(share.ranks), cuda=False).static()
        buffers = sum(buffer.flat.nbytes for buffer in model.partition.buffers)
        found = sum(held.values()) + model.partition.part.nbytes + buffers
        assert found == sum(static.values()) - static["optimizer states"], (found, static)
        sizes = {len(part) for part in model.partition.parts}
        assert len(model.partition.parts) == len(share.ranks) and sizes == {len(model.partition.part)}
    leave_processes()


def forward_and_gradients(folder: Path) -> None:
    for world, shape, port in ((2, "untied", 29701), (4, "grouped", 29702)):
        model = Qwen2_5_VL.random(ModelConfig.from_dict(config_dict(shape)), seed=3)
        model.save_pretrained(folder / shape)
        codes = forked(lambda rank, shape=shape: compare(rank, folder / shape, shape), world, port)
        tell(f"passes on {world} ranks", [f"rank {r}: exit code {code}" for r, code in enumerate(codes) if code])


def read(name: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def load(rank: int, folder: Path, whole: int, world: int) -> None:
    """The most that loading takes in this process, counted by the kernel: its part and the largest file, not the
    model."""
    start_processes()
    share = Share.here()
    Qwen2_5_VL.from_pretrained("assets/tiny", share=share)  # what is made once
    grown, model = peak(lambda: Qwen2_5_VL.from_pretrained(folder, share=share))
    part = model.partition.part.nbytes
    assert part < 1.01 * whole / world, (part, whole)
    assert 0.9 * part < grown < 0.6 * whole, f"loading took {grown >> 20} MiB for a model of {whole >> 20}"
    torch.distributed.barrier()
    if rank == 0:  # counted in this way the whole model is found where it is (on a CPU it is read when it is used)
        grown, _ = peak(lambda: not_finite(Qwen2_5_VL.from_pretrained(folder)))
        assert grown > 0.9 * whole, f"{grown >> 20} MiB for a model of {whole >> 20}"
    leave_processes()


def peak(function) -> tuple[int, object]:
    """(bytes that it takes at most, counted from here on (proc(5)), its result)."""
    Path("/proc/self/clear_refs").write_text("5")
    before, made = read("VmRSS"), function()
    return read("VmHWM") - before, made


def partitioned_loading(folder: Path) -> None:
    raw = config_dict("untied") | dict(hidden_size=512, intermediate_size=4096, num_hidden_layers=12)
    raw["num_attention_heads"] = raw["num_key_value_heads"] = 16
    raw["vision_config"] |= dict(out_hidden_size=512)
    raw["rope_scaling"]["mrope_section"] = [4, 6, 6]
    model = Qwen2_5_VL.random(ModelConfig.from_dict(raw))
    whole = sum(p.nbytes for p in model.parameters())
    import model.qwen2_5_vl as files

    files.SHARD_BYTES = 24 << 20  # files are mapped while they are read, and the kernel counts that too
    model.save_pretrained(folder / "large")
    del model
    codes = forked(lambda rank: load(rank, folder / "large", whole, 4), 4, 29703)
    tell("loading", [f"rank {r}: exit code {code}" for r, code in enumerate(codes) if code])


def runs(folder: Path) -> None:
    scene = Place(folder, 0)
    common = {"max_steps": 3, "save_steps": 3, "eval_steps": 3, "eval_controls": 0, "gradient_checkpointing": True}
    for number, (script, world, flags) in enumerate(RUNS):
        folders = []
        for more in ({}, flags):
            folders.append(scene.new(script))
            port = 29710 + 2 * number + bool(more)
            lives = scene.ranks(script, folders[-1], world, port, **common, **more)
            codes = [life.wait(120) for life in lives]
            assert not any(codes), folders[-1].with_suffix(".log").read_text()[-3000:]
        log = folders[1].with_suffix(".log").read_text()
        wrong = differences(*folders) + ["no line tells of parts"] * (f"each of {world} ranks keeps" not in log)
        trained = any(line.get("updated") for line in place.lines(folders[1] / "metrics.jsonl"))
        wrong += ["nothing was trained"] * (not trained)
        tell(f"{script} on {world} ranks{', offloaded' if 'offload_weights' in flags else ''}", wrong)


if __name__ == "__main__":
    began, scratch = time.monotonic(), Path(sys.argv[1])
    torch.set_num_threads(1)
    forward_and_gradients(scratch)
    partitioned_loading(scratch)
    runs(scratch)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
