"""Fast forms of the operations whose plain forms stand in qwen.py and decode.py. Optional: ops.py binds them.

portable.py   any device: products with adapters, dense attention, log-probs in chunks; norm and SwiGLU on a CPU
cpu.py        decoding of a small model on a CPU
quantized.py  products with low-bit weights (formats: model/quantized.py)
gpu.py        CUDA: FlashAttention, rotary and SwiGLU kernels
graphs.py     CUDA graphs of a stack of blocks
decoder.py    group decoding on a GPU          kernels.py, linears.py   its Triton kernels
"""
