"""The released weights, for whoever has them: logits beside transformers, a benchmark before and after SFT, GRPO.

    python bench/real.py --model_id Qwen/Qwen2.5-VL-3B-Instruct --benchmark mvbench DIR --train my/train.json

It runs the scripts as a user types them and ends with one JSON object: how far our log-probabilities are from those of
transformers, our number and the official scorer's before and after SFT, and the mean reward of GRPO's first and last
ten steps. The runs stay in --output_dir. Here it was tried on random weights only.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch
from learn import run
from peer import transformers_inputs
from transformers import Qwen2_5_VLForConditionalGeneration

from data import pack
from infer import Model


@torch.no_grad()
def compare_logits(model_id: str) -> dict:
    """A clip and a question, by our model and by transformers': the largest difference of log-probabilities, and the
    share of tokens at which both rank the same word first. Both get our positions, which follow the released rule;
    transformers' own differ from it by release."""
    asked = Model(model_id)
    model, packed = asked.network, pack([asked.example(ROOT / "assets" / "classes.gif")])
    config, device, dtype = model.config, model.head_weight.device, model.head_weight.dtype
    packed = packed.to(device)
    ours = model.logits(packed).float().log_softmax(-1)
    inputs = transformers_inputs(packed, 1, config, dtype) | {"position_ids": packed.position_ids[:, None]}
    del model, asked  # small cards hold one of the two
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_id, dtype=dtype).to(device).eval()
    reference = theirs(**inputs).logits[0].float().log_softmax(-1)
    same = (ours.argmax(-1) == reference.argmax(-1)).float().mean()
    return {"tokens": len(ours), "largest": float((ours - reference).abs().max()), "same_first": float(same)}


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
    ask = partial(run, "infer.py", "--benchmark", *args.benchmark, "--model_id", args.model_id)
    ask = partial(ask, "--max_samples", args.questions, "--controls", "none", "--json", "--model_ckpt")
    result = {"model_id": args.model_id, "logits": compare_logits(args.model_id)}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the scripts that follow
    result["before"] = json.loads(ask("none"))
    run("train_sft.py", *train, "--output_dir", sft)
    result["after_sft"] = json.loads(ask(sft))
    run("train_grpo.py", *train, "--model_ckpt", sft, "--output_dir", grpo)
    steps = [json.loads(line) for line in (grpo / "metrics.jsonl").read_text().splitlines()]
    rewards = [step["reward"] for step in steps if "reward" in step]
    print(json.dumps(result | {"rewards": [statistics.mean(rewards[:10]), statistics.mean(rewards[-10:])]}))


if __name__ == "__main__":
    main()
