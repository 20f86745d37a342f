"""Fast forms of the operations whose plain forms stand in qwen.py and decode.py. Optional: ops.py binds them.

    portable.py   any device: products with adapters, dense attention, rotary, log-probs in chunks
    cpu.py        float32 on a CPU, and decoding of small models there
    gpu.py        CUDA: FlashAttention, rotary and SwiGLU kernels
    graphs.py     CUDA graphs of a stack of blocks
    decoder.py    group decoding on a GPU          kernels.py   its Triton kernels
"""
