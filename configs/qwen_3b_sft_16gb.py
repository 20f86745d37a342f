"""train_sft.py for Qwen2.5-VL-3B on one 16 GB card: as configs/qwen_3b_sft_24gb.py, two clips a pass.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 18 B                              2.8 GiB
    kept activations    T = 2,836, P = 8,640                            1.0 GiB
    one block redone    T x 0.15 MB                                     0.5 GiB
    together, estimated                                                11.3 GiB
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 2
gradient_accumulation_steps = 4
pack_tokens = 3_072  # two clips in a pass
gradient_checkpointing = True
dataloader_num_workers = 4

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
