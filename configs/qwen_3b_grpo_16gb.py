"""train_grpo.py for Qwen2.5-VL-3B on one 16 GB card: as configs/qwen_3b_grpo_24gb.py, with AdamW's state in CPU memory
and passes of a quarter of the tokens.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 6 B: master and moments are in
                        CPU memory                                      0.9 GiB
    sampler             its fused bf16 copy of the 36 layers            5.2 GiB
    its caches          36,864 B a token: 8 prompts of 1,162, once a
                        group, and 64 completions of 256                0.9 GiB
    together, estimated                                                14.0 GiB
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned on the 3B; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
pack_tokens = 3_584  # a prompt with its 8 completions
max_resample = 0
max_completion_length = 256
gradient_checkpointing = True
offload_optimizer = True
dataloader_num_workers = 4

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
