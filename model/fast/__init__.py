"""Fast forms of the operations whose plain forms stand in qwen.py and decode.py. Optional: ops.py binds them.

portable.py   any device: products with adapters, dense attention, log-probs in chunks
cpu.py        norm and SwiGLU in few passes, decoding of a small model
attention.py  a GPU's attention and rotary embedding
gpu.py        a GPU's norm, SwiGLU and log-probs
graphs.py     CUDA graphs of a stack of blocks
decoder.py    group decoding on a GPU          kernels.py   its Triton kernels
quantized.py  products with low-bit weights (formats: model/quantized.py)
"""
