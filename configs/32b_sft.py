"""python train_sft.py for Qwen2.5-VL-32B on one card, or by deepspeed on several: rank 16. The weights stand whole on
each, on small cards in few bits: the embedding and the optimizer's state are in host memory there. Peak memory,
estimated: 24 GB: 21 GiB, 48 GB: 23 GiB, 80 GB: 68 GiB."""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
base_dtype = "nf4"  # 80 GB: bf16
head_dtype = "int8"  # 80 GB: bf16
offload_embedding = True  # 80 GB: False
offload_optimizer = True  # 48 GB: False, 80 GB: False
lora_rank = 16
learning_rate = 1e-4  # not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 2
gradient_accumulation_steps = 2
dataloader_num_workers = 8
eval_data_path = None  # no room to generate beside the optimizer; python infer.py --data_path afterwards

fps = 2.0
nframes = None
video_min_pixels = None
video_max_pixels = 105_840  # 252 x 420
