"""train_grpo.py for Qwen2.5-VL-32B on one card: continues an SFT adapter of rank 16, eight prompts x eight.

Peak memory, estimated: 48 GB: 34 GiB; 32 GB: 26 GiB, with the values in the comments. The sampler reads the base as it
is kept: a base in bf16 would be copied.
"""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
base_dtype = "nf4"
head_dtype = "int8"
offload_embedding = True
offload_optimizer = False  # 32 GB: True
learning_rate = 1e-5  # not tuned
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8; 32 GB: 32
max_resample = 0
max_completion_length = 512
dataloader_num_workers = 8

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420
