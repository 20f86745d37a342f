"""How fast completions are sampled: first token of a group, decoding step, a whole rollout; beside their floors.

    python bench/rollout.py                          # 3B shape on a GPU, the embedded model's on a CPU
    python bench/rollout.py --prompts 8 --group 8 --work own --completion 512 --frames 32 --size 448x448
    python bench/rollout.py --peer                   # transformers' generate on the same work in the same run

The model carries adapters, as it does in GRPO; what sampling does about them is inside the times. No row ends early.
The floor of a step is the bytes at the measured copy rate (every weight once, each prompt's cache once, each row's own
once), that of the first token the arithmetic at the matrix rate. A step's time is what the second half of a rollout
takes, by the token. The last line is one JSON object.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from workloads import (
    Bench,
    arguments,
    chosen,
    forward_flops,
    peer_inputs,
    peer_model,
    prompt_batch,
    step_bytes,
    sync,
    timed,
)

import lora
from config import GRPO
from model.decode import Sampling, generate

PEER = "transformers"


def ours(bench, work, N):
    prompts = prompt_batch(bench.config, work, N).to(bench.device)
    return lambda tokens: generate(bench.model, prompts, Sampling(tokens, 1.0), bench.args.group)


def theirs(bench, peer, work, N):
    """transformers' generate: G copies of every prompt, as its num_return_sequences makes them."""
    inputs = peer_inputs(bench.config, prompt_batch(bench.config, work, N).to(bench.device), N, bench.dtype)
    inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"].to(bench.device)
    draw = dict(do_sample=True, temperature=1.0, top_k=0, num_return_sequences=bench.args.group, pad_token_id=0)
    draw["bad_words_ids"] = [[i] for i in bench.config.vision_token_ids]

    def rollout(tokens):
        with torch.no_grad():
            peer.generate(**inputs, **draw, max_new_tokens=tokens, min_new_tokens=tokens, eos_token_id=0)

    return rollout


def prefill_alone(bench, work, N):
    """Seconds from clip and prompt to first logits on a GPU, the sampling copy made before."""
    from model.fast.decoder import GroupCache, SamplingCopy

    prompts = prompt_batch(bench.config, work, N).to(bench.device)
    with torch.no_grad():
        made = SamplingCopy(bench.model)
        cache = GroupCache(bench.model, prompts.segments.q_lengths, bench.args.group, 128)
        again = lambda: made.prefill(bench.model, prompts, bench.model.embed(prompts), cache)
        return timed(again, bench.device, bench.args.repeats)


def measure(bench, makers, name, work, N):
    """Rows of one workload and one number of prompts. makers: {who: function of (work, N)}."""
    G, T = bench.args.group, work.completion
    name = f"{name} {N} x {G}"
    rollouts = {who: make(work, N) for who, make in makers.items()}
    prefill = N * forward_flops(bench.config, replace(work, completion=0), head_tokens=1)
    found = {}
    for what, tokens in (("first token", 1), ("half", T // 2), ("rollout", T)):
        moved = tokens * step_bytes(bench.model, work, N, G, 0.5 * tokens)
        floor = {"floor": prefill / bench.matrix + (tokens > 1) * moved / bench.copy}
        calls = {who: partial(rollout, tokens) for who, rollout in rollouts.items()}
        found[what] = bench.measure(f"{name} {what}", calls, N * G * tokens, **floor)
    moved = step_bytes(bench.model, work, N, G, 0.75 * T)
    for who in rollouts if T > 1 else ():
        half, whole = found["half"][who], found["rollout"][who]
        if "seconds" in half and "seconds" in whole:
            spread = [(whole[key] - half[key]) / (T - T // 2) for key in ("seconds", "least", "most")]
            bench.add(f"{name} step", who, spread, N * G, floor=moved / bench.copy, moved=moved)
    if bench.cuda and "ours" in makers:
        bench.add(f"{name} prefill alone", "ours", prefill_alone(bench, work, N), N, prefill)


def profile(bench, work, N):
    """Where a step's time goes: mean microseconds of each kernel and how often it runs."""
    from torch.profiler import ProfilerActivity

    kind = ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU
    rollout = ours(bench, work, N)
    with torch.profiler.profile(activities=[kind]) as prof:
        rollout(3)
        sync(bench.device)
    order = f"self_{'cuda' if bench.cuda else 'cpu'}_time_total"
    print(prof.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


def main():
    parser = arguments(__doc__)
    told = "prompts at once, a set of rows for each; 1 and 8, on a CPU 1 and the 48 of a GRPO step"
    parser.add_argument("--prompts", type=int, nargs="+", help=told)
    parser.add_argument("--profile", action="store_true", help="time by kernel of one step")
    args = parser.parse_args()
    usual = (["R"], [1, 8]) if torch.cuda.is_available() else (["E"], [1, 48])
    sized = any(x is not None for x in (args.frames, args.size, args.prompt, args.completion))
    args.work = args.work or (["own"] if sized else usual[0])
    bench = Bench("rollout", args)
    cfg = bench.lora(GRPO)
    makers = {}
    if args.peer:
        peer = peer_model(bench.model).eval()  # as if its adapters had been merged before
        makers[PEER] = partial(theirs, bench, peer)
    lora.inject(bench.model, cfg)
    bench.model.eval()
    makers = {"ours": partial(ours, bench)} | makers
    for name, work in chosen(args):
        for N in args.prompts or usual[1]:
            measure(bench, makers, name, work, N)
            if args.profile:
                profile(bench, work, N)
    bench.close()


if __name__ == "__main__":
    main()
