"""train_grpo.py for Qwen2.5-VL-7B on one 80 GB card: goes on with an SFT adapter of rank 64, eight prompts x eight.

    weights             8,292,166,656 x 2 B                            15.4 GiB
    adapters            207,298,560 x 18 B                              3.5 GiB
    sampler             its fused bf16 copy of the 28 layers           12.2 GiB
    its caches          57,344 B a token: 8 prompts of 1,162, once a
                        group, and 64 completions of 512                2.2 GiB
    together, estimated                                                33.3 GiB

The update of a pass of 16,384 tokens takes about 8 GiB when the sampler's copy is gone.
"""

model_id = "Qwen/Qwen2.5-VL-7B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
pack_tokens = 16_384
max_resample = 0
max_completion_length = 512
max_new_tokens = 512
gradient_checkpointing = True
dataloader_num_workers = 12

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
