"""How fast a GRPO step is: a group of completions sampled for each prompt, the reference pass, the update.

    python bench/grpo.py                               # 3B shape: R, 1 and 8 prompts x 8 completions of 256 tokens
    python bench/grpo.py --batch 4 --group 16 --completion 512 --work own
    python bench/grpo.py --peer                        # TRL too, where it is installed

It runs train_grpo.py's own functions, with random rewards that differ within each group, and no end token, so that all
completions have full length. "reference" is all passes of the frozen reference, "update" the rest after sampling. TRL
takes no video: its prompt is as many text tokens. Floors: bytes of decoding at the copy rate, arithmetic with frozen
weights at the matrix rate, a prompt counted once a group. The last line is one JSON object.
"""

import importlib.util
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from workloads import Bench, arguments, chosen, forward_flops, linear_flops, peer_model, random_prompt, step_bytes

import lora
from adapter_files import hf_name
from config import GRPO
from data import Example, pack
from engine import build_engine, init_distributed, leave_processes
from model.decode import Sampling, generate
from model.packed import IGNORE
from rollouts import Rollout
from train_grpo import compare_within_groups, cut, freeze_reference, micro_batch, reduce_sums, reference_pass, train_on
from trainer import Run

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny" / "tokenizer.json"
PARTS = "whole step", "rollout", "reference", "update"


def prompts_of(config, work, count):
    """`count` different prompts as the Processor would make them."""
    generator, made = torch.Generator().manual_seed(0), []
    for i in range(count):
        ids, positions, patches = random_prompt(config, work, generator)
        clip = dict(grid_thw=[work.grid], second_per_grid=[1.0], frame_indices=[], frame_times=[], record={})
        text = dict(ids=np.array(ids), targets=np.full(len(ids), IGNORE), position_ids=positions.numpy())
        made.append(Example(f"prompt {i}", **text, patches=patches, num_vision_tokens=work.video_tokens, **clip))
    return made


