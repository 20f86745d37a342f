"""The operations that have fast forms. qwen.py holds the plain form of each; model/fast/ holds the others.

A model is built with the plain forms. loading.py then binds the fastest ones for the device and dtype of the weights,
once. qwen.py itself never asks on which device it runs. Every fast form is tested against the plain one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

FAST = True  # False, before the first model is made: plain forms everywhere, for tests and for reading a profile


@dataclass(eq=False)
class Ops:
    """One model's operations; all its blocks share this object. T tokens, H and K heads of size D."""

    attention: Callable  # (q (T, H, D), k (T, K, D), v (T, K, D), segments) -> (T, H, D)
    linear: Callable  # (x (T, in), *adapters.Weights, last=False) -> (T, out) each, with adapters
    norm: Callable  # (x (T, C), weight (C,), eps) -> (T, C)
    swiglu: Callable  # (gate, up) of one shape -> silu(gate) * up
    rotate: Callable  # (x (T, H, D), (cos, sin) each (T, 1, D/2)) -> (T, H, D)
    tower_attention: Callable  # (ops, qkv (P, 3 H, D), (cos, sin), segments) -> (P, H, D)
    logprobs: Callable  # target_logprobs of qwen.py, with its arguments
    decoder: Callable | None = None  # makes a decode.Decoder, with the arguments of PlainDecoder; None: the plain one
    trim_last_layer: bool = False  # the last layer computes only the query rows
    graphs: object = None  # a fast.graphs.GraphCache: batches of a size seen before run as CUDA graphs
    offload: bool = False  # the inputs of recomputed blocks wait in host memory
    bound: bool = False  # whether fast forms may be used

    def __post_init__(self):
        self.plain = dict(vars(self))

    def bind(self, weight: torch.Tensor) -> None:
        """Take the fastest forms for weights of this device and dtype, and the plain ones where there are no others."""
        forms = self.plain | fast_forms(weight.device.type, weight.dtype)
        vars(self).update(forms, graphs=self.graphs, offload=self.offload, bound=True)


@cache
def fast_forms(device: str, dtype: torch.dtype) -> dict:
    """{field of Ops: its fastest form} for tensors of this device and dtype; {} where the plain forms are all."""
    if FAST and device == "cuda":
        from model.fast import decoder, gpu

        return dict(gpu.FORMS, decoder=decoder.make_decoder)
    if FAST and device == "cpu":
        from model.fast import cpu, portable

        return cpu.FORMS if dtype == torch.float32 else portable.FORMS
    return {}
