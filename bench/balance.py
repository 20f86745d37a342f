"""How evenly the samples of a step are dealt to ranks: the share of the time that cards wait, by the cost model.

    python bench/balance.py                   2, 4 and 8 ranks, packed and not, at the 3B shape
    python bench/balance.py --ranks 64 --batch 4 --pack_tokens 16384

The data set is drawn: clips of 2 to 64 frames, short ones more often, in five sizes, an eighth of text only, answers
from a letter to a long chain of thought. "As they come" is an even number of samples a rank; "dealt" is what
train_sft.py does. A pass is as long as its slowest rank's, since ZeRO-2 reduces in every pass; "met once" is what the
same deal would wait if ranks met only at the end of a step; "at best" is what any deal waits, for a step is never
shorter than its longest sample. No GPU, no clips, seconds.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from workloads import model_config

from bench.flops import training_flops
from dataset.batch import Loader

SIZES = ((10, 18), (18, 10), (16, 16), (20, 36), (18, 30))  # patches of a frame: height, width


class Drawn:
    """Sizes of samples, for a Loader to plan with: (grids, tokens, trained tokens) of each."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        frames = np.clip(np.exp(rng.normal(np.log(12), 0.8, count)), 2, 64).astype(int) // 2
        answers = np.clip(np.exp(rng.normal(3, 1.5, count)), 2, 600).astype(int)
        self.shapes = []
        for i in range(count):
            h, w = SIZES[rng.integers(len(SIZES))]
            grids = [] if rng.random() < 1 / 8 else [(int(frames[i]), h, w)]
            vision = sum(t * h * w // 4 for t, h, w in grids)
            self.shapes.append((grids, vision + 60 + int(answers[i]), int(answers[i])))

    def shape(self, record, answer):
        return self.shapes[record]


def waits(drawn, cost, ranks, batch, accumulation, pack_tokens, dealt, steps):
    """Shares of the time waited where ranks meet in every pass, where they meet once a step, at best; passes a step."""
    args = SimpleNamespace(
        seed=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, pack_tokens=pack_tokens,
        dataloader_num_workers=0, max_skip_share=0.05,
    )  # fmt: skip
    loaders = [
        Loader(range(len(drawn.shapes)), drawn, args, rank=rank, world_size=ranks, cost=cost if dealt else None)
        for rank in range(ranks)
    ]
    each = once = best = busy = passes = 0
    for step in range(min(steps, loaders[0].steps_per_epoch)):
        plans = [loader.plan(step, map)[0] for loader in loaders]
        longest = max(cost(*drawn.shapes[i]) for i in loaders[0].batch(step))
        times = np.array([[sum(cost(*drawn.shapes[i]) for i in members) for members in plan] for plan in plans])
        each, once = each + times.max(0).sum(), once + times.sum(1).max()  # times: (ranks, passes)
        mean = times.sum() / ranks
        busy, best, passes = busy + mean, best + max(mean, longest), passes + times.shape[1]
    return 1 - busy / each, 1 - busy / once, 1 - busy / best, passes / (step + 1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, default=2, help="samples of a micro-batch, without packing")
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--pack_tokens", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    drawn, cost = Drawn(args.samples), partial(training_flops, model_config("3B"))
    print(f"{args.batch} x {args.accumulation} samples a rank and step; share of the time that a card waits\n")
    print("ranks  micro-batches      as they come   dealt   met once   at best   passes")
    rows = []
    for ranks in args.ranks:
        for pack in (None, args.pack_tokens):
            at = (drawn, cost, ranks, args.batch, args.accumulation, pack)
            before, after = waits(*at, False, args.steps), waits(*at, True, args.steps)
            name = f"{args.batch} samples" if pack is None else f"{pack} tokens"
            told = f"{before[0]:12.1%} {after[0]:7.1%} {after[1]:10.1%} {after[2]:9.1%} {after[3]:8.1f}"
            print(f"{ranks:5}  {name:15}  {told}")
            shares = dict(zip(("dealt", "once", "best"), after, strict=False))
            rows.append({"ranks": ranks, "pack_tokens": pack, "as_they_come": before[0]} | shares)
    print(json.dumps({"bench": "balance", "rows": rows}))


if __name__ == "__main__":
    main()