class Step:
    """One step of train_grpo.py on fixed prompts; its parts are timed apart."""

    def __init__(self, bench):
        self.bench = bench
        device = bench.device
        if not torch.distributed.is_initialized():
            device = init_distributed()
        self.cfg = bench.lora(GRPO)
        self.cfg.num_generations, self.cfg.pack_tokens = bench.args.group, bench.args.pack_tokens
        lora.inject(bench.model, self.cfg)
        frozen = freeze_reference(bench.model, self.cfg)
        self.run = Run(self.cfg, "bench", Path(), device, bench.dtype, "")
        self.engine, *_ = build_engine(bench.model, self.cfg, device, bench.dtype)
        self.reference = 0.0  # seconds in the frozen reference, of this step

        @contextmanager
        def timed_reference():
            bench.sync()
            start = time.perf_counter()
            with frozen():
                yield
                bench.sync()
            self.reference += time.perf_counter() - start

        self.frozen = timed_reference

    def sample(self, prompts, tokens):
        packed = pack(prompts).to(self.bench.device)
        groups = generate(self.bench.model, packed, Sampling(tokens, self.cfg.temperature), self.cfg.num_generations)
        draw = random.Random(0)
        return [
            [Rollout(n, c.ids, c.logprobs, c.finished, "", reward=draw.random()) for c in group]
            for n, group in enumerate(groups)
        ]  # fmt: skip

    def __call__(self, prompts, tokens):
        """Seconds of each of PARTS."""
        self.reference = 0.0
        self.cfg.per_device_train_batch_size = len(prompts) * self.cfg.num_generations
        self.bench.sync()
        start = time.perf_counter()
        groups = self.sample(prompts, tokens)
        sampled = time.perf_counter()
        _, normalizer = compare_within_groups(self.run, groups, len(prompts) * self.run.world)
        own, lengths = dict(enumerate(prompts)), [(n, len(prompt)) for n, prompt in enumerate(prompts)]
        passes = cut(groups, lengths, self.cfg)
        batches = [micro_batch(own, rollouts, self.cfg).to(self.bench.device) for rollouts in passes]
        sums = Counter()
        reference_pass(self.run, self.bench.model, self.frozen, batches, [], max(1, len(prompts) // 4), sums)
        train_on(self.run, self.engine, batches, normalizer, 1, len(batches), sums)
        reduce_sums(self.run, sums)
        self.bench.sync()
        end = time.perf_counter()
        return end - start, sampled - start, self.reference, end - sampled - self.reference


def floors(bench, work, P):
    """(bytes of decoding, arithmetic) of each part."""
    config, G, T = bench.config, bench.args.group, work.completion
    moved = T * step_bytes(bench.model, work, P, G, 0.5 * T)
    prefill = P * forward_flops(config, replace(work, completion=0), head_tokens=1)
    reference = P * forward_flops(config, work, G, G * T)
    update = P * linear_flops(config, work, G * T, bench.args.recompute, G)
    return dict(zip(PARTS, [(moved, prefill + reference + update), (moved, prefill), (0, reference), (0, update)]))


def measure(bench, step, name, work, P):
    prompts, G = prompts_of(bench.config, work, P), bench.args.group
    for _ in range(2 if bench.cuda else 1):
        step(prompts, work.completion)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    found = list(zip(*(step(prompts, work.completion) for _ in range(bench.args.repeats))))
    for part, times in zip(PARTS, found):
        moved, flops = floors(bench, work, P)[part]
        label = name if part == PARTS[0] else f"  {part}"
        spread, floor = (statistics.median(times), min(times), max(times)), moved / bench.copy + flops / bench.matrix
        shown = {"moved": moved} if part == "rollout" else {"flops": flops} if part != PARTS[0] else {}
        bench.add(label, "ours", spread, P * G * work.completion, floor=floor, of=name, **shown)


def measure_trl(bench, name, work, P):
    """The same step by TRL: GRPOTrainer, transformers' generate, PEFT; a prompt of as many text tokens."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    args, cfg, ends = bench.args, bench.lora(GRPO), []
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(TINY), **special)
    word = tokenizer.decode([tokenizer.encode("a", add_special_tokens=False)[0]])
    names = [hf_name(n) for n in lora.targets(bench.model, cfg) if n.startswith("model.")]

    class Clock(TrainerCallback):
        def on_step_end(self, *_args, **_kwargs):
            bench.sync()
            ends.append(time.perf_counter())

    rows = InMemoryTable.from_pydict({"prompt": [word * work.prompt_tokens] * P * 8})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=P * args.group, num_generations=args.group, report_to="none",
            max_completion_length=work.completion, generation_kwargs={"min_new_tokens": work.completion}, beta=cfg.beta,
            learning_rate=cfg.learning_rate, max_steps=args.repeats + 1, bf16=bench.cuda, save_strategy="no",
            gradient_checkpointing=args.recompute, gradient_checkpointing_kwargs={"use_reentrant": False},
            use_cpu=not bench.cuda, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = GRPOTrainer(
            peer_model(bench.model), lambda completions, **_: [random.random() for _ in completions], config,
            train_dataset=Dataset(rows, fingerprint="bench"), processing_class=tokenizer,
            peft_config=LoraConfig(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, target_modules=names),
            callbacks=[Clock()],
        )  # fmt: skip
        if bench.cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    times = [after - before for before, after in zip(ends, ends[1:])]
    floor = sum(x / rate for x, rate in zip(floors(bench, work, P)["whole step"], (bench.copy, bench.matrix)))
    spread = statistics.median(times), min(times), max(times)
    bench.add(name, "TRL (text only)", spread, P * args.group * work.completion, floor=floor)


def items(args, cuda):
    """(name, workload, prompts) of each row. On a CPU short completions: it is the loop that is looked at there."""
    for name, work in chosen(args):
        counts = [args.batch] if args.batch else [1, 8] if cuda else [1] if name == "R" else [8]
        for P in counts:
            short = work if cuda or args.completion else replace(work, completion=64)
            yield f"{name} {P} x {args.group} x {short.completion}", short, P


def main():
    parser = arguments(__doc__)
    parser.add_argument("--pack_tokens", type=int, default=GRPO.pack_tokens, help="tokens of an update's pass at most")
    bench = Bench("grpo", parser.parse_args())
    work = list(items(bench.args, bench.cuda))
    if bench.args.peer and not importlib.util.find_spec("trl"):
        bench.add("TRL", "not installed", note="pip install trl: its step would be measured here")
    elif bench.args.peer:
        for name, load, P in work:
            measure_trl(bench, name, load, P)
    step = Step(bench)
    for name, load, P in work:
        measure(bench, step, name, load, P)
    bench.close()
    leave_processes()


if __name__ == "__main__":
    main()
