"""The released weights, for whoever has them: logits beside transformers, a benchmark before and after SFT, GRPO.

    python bench/real.py --model_id Qwen/Qwen2.5-VL-3B-Instruct --benchmark mvbench DIR --train my/train.json

It runs the scripts as a user types them, prints a markdown table, and on its last line one JSON object. The runs stay
in --output_dir. Here it was tried on random weights only.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import numpy as np
import torch
from learn import run
from peer import transformers_inputs
from transformers import Qwen2_5_VLForConditionalGeneration

from clips import draw_clip, render, write_mp4
from config import SFT
from data import Processor, load_tokenizer, pack
from model.loading import load_model, resolve_folder


@torch.no_grad()
def compare_logits(model_id: str) -> dict:
    """A drawn clip and a question, by our model and by transformers': the largest difference of log-probabilities, and
    the share of tokens at which both rank the same word first. Both get our positions, which follow the released rule;
    transformers' own differ from it by release."""
    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    folder = resolve_folder(model_id)
    model = load_model(folder, device, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(temporary) / "clip.mp4"
        write_mp4(clip, render(draw_clip(np.random.default_rng(0), "Ascending", 224, 30)))
        record = {"video": str(clip), "question": "Which way does the ball move?", "answer": "up"}
        example = Processor(load_tokenizer(folder), model.config, SFT()).encode(record)
    packed = pack([example]).to(device)
    ours = model.logits(packed).float().log_softmax(-1)
    inputs = transformers_inputs(packed, 1, model.config, dtype) | {"position_ids": packed.position_ids[:, None]}
    del model
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    reference = theirs(**inputs).logits[0].float().log_softmax(-1)
    del theirs
    if cuda:
        torch.cuda.empty_cache()  # for the scripts that follow
    same = (ours.argmax(-1) == reference.argmax(-1)).float().mean()
    return {"tokens": len(ours), "largest": float((ours - reference).abs().max()), "same_first": float(same)}


def benchmark(args, *flags) -> dict:
    """Our number and the official scorer's of --questions questions."""
    flags = [*flags, "--model_id", args.model_id, "--max_samples", args.questions, "--controls", "none", "--json"]
    return json.loads(run("infer.py", "--benchmark", *args.benchmark, *flags))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="folder or hub id of released weights")
    parser.add_argument("--benchmark", nargs=2, metavar=("NAME", "DIR"), required=True, help="docs/benchmarks.md")
    parser.add_argument("--train", required=True, help="dataset of SFT and GRPO")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50, help="of SFT and of GRPO")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "real")
    args = parser.parse_args()
    sft, grpo = args.output_dir / "sft", args.output_dir / "grpo"
    train = ["--model_id", args.model_id, "--data_path", args.train, "--eval_data_path", "none"]
    train += ["--max_steps", args.steps, "--overwrite"]
    logits = compare_logits(args.model_id)
    before = benchmark(args, "--model_ckpt", "none")
    run("train_sft.py", *train, "--output_dir", sft)
    after = benchmark(args, "--model_ckpt", sft)
    run("train_grpo.py", *train, "--model_ckpt", sft, "--output_dir", grpo)
    steps = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward"] for step in steps if "reward" in step]
    first, end = statistics.mean(rewards[:10]), statistics.mean(rewards[-10:])
    share = f"{logits['same_first']:.1%} of {logits['tokens']} tokens"
    print(f"""| what | result |
|---|---|
| log-probabilities beside transformers | at most {logits["largest"]:.4g} apart; same first word at {share} |
| {args.benchmark[0]}, {args.questions} questions, before | {before["accuracy"]:.1%} |
| after {args.steps} steps of SFT | {after["accuracy"]:.1%} |
| reward of GRPO, first and last ten of {args.steps} steps | {first:.3f}, {end:.3f} |""")
    result = {"model_id": args.model_id, "logits": logits, "before": before, "after_sft": after}
    print(json.dumps(result | {"rewards": [first, end]}))


if __name__ == "__main__":
    main()
