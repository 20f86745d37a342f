"""Parted weights on GPUs against whole ones: where parts rest on the card or on the host, and from card to card.

    torchrun --nproc_per_node 2 tests/test_gpu_partition.py      the ranks' part of it alone
"""

import os
import subprocess
import sys
from pathlib import Path

import conftest  # noqa: F401 (sets the environment before torch is imported)
import pytest
import torch
from conftest import Sequence, pack_sequences

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "bench"))

from workloads import config_dict

import lora
from config import SFT
from model.decode import Sampling, generate
from model.partition import Share
from model.qwen2_5_vl import ModelConfig, Qwen2_5_VL

needs = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def narrow():
    """The 3B's structure, its MLP width in the tower (which goes padded) included, in 12 layers."""
    raw = config_dict("3B") | dict(hidden_size=512, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=4,
                                   tie_word_embeddings=False)  # fmt: skip
    raw["vision_config"] |= dict(depth=6, fullatt_block_indexes=[3], out_hidden_size=512)
    return ModelConfig.from_dict(raw)


def passes(share, device):
    """Hidden states and gradients of three steps, with the tower and without, and sampled ids."""
    torch.manual_seed(0)
    model = Qwen2_5_VL.random(narrow(), device, torch.bfloat16, share=share)
    lora.inject(model, SFT())
    model.gradient_checkpointing = True
    trained = [p for _, p in lora.trainable_parameters(model)]
    with torch.no_grad():
        for p in trained:
            p.add_(0.02 * torch.randn(p.shape, device=device, dtype=p.dtype))
    found, clip = [], [50, ("video", 4, 8, 12, 1.0), 60]
    for number, parts in enumerate((clip, [300], clip)):
        batch = pack_sequences([Sequence(model.config, parts, number) for _ in range(4)]).to(device)
        hidden = model.train()(batch)
        grads = torch.autograd.grad(hidden.float().square().sum(), trained, allow_unused=True)
        found += [hidden.detach(), *grads]
    prompt = pack_sequences([Sequence(model.config, clip, 5)]).to(device)
    rows = generate(model, prompt, Sampling(24, temperature=0.0), 4)[0]
    return found, [row.ids for row in rows], model


def compare(share, device):
    """(tensors that differ from the whole model's, or None where the sampled ids do; share of the weights kept here)"""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    expected, ids, whole = passes(None, device)
    found, mine, model = passes(share, device)
    same = [a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
    kept = model.partition.part.nbytes / sum(p.nbytes for p in whole.parameters())
    return same.count(False) if mine == ids else None, kept


@needs
@pytest.mark.parametrize("offload", [False, True], ids=["card", "host"])
def test_one_card_equals_whole_weights(offload):
    try:
        differing, _ = compare(Share(offload=offload), torch.device("cuda", 0))
    finally:
        torch.use_deterministic_algorithms(False)
    assert differing == 0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_cards_equal_whole_weights():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29781"]
    done = subprocess.run([*command, __file__], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


if __name__ == "__main__":
    from training.engine import leave_processes, start_processes

    device = start_processes()
    for offload in (False, True):
        share = Share.here(offload)
        differing, kept = compare(share, device)
        assert differing == 0, f"{differing} tensors differ (None: sampled ids)"
        print(f"{len(share.ranks)} ranks, offload {offload}: equal; a rank keeps {kept:.0%}")
    leave_processes()
