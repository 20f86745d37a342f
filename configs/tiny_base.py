"""train_sft.py for assets/tiny, run by `make tiny`: every parameter, from random weights, on questions about balls but
none about direction. 1,000 steps x 32 are two passes over 15,680 clips."""

model_id = "output/tiny_init"
data_path = "data/base/train.json"
eval_data_path = None  # its answers are words, not options: the step line's token accuracy is enough
output_dir = "output/tiny_base"
overwrite = True

lora_enable = False
freeze_llm = False
freeze_vision_tower = False
tune_merger = True

max_steps = 1000
learning_rate = 2e-3  # 3e-3 is noisier, 1e-3 needs twice the steps
warmup_steps = 50
min_lr_ratio = 0.05
weight_decay = 0.01
save_steps = 500
save_total_limit = 1
