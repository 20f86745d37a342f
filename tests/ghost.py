"""The GPU's path of a training step on tensors without storage: what is kept and for how long is real, the numbers are
not there. Kernels that only a GPU has are replaced by what they allocate."""

from types import SimpleNamespace

import torch

import model.kernels
import model.language
import model.rope
import model.sequence
import model.vision
from lora import part_of
from model.attention import attend_flash
from model.language import RMSNorm
from model.qwen2_5_vl import Qwen2_5_VL


class Norm(torch.autograd.Function):
    """CUDA's fused RMSNorm: it keeps its input and 1 / rms, and the weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.empty_like(grad), torch.empty_like(ctx.saved_tensors[1]) if ctx.needs_input_grad[1] else None


def embed(self, packed):
    """Qwen2_5_VL.embed, whose search for the pads needs numbers."""
    x, share = self.model.embed_tokens(packed.input_ids), packed.share
    if packed.patches is None:
        return x
    vision = self.encode_vision(packed.patches, packed.grid_thw)
    if share:
        vision = share.vision(vision)
    return x.index_copy(0, torch.arange(len(vision), device="meta"), vision)


class Kernel:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def haunt(monkeypatch):
    """From here on tensors on `meta` take the GPU's path. The vision tower's MLP must be a multiple of 8 wide."""
    kernels = model.kernels
    monkeypatch.setattr(kernels, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    for name in ("swiglu_kernel", "swiglu_backward_kernel"):
        monkeypatch.setattr(kernels, name, Kernel(), raising=False)
    monkeypatch.setattr(model.language, "swiglu", kernels.SwiGLU.apply)
    monkeypatch.setattr(model.rope, "turn", lambda x, *_: torch.empty(x.shape, dtype=x.dtype, device=x.device))
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: Norm.apply(x, self.weight))
    monkeypatch.setattr(Qwen2_5_VL, "embed", embed)
    for module in (model.language, model.vision, model.sequence):
        monkeypatch.setattr(module, "attend", attend_flash)


class Engine:
    """DeepSpeed's ZeRO-2 on one rank, by what it allocates (deepspeed/runtime/zero/stage_1_and_2.py): fp32 weights and
    moments; a bucket that gradients are copied into; when it is full, an fp32 copy and the fp32 sums of a group."""

    def __init__(self, net, bucket):
        self.module, self.size, self.device = net, bucket, torch.device("meta")
        self.params = [(part_of(name), p) for name, p in net.named_parameters() if p.requires_grad]
        self.state = [torch.empty(3, p.numel(), device="meta") for _, p in self.params]
        self.sums, self.bucket, self.filled, self.waiting = {}, None, 0, set()
        for part, p in self.params:
            p.register_post_accumulate_grad_hook(lambda p, part=part: self.take(part, p))

    def __call__(self, packed, rows=None):
        return self.module(packed, rows=rows)

    def take(self, part, p):
        if self.filled + p.numel() > self.size:
            self.reduce()
        self.filled += p.numel()
        self.waiting.add(part)
        p.grad = None

    def reduce(self):
        for part in self.waiting - set(self.sums):
            self.sums[part] = torch.empty(sum(p.numel() for q, p in self.params if q == part), device="meta")
        one = torch.empty(self.filled, dtype=torch.bfloat16, device="meta")
        one.float()
        self.filled, self.waiting = 0, set()

    def backward(self, loss):
        self.bucket = torch.empty(self.size, dtype=torch.bfloat16, device="meta")
        loss.backward()
        self.reduce()
        self.bucket = None

    def step(self):
        max((p for _, p in self.params), key=torch.numel).double()
        self.sums = {}
