"""train_sft.py for Qwen2.5-VL-3B on one card: rank 64 on every linear layer, bf16, eight clips a step.

Peak memory with clips of 16 frames, at least, by the formula: 16 GB: 12 GiB; 80 GB: 13, with larger clips. What is free
besides keeps activations. The values for other cards are in the comments.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 8
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420; 80 GB: 200_704, 448 x 448
