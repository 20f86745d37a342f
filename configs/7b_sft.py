"""train_sft.py for Qwen2.5-VL-7B on one 80 GB card: rank 64, 16 clips a step.

Peak memory, at least, by the formula: 80 GB: 22 GiB; 24 GB: 19, with the values in the comments. What is free besides
keeps activations.
"""

model_id = "Qwen/Qwen2.5-VL-7B-Instruct"
lora_rank = 64  # 24 GB: 16
lora_alpha = 64  # 24 GB: 32
learning_rate = 2e-4  # the 3B's; not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 16
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420
