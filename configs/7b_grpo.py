"""train_grpo.py for Qwen2.5-VL-7B on one 80 GB card: continues an SFT adapter of rank 64, eight prompts x eight.

Peak memory, estimated: 80 GB: 36 GiB; on more cards, deepspeed --num_gpus 4 train_grpo.py, 2 GiB less on each.
A 24 GB card has no room for the sampler's copy of the decoder, 12 GiB.
"""

model_id = "Qwen/Qwen2.5-VL-7B-Instruct"
learning_rate = 1e-5  # not tuned; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
max_resample = 0
max_completion_length = 512
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420
