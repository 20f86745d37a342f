import math

_n = math.prod([2, 4])
save_steps = _n
learning_rate, bf16, lora_namespan_exclude = 1e-4, True, ("a",)
pack_tokens, save_strategy, lora_r, use_liger_kernel = None, "no", 8, True
