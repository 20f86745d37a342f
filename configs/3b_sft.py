"""train_sft.py for Qwen2.5-VL-3B on one 24 GB card: rank 64 on every linear layer, bf16, eight clips a pass.

Peak memory with clips of 16 frames: 24 GB: 15.4 GiB and 16 GB: 11.8 GiB measured, 80 GB: 23 GiB estimated. The values
for other cards are in the comments.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 8  # 16 GB: 2; 80 GB: 8
gradient_accumulation_steps = 1  # 16 GB: 4
pack_tokens = 12_288  # all eight clips in one pass; 16 GB: 3_072, two clips; 80 GB: 36_864
gradient_checkpointing = True
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420; 80 GB: 200_704, 448 x 448
