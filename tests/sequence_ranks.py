"""Batches shared by several ranks beside the same on one: run by test_sequence.py.

    python tests/sequence_ranks.py 2 4      2 processes over gloo, then 4; of each a line, one JSON object

The processes are forked from one that has imported torch and computed nothing.
"""

import json
import os
import sys
import tempfile

import torch
from conftest import SHAPES, Sequence, config_dict, pack_sequences, random_model

import lora
from config import SFT
from model import UserError, vision
from model.loss import IGNORE, target_logprobs
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL
from model.sequence import check_heads, disagreement, join, share
from training.full import settings_for_update, token_plan

# heads, key and value heads: each rank has whole kv heads, parts of one, or parts of two
HEADS = {"multi_query": (4, 1), "grouped": (4, 2), "repeated": (8, 2), "crossing": (12, 3), "own": (4, 4)}
CLIP, LONG_CLIP, PICTURE = ("video", 4, 4, 6, 1.0), ("video", 12, 4, 4, 0.5), ("image", 8, 4)
# {case: sequences, each a list of parts and the tokens at its end that are answered}
PACKINGS = {
    "several clips": [([5, CLIP, 7], 4), ([3, CLIP, 9], 6), ([4, CLIP, 5], 3)],
    "one long clip": [([4, LONG_CLIP, 9], 7), ([3, CLIP, 6], 2), ([8], 5)],
    "images": [([2, PICTURE, 3, PICTURE, 8], 5), ([6, PICTURE, 4], 2)],
    "text only": [([17], 6), ([5], 2)],
    "answers in the last run": [([3, LONG_CLIP, 6], 3)],
    "pictures in the first run": [([1, PICTURE, 70], 30)],
    "one picture, one step": [([9, ("image", 4, 4), 4], 3)],
    "fewer tokens than ranks": [([3], 1)],
    "no answer": [([4, CLIP, 6], 0)],
}


def model_of(heads: str) -> Qwen2_5_VL:
    """A random model of so many heads, with adapters everywhere; B's are random too."""
    H, K = HEADS[heads]
    SHAPES[heads] = SHAPES["tied"] | dict(C=32 * H, H=H, K=K)
    model = random_model(heads)
    lora.inject(model, SFT(lora_rank=4, lora_alpha=8))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
    return model.train()


def packed_of(config: ModelConfig, sequences):
    """Sequences -> Packed with targets."""
    made = [Sequence(config, parts, seed) for seed, (parts, _) in enumerate(sequences)]
    packed, targets = pack_sequences(made), []
    for sequence, (_, answers) in zip(made, sequences):
        target = torch.full((len(sequence.ids),), IGNORE)
        if answers:
            target[-answers - 1 : -1] = torch.tensor(sequence.ids[-answers:])
        targets.append(target)
    packed.targets = torch.cat(targets)
    return packed


def one_pass(model, packed):
    """-> (hidden states of all its tokens, - sum of log p, gradients by name)."""
    hidden = model(packed)
    rows = (packed.targets != IGNORE).nonzero()[:, 0]
    found = model(packed, rows=rows)
    logprobs, _, _ = target_logprobs(found, model.head_weight, packed.targets[rows], with_entropy=False)
    loss = -logprobs.sum()
    model.zero_grad()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values()), "a rank that leaves a gradient out holds up the others"
    return hidden.detach(), loss.detach(), grads


