"""How fast completions are sampled: prefill of a group, one decoding step, a whole rollout; beside their floors.

    python bench/rollout.py                          # 3B shape, workload R, 1 and 8 prompts x 8, on a GPU
    python bench/rollout.py --prompts 8 --group 8 --completion 512 --frames 32 --size 448x448
    python bench/rollout.py --peer                   # transformers' generate on the same work in the same run

On a CPU: a small shape, generate against transformers'. A floor is what the bytes allow at the measured copy rate (a
step reads every weight once, each prompt's cache once, each row's cache once) or, in prefill, what the arithmetic
allows at the measured matrix rate. The last line is one JSON object.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from workloads import R, Workload, ceilings, config_dict, linear_flops, prompt_batch, sync, timed

from model.decode import Sampling, generate
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL

SMALL = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=8192, vision_start_token_id=8000, vision_end_token_id=8001, image_token_id=8003,
             video_token_id=8004, bos_token_id=1, eos_token_id=2,
             rope_scaling=dict(type="mrope", mrope_section=[8, 12, 12]))  # fmt: skip


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="3B", help="3B, 7B, 32B, 72B; small, which is what a CPU runs")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8], help="prompts at once; one row each")
    parser.add_argument("--group", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--rows", type=int, help="completions in all, one prompt: --prompts 1 --group ROWS")
    parser.add_argument("--prompt", type=int, default=R.prompt, help="text tokens of a prompt")
    parser.add_argument("--completion", type=int, default=R.completion, help="tokens of a completion")
    parser.add_argument("--frames", type=int, default=2 * R.grid[0])
    parser.add_argument("--size", default=f"{14 * R.grid[1]}x{14 * R.grid[2]}", help="height x width in pixels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="transformers' generate too")
    parser.add_argument("--profile", action="store_true", help="time by kernel of one step")
    args = parser.parse_args()
    if args.rows:
        args.prompts, args.group = [1], args.rows
    return args


def shape(name: str) -> ModelConfig:
    raw = config_dict("3B" if name == "small" else name)
    if name == "small":
        raw |= SMALL
        raw["vision_config"] |= dict(depth=4, hidden_size=160, num_heads=4, intermediate_size=428, out_hidden_size=256,
                                     fullatt_block_indexes=[1, 3])  # fmt: skip
    return ModelConfig.from_dict(raw)


def step_bytes(model, work: Workload, N: int, G: int, mean_own: float) -> float:
    """Fewest bytes of a decoding step: layers and head once, a prompt's keys and values once, a row's own once."""
    config, size = model.config, model.head_weight.element_size()
    weights = sum(p.numel() for p in model.model.layers.parameters()) + model.head_weight.numel()
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return size * (weights + token * N * (work.prompt_tokens + G * mean_own))


def measure(model, work: Workload, N: int, args, matrix: float, copy: float) -> dict:
    """Times of one size. A step's time is what a longer rollout costs more, by the token; the rest is prefill and
    starting up."""
    device, G, T = model.head_weight.device, args.group, work.completion
    prompts = prompt_batch(model.config, work, N).to(device)

    def rollout(tokens):
        return generate(model, prompts, Sampling(tokens, 1.0), G)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    short, whole = (timed(lambda n=n: rollout(n), device, args.repeats) for n in (T // 2, T))
    first = timed(lambda: rollout(1), device, args.repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    step = (whole[0] - short[0]) / (T - T // 2)
    moved = step_bytes(model, work, N, G, 0.75 * T)  # the steps timed are those of the second half
    flops = N * linear_flops(model.config, replace(work, completion=0), 0, False) / 2  # of its two passes, one
    flops += 2 * N * model.head_weight.numel()
    all_bytes = T * step_bytes(model, work, N, G, 0.5 * T)
    return {
        "prompts": N, "group": G, "rows": N * G, "context": work.prompt_tokens + T,
        "first_token_s": first[0], "first_token_floor_s": flops / matrix, "first_token_spread": first[1:],
        "step_ms": step * 1e3, "step_floor_ms": moved / copy * 1e3, "step_gb_s": moved / step / 1e9,
        "copy_share": moved / step / copy, "rollout_s": whole[0], "rollout_spread": whole[1:],
        "rollout_floor_s": flops / matrix + all_bytes / copy, "tokens_s": N * G * T / whole[0], "peak_gib": peak,
    }  # fmt: skip


def prefill_alone(model, work: Workload, N: int, args) -> tuple[float, float, float]:
    """Clip and prompt to first logits, the sampling copy made before: what a group's prefill costs inside a rollout."""
    from model.fast_decode import GroupCache, SamplingCopy

    prompts = prompt_batch(model.config, work, N).to(model.head_weight.device)
    with torch.no_grad():
        made = SamplingCopy(model)
        cache = GroupCache(model, prompts.segments.q_lengths, args.group, 128)
        again = lambda: made.prefill(model, prompts, model.embed(prompts), cache)
        return timed(again, prompts.input_ids.device, args.repeats)


