"""The operations that have fast forms. qwen.py holds the plain form of each; model/fast/ holds the others.

A model is built with the plain forms. loading.py then binds the fastest ones for the device and dtype of the weights,
once. qwen.py itself never asks on which device it runs. Every fast form is tested against the plain one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Ops:
    """One model's operations; all its blocks share this object. T tokens, H and K heads of size D, r the LoRA rank."""

    attention: Callable  # (q (T, H, D), k (T, K, D), v (T, K, D), segments) -> (T, H, D)
    linear: Callable  # (x (T, in), *layers, pad=False) -> a tuple of (T, out), each layer's adapter included
    norm: Callable  # (x (T, C), weight (C,), eps) -> (T, C)
    swiglu: Callable  # (gate, up) of one shape -> silu(gate) * up
    rotate: Callable  # (x (T, H, D), (cos, sin) each (T, 1, D/2)) -> (T, H, D)
    embed_patches: Callable  # (patches (P, 1176), weight (width, 1176)) -> (P, width)
    logprobs: Callable  # target_logprobs of qwen.py, with its arguments
    trim_last_layer: bool = False  # the last layer computes only the tokens asked for
    pick_decoder: Callable | None = None  # (model, prompts, sampling, G) -> a decode.Decoder class; None: the plain one
    graphs: object = None  # a fast.graphs.GraphCache: batches of a size seen before run as CUDA graphs
    bound: bool = False  # whether the fast forms were taken

    def __post_init__(self):
        self.plain = dict(vars(self))

    def bind(self, weight: torch.Tensor) -> None:
        """Take the fastest forms for weights of this device and dtype, and the plain ones where there are no others."""
        forms = self.plain | fast_forms(weight)
        vars(self).update(forms, graphs=self.graphs, bound=True)

    def run_blocks(self, blocks, through: Callable, x, tables, segments: list, recompute: bool):
        """through(x, tables, segments, recompute), which sends x through the blocks; as CUDA graphs where there are."""
        if self.graphs is None:
            return through(x, tables, segments, recompute)
        return self.graphs.run(blocks, through, x, tables, segments, recompute)


def fast_forms(tensor: torch.Tensor) -> dict:
    """{field of Ops: its fastest form} for tensors of this device and dtype; {} where the plain forms are all."""
    if tensor.is_cuda:
        from model.fast import decoder, gpu

        return dict(gpu.FORMS, pick_decoder=decoder.pick_decoder)
    if tensor.device.type == "cpu":
        from model.fast import cpu

        return cpu.FORMS if tensor.dtype == torch.float32 else cpu.OTHER_DTYPES
    return {}
