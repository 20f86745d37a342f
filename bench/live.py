"""Memory without a GPU: the bytes of all tensors alive, counted while real code runs.

    with Live() as live: …          counts what operators of torch make, on any device
    live.peak, live.now             bytes

What a kernel takes for itself while it works (cuBLAS's workspace, FlashAttention's sums) is not seen, but for the one
that is as large as its input.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Live(TorchDispatchMode):
    """Counts storages that operators return until the last tensor on them is gone."""

    def __init__(self, *before):
        """before: tensors that are there already and count too."""
        super().__init__()
        self.now = self.peak = 0
        self.known = {}  # id of a storage -> weak reference to it
        for tensor in before:
            self.see(tensor)

    def see(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, lambda _: self.forget(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        self.known.pop(key, None)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.logsumexp.default:  # exp(x - max): logsumexp_out_impl, ATen's ReduceOps.cpp
            self.peak = max(self.peak, self.now + args[0].nbytes)
        out = function(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out
