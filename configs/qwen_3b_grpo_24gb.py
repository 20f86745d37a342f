"""train_grpo.py for Qwen2.5-VL-3B on one 24 GB card: goes on with an SFT adapter of rank 64, eight prompts x eight.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 18 B                              2.8 GiB
    sampler             its fused bf16 copy of the 36 layers            5.2 GiB
    its caches          36,864 B a token: 8 prompts of 1,162, once a
                        group, and 64 completions of 256                0.9 GiB
    together                                                           15.9 GiB

The update keeps one input a block and redoes one, some 3 GiB, when the sampler's copy is gone. Measured with random
weights and 16-frame clips of 252x420 on an H100: 16.8 GiB peak with eight prompts x 8 x 256, 15.0 with one prompt.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned on the 3B; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
pack_tokens = 8_192
max_resample = 0
max_completion_length = 256
gradient_checkpointing = True
dataloader_num_workers = 8

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
