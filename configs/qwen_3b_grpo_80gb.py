"""train_grpo.py for Qwen2.5-VL-3B on one 80 GB card: 16 prompts x 16 completions of 512 tokens.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 18 B                              2.8 GiB
    sampler             its fused bf16 copy of the 36 layers            5.2 GiB
    its caches          36,864 B a token: 16 prompts of 1,162, once a
                        group, and 256 completions of 512               5.1 GiB
    together, estimated                                                20.1 GiB

The update of a pass of 32,768 tokens takes about 10 GiB when the sampler's copy is gone. There is room for longer clips
and answers.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned on the 3B; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 16
per_device_train_batch_size = 256  # 16 prompts x 16
pack_tokens = 32_768
max_resample = 0
max_completion_length = 512
max_new_tokens = 512
gradient_checkpointing = True
dataloader_num_workers = 12

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