def compare(model, packed, group) -> dict:
    """The largest differences between one rank and the group, over the size of what is compared."""
    hidden, loss, grads = one_pass(model, packed)
    part = share(packed, group, model.config)
    mine, my_loss, my_grads = one_pass(model, part)
    runs = [None] * group.size
    torch.distributed.all_gather_object(runs, mine)
    assert [len(run) for run in runs] == part.share.lengths, part.share.lengths
    torch.distributed.all_reduce(my_loss)
    worst = 0.0
    for name, grad in my_grads.items():
        torch.distributed.all_reduce(grad)
        scale = grads[name].abs().max().clamp(min=1e-3)
        worst = max(worst, float((grad - grads[name]).abs().max() / scale))
    scale = max(float(grad.abs().max()) for grad in grads.values())
    return {
        "hidden": float((torch.cat(runs) - hidden).abs().max() / hidden.abs().max()),
        "loss": float((my_loss - loss).abs() / loss.clamp(min=1.0)),
        "grads": worst,
        "largest gradient": scale,
        "pictures of the ranks": sum(part.share.sends),
    }


def cases(group):
    """{name: differences}, the same on every rank."""
    found, model = {}, model_of("grouped")
    for name, sequences in PACKINGS.items():
        found[name] = compare(model, packed_of(model.config, sequences), group)
    model.gradient_checkpointing = True
    mixed = PACKINGS["one long clip"]
    found["recomputed"] = compare(model, packed_of(model.config, mixed), group)
    usual, vision.LONG, vision.PART = (vision.LONG, vision.PART), 40, 32
    found["recomputed in parts"] = compare(model, packed_of(model.config, mixed), group)
    vision.LONG, vision.PART = usual
    for heads, (H, _) in HEADS.items():
        if H % group.size == 0:
            model = model_of(heads)
            found[f"heads: {heads}"] = compare(model, packed_of(model.config, PACKINGS["several clips"]), group)
    model = model_of("grouped")
    lora.set_trainable(model, SFT(vision_lora=False, merger_lora=False))
    for name, p in model.named_parameters():
        if name.startswith("visual."):
            p.requires_grad_(False)
    found["frozen tower"] = compare(model, packed_of(model.config, mixed), group)
    model = model_of("grouped")
    for p in model.parameters():
        p.requires_grad_(True)
    found["all trained"] = compare(model, packed_of(model.config, mixed), group)
    return found


def refusals(group):
    """What cannot be, in the words that a user sees."""
    told = []
    for attempt in (
        lambda: join(group.size + 1),
        lambda: check_heads(ModelConfig.from_dict(config_dict("tied")), 3),
    ):
        try:
            attempt()
        except UserError as error:
            told.append(str(error))
    return told


def out_of_memory(group):
    """What would be told: of this rank's tokens, and what to do."""
    config = model_of("grouped").config
    parts = [share(packed_of(config, PACKINGS["answers in the last run"]), group, config)]
    cfgs = [SFT(gradient_checkpointing=True, sequence_parallel=n) for n in (1, group.size)]
    return token_plan(parts), [next(iter(settings_for_update(cfg, parts, False))) for cfg in cfgs]


def marks(group):
    """(sum of disagreement() where all ranks have the same batches, where the last has another)."""
    model = model_of("grouped")
    parts = [share(packed_of(model.config, PACKINGS[name]), group, model.config) for name in ("images", "text only")]
    sums = torch.tensor([disagreement(parts, group), 0], dtype=torch.float64)
    sums[1] = disagreement(parts[:1] if group.rank == group.size - 1 else parts, group)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def rank_main(rank: int, ranks: int, meeting: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{meeting}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    group = join(ranks)
    found = {"cases": cases(group), "refusals": refusals(group), "marks": marks(group)}
    found["out of memory"] = out_of_memory(group)
    everyone = [None] * ranks
    torch.distributed.all_gather_object(everyone, found["cases"])
    for name, found_here in found["cases"].items():  # the worst of all ranks
        found_here["pictures of the ranks"] = [each[name]["pictures of the ranks"] for each in everyone]
    if rank == 0:
        print(json.dumps(found), flush=True)
    torch.distributed.destroy_process_group()


def main(ranks: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                rank_main(rank, ranks, f"{folder}/meeting")
                os._exit(0)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * ranks, codes


if __name__ == "__main__":
    for count in sys.argv[1:]:
        main(int(count))
