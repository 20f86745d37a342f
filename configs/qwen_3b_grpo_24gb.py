"""train_grpo.py for Qwen2.5-VL-3B on one 24 GB card: goes on with an SFT adapter of rank 64, groups of 8.

    weights, adapters and their optimizer, as in configs/qwen_3b_sft_24gb.py                  9.8 GiB
    the sampler's fused bf16 copy of the language model, while it samples                     5.2 GiB
    its caches: 36 layers x 2 x 2 x 128 x 2 B a token, the prompt once a group                0.1 GiB
    the update: one input a block kept, one block redone                                      2-4 GiB, not at that time

Measured with one prompt x 8 completions of 256 tokens after a 16-frame clip (252x420): 15.0 GiB peak, on an H100.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned on the 3B; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
pack_tokens = 8_192
oversample = 1.0
max_completion_length = 256
gradient_checkpointing = True
dataloader_num_workers = 8

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
