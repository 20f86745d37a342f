"""train_sft.py for assets/tiny: every parameter, from random weights, on questions about balls but none about
direction.

1,000 steps x 32 = 32,000 samples, two passes over 15,680 clips. `make tiny` runs it between init and export.
"""

model_id = "output/tiny_init"
data_path = "data/base/train.json"
output_dir = "output/tiny_base"
overwrite = True

lora_enable = False
freeze_llm = False
freeze_vision_tower = False
tune_merger = True

max_steps = 1000
per_device_train_batch_size = 32
learning_rate = 2e-3  # 3e-3 is noisier, 1e-3 needs twice the steps
warmup_steps = 50
min_lr_ratio = 0.05
weight_decay = 0.01

eval_data_path = None  # its answers are words, not options: token accuracy in the step line tells enough
save_steps = 500
save_total_limit = 1
