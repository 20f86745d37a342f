"""deepspeed --num_gpus 2 train_sft.py for Qwen2.5-VL-32B on two or more 80 GB cards: rank 16. The weights stand whole
on each, gradients and optimizer are shared by ZeRO-2. Peak memory, estimated: 80 GB: 67 GiB."""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
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
