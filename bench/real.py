"""The released weights, for whoever has them: logits beside transformers, a benchmark before and after SFT, GRPO.

    python bench/real.py --model_id Qwen/Qwen2.5-VL-3B-Instruct --benchmark mvbench DIR --train my/train.json

It runs the scripts as a user types them, prints a markdown table, and on its last line one JSON object. The commands'
output and the runs stay in --output_dir. Here it was tried on random weights only (tests/test_bench.py).
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch


def run(log: Path, script: str, *flags) -> str:
    """The last line that a script of the repository prints; its output goes to `log`. Its failure ends everything."""
    command = [sys.executable, script, *map(str, flags)]
    print(f"$ {shlex.join(command[1:])}", flush=True)
    with log.open("w") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    text = log.read_text()
    if code:
        raise SystemExit(f"exit code {code}\n{text[-3000:]}")
    return text.strip().splitlines()[-1]


@torch.no_grad()
def compare_logits(model_id: str, dtype: torch.dtype, device: str) -> dict:
    """A drawn clip and a question, by our model and by transformers': the largest difference of log-probabilities, and
    the share of tokens at which both rank the same word first. Both get our positions, which follow the released rule;
    transformers' own differ from it by release."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from clips import DIRECTIONS, draw_clip, render, write_mp4
    from config import SFT
    from data import Processor, load_tokenizer, pack
    from model.loading import load_model, resolve_folder
    from model.qwen import normalise_patches

    folder = resolve_folder(model_id)
    model = load_model(folder, device, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(temporary) / "clip.mp4"
        write_mp4(clip, render(draw_clip(np.random.default_rng(0), list(DIRECTIONS)[0], 224, 30)))
        record = {"video": str(clip), "question": "Which way does the ball move?", "answer": "to the right"}
        example = Processor(load_tokenizer(folder), model.config, SFT()).encode(record)
    ours = model.logits(pack([example]).to(device)).float().log_softmax(-1).cpu()
    del model
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device).eval()
    ids = torch.from_numpy(np.asarray(example.ids))[None].to(device)
    reference = theirs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=2 * (ids == theirs.config.video_token_id).int(),
        position_ids=torch.from_numpy(np.asarray(example.position_ids))[:, None].to(device),
        pixel_values_videos=normalise_patches(torch.as_tensor(example.patches).to(device), dtype),
        video_grid_thw=torch.tensor(example.grid_thw, device=device),
        second_per_grid_ts=torch.tensor(example.second_per_grid, device=device),
    ).logits[0].float().log_softmax(-1).cpu()  # fmt: skip
    same = (ours.argmax(-1) == reference.argmax(-1)).float().mean()
    return {"tokens": len(ours), "largest": float((ours - reference).abs().max()), "same_first": float(same)}


def benchmark(log: Path, args, *flags) -> dict:
    """Our number and the official scorer's of --questions questions."""
    common = ["--max_samples", args.questions, "--controls", "none", "--json", *shlex.split(args.infer)]
    return json.loads(run(log, "infer.py", "--benchmark", *args.benchmark, *common, *flags))


def rewards_of(folder: Path) -> tuple[float, float]:
    """Mean reward of the first and of the last ten steps of a GRPO run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows if "reward" in row]
    return statistics.mean(rewards[:10]), statistics.mean(rewards[-10:])


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_id", required=True, help="folder or hub id of released weights")
    parser.add_argument("--benchmark", nargs=2, metavar=("NAME", "DIR"), required=True, help="docs/benchmarks.md")
    parser.add_argument("--train", required=True, help="dataset of SFT and GRPO")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50, help="of SFT and of GRPO")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "output" / "real")
    for name in ("infer", "sft", "grpo"):
        parser.add_argument(f"--{name}", default="", help="further flags, in quotes")
    args = parser.parse_args(argv)
    out = args.output_dir
    out.mkdir(parents=True, exist_ok=True)
    cuda = torch.cuda.is_available()
    dtype, device = (torch.bfloat16, "cuda") if cuda else (torch.float32, "cpu")
    result = {"model_id": args.model_id, "logits": compare_logits(args.model_id, dtype, device)}
    if cuda:
        torch.cuda.empty_cache()

    base = ["--model_id", args.model_id]
    train = ["--data_path", args.train, "--eval_data_path", "none", "--max_steps", args.steps, "--overwrite"]
    result["before"] = benchmark(out / "before.log", args, *base, "--model_ckpt", "none")
    run(out / "sft.log", "train_sft.py", *base, *train, "--output_dir", out / "sft", *shlex.split(args.sft))
    result["after_sft"] = benchmark(out / "after_sft.log", args, *base, "--model_ckpt", out / "sft")
    flags = [*train, "--model_ckpt", out / "sft", "--output_dir", out / "grpo", *shlex.split(args.grpo)]
    run(out / "grpo.log", "train_grpo.py", *base, *flags)
    result["rewards"] = rewards_of(out / "grpo")

    logits, (first, last) = result["logits"], result["rewards"]
    share = f"{logits['same_first']:.1%} of {logits['tokens']} tokens"
    lines = [
        ("log-probabilities beside transformers", f"at most {logits['largest']:.4g} apart; same first word at {share}"),
        (f"{args.benchmark[0]}, {args.questions} questions, before", f"{result['before']['accuracy']:.1%}"),
        (f"after {args.steps} steps of SFT", f"{result['after_sft']['accuracy']:.1%}"),
        (f"reward of GRPO, first and last ten of {args.steps} steps", f"{first:.3f}, {last:.3f}"),
    ]
    print("| what | result |\n|---|---|")
    for what, value in lines:
        print(f"| {what} | {value} |")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
