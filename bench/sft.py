"""How fast a supervised step is: one optimizer step of the trainer, adapters on every linear layer, beside its floor.

    python bench/sft.py                                       # 3B shape on a GPU, the embedded model's on a CPU
    python bench/sft.py --peer                                # transformers + PEFT on the same work in the same run
    python bench/sft.py --work own --frames 32 --size 448x448 --batch 1 --memory_limit_gib 15.5
    python bench/sft.py --work own --frames 64 256 768 --size budget     # long clips, one sample each
    python bench/sft.py --plain                               # torch's AdamW instead of DeepSpeed's ZeRO-2 around it

A step is train_sft.py's: batch to the device, forward, loss on the answers, backward, clipping, AdamW. Its batch x
accumulation samples go into as few passes as --pack_tokens allows, as the trainer packs them; the peer makes
`accumulation` passes. The peer's inputs lie on the device already. The floor is the arithmetic with frozen weights at
the measured matrix rate. The last line is one JSON object.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from plot import Panel, draw
from workloads import Bench, arguments, chosen, linear_flops, peer_inputs, peft_model, sft_batch

import lora
from config import SFT
from data import fill_bins
from engine import build_engine, init_distributed, leave_processes, update
from model.packed import IGNORE
from train_sft import micro_loss

PEER = "transformers + PEFT"


def items(args):
    """(name, workload, batch, accumulation) of each row."""
    for name, work in chosen(args):
        if name == "S":
            yield "S 1 x 5", work, 1, 5
            yield "S 5 x 1", work, 5, 1
        else:
            batch = {"E": 32, "R": 8 if torch.cuda.is_available() else 1}.get(name, args.batch or 1)
            yield f"{name} {batch} x 1", work, batch, 1


class Plain:
    """What DeepSpeed's engine does here, by torch alone: adapters and AdamW's moments in the weights' dtype."""

    def __init__(self, model, cfg, device):
        self.module, self.device, self.limit = model.train(), device, cfg.max_grad_norm
        self.params = [p for p in model.parameters() if p.requires_grad]
        betas = (cfg.adam_beta1, cfg.adam_beta2)
        self.optimizer = torch.optim.AdamW(self.params, cfg.learning_rate, betas, cfg.adam_epsilon, fused=True)

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def update(self, micro_batches, loss_of):
        for micro_batch in micro_batches:
            loss_of(micro_batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


def our_step(engine, step, micro_batches):
    """train_sft.py's update; returns the loss. step: engine's update(micro_batches, loss_of)."""
    answers = sum(int((packed.targets != IGNORE).sum()) for packed in micro_batches)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    step(micro_batches, partial(micro_loss, engine, answers, sums))
    return float(sums[0]) / answers


def passes(bench, work, samples):
    """Packed batches of so many samples, cut as the trainer cuts them."""
    tokens = work.prompt_tokens + work.completion
    sizes = [tokens] * samples
    bins = fill_bins(sizes, bench.args.pack_tokens or sum(sizes))
    return [sft_batch(bench.config, work, len(bin), seed) for seed, bin in enumerate(bins)]


def ours(bench, cfg):
    """-> function of an item: (one of our steps, how many passes it makes)."""
    lora.inject(bench.model, cfg)
    if bench.args.plain:
        engine = Plain(bench.model, cfg, bench.device)
        step = engine.update
    else:
        init_distributed()
        engine, *_ = build_engine(bench.model, cfg, bench.device, bench.dtype)
        step = lambda micro_batches, loss_of: update(engine, micro_batches, loss_of, len(micro_batches))

    def make(work, batch, accumulation):
        micro_batches = passes(bench, work, batch * accumulation)
        return partial(our_step, engine, step, micro_batches), len(micro_batches)

    return make


def peers(bench, cfg):
    """-> function of an item: one step of transformers + PEFT. All samples are of one length: nothing is padded."""
    peer = Plain(peft_model(bench.model, cfg, bench.args.recompute), cfg, bench.device)

    def make(work, batch, accumulation):
        inputs = []
        for seed in range(accumulation):
            packed = sft_batch(bench.config, work, batch, seed).to(bench.device)
            inputs.append(peer_inputs(bench.config, packed, batch, bench.dtype) | {"use_cache": False})
            inputs[-1]["labels"] = inputs[-1]["input_ids"].clone()
            inputs[-1]["labels"][:, : work.prompt_tokens] = IGNORE
        return lambda: peer.update(inputs, lambda x: peer(**x).loss / accumulation)

    return make


def measure(bench, make_ours, make_peer):
    for name, work, batch, accumulation in items(bench.args):
        samples, contestants = batch * accumulation, {}
        if make_ours:
            contestants["ours"], count = make_ours(work, batch, accumulation)
        if make_peer:
            contestants[PEER] = make_peer(work, batch, accumulation)
        flops = samples * linear_flops(bench.config, work, work.completion, bench.args.recompute)
        rows = bench.measure(name, contestants, samples * (work.prompt_tokens + work.completion), flops)
        if make_ours:
            rows["ours"]["passes"] = count


def plot(bench, path):
    """Seconds and GiB of our rows over their tokens."""
    rows = [row for row in bench.rows if row["who"] == "ours" and "seconds" in row]
    rows.sort(key=lambda row: row["tokens_s"] * row["seconds"])
    tokens = [row["tokens_s"] * row["seconds"] / 1e3 for row in rows]
    foot = f"thousand tokens: {', '.join(f'{n:.1f}' for n in tokens)}"
    panels = []
    for title, series in (
        ("seconds a step", {"measured": "seconds", "floor": "floor"}),
        ("GiB at the peak", {"allocated": "peak_gib"} if bench.cuda else {}),
    ):
        lines = [(label, tokens, [row[key] for row in rows]) for label, key in series.items()]
        if lines:
            panels.append(Panel(title, lines, 1.1 * max(max(ys) for _, _, ys in lines), foot, ".1f", True))
    draw(path, panels)


def main():
    parser = arguments(__doc__)
    parser.add_argument("--pack_tokens", type=int, help="tokens of a pass at most; 1 = a sample a pass; none = all")
    parser.add_argument("--plot", metavar="FILE.svg", help="draw seconds and memory over tokens")
    parser.add_argument("--plain", action="store_true", help="torch's fused AdamW instead of DeepSpeed's engine")
    bench = Bench("sft", parser.parse_args())
    cfg = bench.lora(SFT)
    make_peer = peers(bench, cfg) if bench.args.peer else None  # it needs the model without our adapters
    if make_peer and bench.cuda:  # alone, and gone before we begin, so that memory is each one's own
        measure(bench, None, make_peer)
        make_peer = None
    measure(bench, ours(bench, cfg), make_peer)
    if bench.args.plot:
        plot(bench, Path(bench.args.plot))
    bench.close()
    if not bench.args.plain:
        leave_processes()


if __name__ == "__main__":
    main()
