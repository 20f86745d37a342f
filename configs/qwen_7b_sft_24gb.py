"""train_sft.py for Qwen2.5-VL-7B on one 24 GB card: rank 16, two clips a pass.

    weights             8,292,166,656 x 2 B                            15.4 GiB
    adapters            51,824,640 x 18 B                               0.9 GiB
    kept activations    28 x T x 3584 x 2 B and 32 x P x 1280 x 2 B;
                        T = 2,836, P = 8,640                            1.2 GiB
    one block redone    T x 0.26 MB: 3 (3 x MLP + 8 x width) B          0.7 GiB
    together, estimated                                                18.2 GiB

Rank 64 would take 2.6 GiB more. GRPO does not fit: the sampler's copy alone takes 12.2 GiB; without room for it an
evaluation samples by the slower path, by itself.
"""

model_id = "Qwen/Qwen2.5-VL-7B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 2e-4  # the 3B's; not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 2
gradient_accumulation_steps = 4
pack_tokens = 3_072  # two clips in a pass
gradient_checkpointing = True
dataloader_num_workers = 8

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
