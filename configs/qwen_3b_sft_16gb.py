"""train_sft.py for Qwen2.5-VL-3B on one 16 GB card: as configs/qwen_3b_sft_24gb.py, with a quarter of the tokens in a
micro-batch. Weights 7.0 + adapters and their optimizer 2.8 + kept activations 1.1 + one block redone 0.5 GiB.
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
