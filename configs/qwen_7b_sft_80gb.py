"""train_sft.py for Qwen2.5-VL-7B on one 80 GB card: rank 64, 16 clips in a pass.

    weights             8,292,166,656 x 2 B                            15.4 GiB
    adapters            207,298,560 x 18 B                              3.5 GiB
    kept activations    28 x T x 3584 x 2 B and 32 x P x 1280 x 2 B;
                        T = 22,688, P = 69,120                          9.5 GiB
    one block redone    T x 0.26 MB                                     5.4 GiB
    together, estimated                                                33.8 GiB
"""

model_id = "Qwen/Qwen2.5-VL-7B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4  # the 3B's; not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 16
pack_tokens = 24_576
gradient_checkpointing = True
dataloader_num_workers = 12

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
