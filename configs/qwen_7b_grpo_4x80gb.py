"""deepspeed --num_gpus 4 train_grpo.py for Qwen2.5-VL-7B on four 80 GB cards: goes on with an SFT adapter of rank 64,
eight prompts x eight on each.

    weights             8,292,166,656 x 2 B, whole on every card           15.4 GiB
    adapters            207,298,560 x (6 B + 12 B / 4 ranks)                1.7 GiB
    reference           207,298,560 x 2 B                                   0.4 GiB
    sampler             its fused bf16 copy of the 28 layers               12.2 GiB
    its caches          57,344 B a token: 8 x 1,162, 64 x 512               2.2 GiB
    the rest            prompts' activations, CUDA and its libraries        2.6 GiB
    together, estimated                                                    34.5 GiB

One card alone takes 1.7 GiB more of AdamW's state: qwen_7b_grpo_80gb.py.
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
