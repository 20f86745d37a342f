"""train_grpo.py for Qwen2.5-VL-3B on one 24 GB card: continues an SFT adapter of rank 64, eight prompts x eight.

Peak memory, at least, by the formula: 24 GB: 18 GiB; 16 GB: 15, with four prompts; 80 GB: 23. What is free besides
keeps activations. The values for other cards are in the comments.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
learning_rate = 1e-5  # not tuned on the 3B; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8  # 80 GB: 16
per_device_train_batch_size = 64  # 8 prompts x 8; 16 GB: 32; 80 GB: 256
max_resample = 0
max_completion_length = 256  # 80 GB: 512
offload_optimizer = False  # 16 GB: True
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420
