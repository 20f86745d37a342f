"""How fast the vision tower is: forward, and forward + backward of its adapters, of 1 and 8 clips, beside its floor.

    python bench/vision.py                             # 3B shape on a GPU, the embedded model's on a CPU
    python bench/vision.py --peer                      # transformers' tower (+ PEFT) on the same clips in the same run
    python bench/vision.py --work own --frames 32 --size 448x448 --batch 4

Ours begins with uint8 patches, which it normalises; the peer gets them normalised. tokens/s counts merged tokens. The
floor is the arithmetic with frozen weights at the measured matrix rate. The last line is one JSON object.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from workloads import NAMED, Bench, arguments, chosen, peft_model, prompt_batch

import lora
from bench.flops import vision_flops
from config import SFT
from model.qwen import normalise_patches

PEER = "transformers + PEFT"


def sizes(args):
    """(name, workload, clips) of each row."""
    for name, work in chosen(args):
        for clips in [args.batch] if name not in NAMED and args.batch else [1, 8]:
            yield f"{name} {clips} clip{'s' * (clips > 1)}", work, clips


def ours(bench, packed):
    """-> (forward, forward + backward)"""
    tower, recompute = bench.model.visual, bench.args.recompute

    def forward():
        with torch.no_grad():
            tower(packed.patches, packed.grid_thw)

    def both():
        tower(packed.patches, packed.grid_thw, recompute=recompute).sum().backward()
        bench.model.zero_grad()

    return forward, both


def theirs(bench, peer, packed):
    tower = peer.get_base_model().model.visual
    pixels, grids = normalise_patches(packed.patches, bench.dtype), torch.tensor(packed.grid_thw, device=bench.device)

    def forward():
        with torch.no_grad():
            tower(pixels, grid_thw=grids)

    def both():
        tower(pixels, grid_thw=grids).pooler_output.sum().backward()
        peer.zero_grad()

    return forward, both


def measure(bench, with_ours, peer):
    for name, work, clips in sizes(bench.args):
        packed = prompt_batch(bench.config, work, clips).to(bench.device)
        makers = {"ours": ours(bench, packed)} if with_ours else {}
        makers |= {PEER: theirs(bench, peer, packed)} if peer else {}
        passes = {"forward": 1, "both ways": 3 if bench.args.recompute else 2}
        for i, (way, count) in enumerate(passes.items()):
            contestants = {who: functions[i] for who, functions in makers.items()}
            flops = count * clips * vision_flops(bench.config, work.grid)
            bench.measure(f"{name}, {way}", contestants, clips * work.video_tokens, flops)


def main():
    bench = Bench("vision", arguments(__doc__).parse_args())
    cfg = bench.lora(SFT)
    peer = peft_model(bench.model, cfg, bench.args.recompute) if bench.args.peer else None
    if peer and bench.cuda:  # alone, so that memory is each one's own
        measure(bench, False, peer)
        peer = None
    lora.inject(bench.model, cfg)
    bench.model.train()
    measure(bench, True, peer)
    bench.close()


if __name__ == "__main__":
    main()