def peer_model(model):
    """transformers' model with the same weights (shared memory where it takes them as they are)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        peer = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**model.config.raw))
    state = {}
    for name, tensor in model.state_dict().items():
        vision = name.startswith("visual")
        state["model." + name if vision else name.replace("model.", "model.language_model.", 1)] = tensor
    state.setdefault("lm_head.weight", model.head_weight)
    peer.load_state_dict(state, strict=False, assign=True)
    for module in peer.modules():  # angles are buffers that no checkpoint holds: made on meta, so made again
        if hasattr(module, "inv_freq"):
            module.inv_freq = type(module)(module.config).inv_freq.to(model.head_weight.device)
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = module.inv_freq
    return peer.eval()


def measure_peer(peer, model, work: Workload, N: int, args) -> dict:
    """transformers' generate: G copies of every prompt, as its num_return_sequences makes them."""
    from model.vision import normalise_patches

    device, dtype, T, G = model.head_weight.device, model.head_weight.dtype, work.completion, args.group
    prompts = prompt_batch(model.config, work, N).to(device)
    ids = prompts.input_ids.view(N, -1)
    grids = torch.tensor(prompts.grid_thw, device=device)
    inputs = dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), second_per_grid_ts=torch.ones(N, device=device),
        mm_token_type_ids=2 * (ids == model.config.video_token_id).int(), video_grid_thw=grids,
        pixel_values_videos=normalise_patches(prompts.patches, dtype),
    )  # fmt: skip
    banned = [[i] for i in model.config.vision_token_ids]

    def rollout(tokens):
        with torch.no_grad():
            peer.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, temperature=1.0,
                          top_k=0, num_return_sequences=G, pad_token_id=0, bad_words_ids=banned)  # fmt: skip

    few = max(2, T // 8)  # its steps are slow, and all alike
    first, short = (timed(lambda n=n: rollout(n), device, 2, 1)[0] for n in (1, few))
    step = (short - first) / (few - 1)
    return {"peer_first_token_s": first, "peer_step_ms": step * 1e3, "peer_rollout_s": first + step * (T - 1)}


def profile_step(model, work: Workload, N: int, args) -> None:
    """Where a step's time goes: mean microseconds of each kernel and how often it runs."""
    from torch.profiler import ProfilerActivity, profile

    prompts = prompt_batch(model.config, work, N).to(model.head_weight.device)
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        generate(model, prompts, Sampling(3, 1.0), args.group)
        sync(prompts.input_ids.device)
    print(prof.key_averages().table(sort_by="self_cuda_time_total", row_limit=20, max_name_column_width=50))


def row(r: dict) -> str:
    """A row of the table."""

    def against(value, floor, digits):
        return f"{value:.{digits}f} ({floor:.{digits}f}, {value / floor:.2f})"

    low, high = r["rollout_spread"]
    cells = [
        f"{r['prompts']} x {r['group']}", against(r["first_token_s"], r["first_token_floor_s"], 3),
        against(r["step_ms"], r["step_floor_ms"], 2), f"{r['step_gb_s']:.0f} ({r['copy_share']:.0%})",
        f"{low:.3f}-{high:.3f}, " + against(r["rollout_s"], r["rollout_floor_s"], 3),
        f"{r['tokens_s']:.0f}", f"{r['peak_gib']:.1f}",
    ]  # fmt: skip
    return " | ".join(cells)


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        args.model, args.prompts = "small", args.prompts[:1]
    h, w = map(int, args.size.split("x"))
    work = Workload((args.frames // 2, h // 14, w // 14), args.prompt, args.completion)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = Qwen2_5_VL.random(shape(args.model), device, dtype).eval().requires_grad_(False)
    matrix, copy = ceilings(device)
    if device == "cuda":
        torch.cuda.empty_cache()
    print(f"{args.model} on {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}: "
          f"{matrix / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s; {work.prompt_tokens} prompt tokens")  # fmt: skip
    print("prompts x group | first token s (floor, ratio) | step ms (floor, ratio) | GB/s (share of copy) | "
          "rollout s: min-max, median (floor, ratio) | tokens/s | peak GiB")  # fmt: skip
    peer = peer_model(model) if args.peer else None
    results = []
    for N in args.prompts:
        r = measure(model, work, N, args, matrix, copy)
        print(row(r), flush=True)
        if device == "cuda":
            r["prefill_s"], *r["prefill_spread"] = prefill_alone(model, work, N, args)
            print("    prefill alone {:.4f} s ({:.4f}-{:.4f})".format(r["prefill_s"], *r["prefill_spread"]))
        if peer is not None:
            r |= measure_peer(peer, model, work, N, args)
            times = f"first token {r['peer_first_token_s']:.3f} s, step {r['peer_step_ms']:.1f} ms"
            ratio = r["peer_rollout_s"] / r["rollout_s"]
            print(f"    transformers: {times}, rollout {r['peer_rollout_s']:.2f} s: {ratio:.1f} x ours")
        if args.profile:
            profile_step(model, work, N, args)
        results.append(r)
    summary = {"bench": "rollout", "model": args.model, "device": device, "matrix": matrix, "copy": copy}
    print(json.dumps(summary | {"results": results}))


if __name__ == "__main__":
    main()
