"""train_sft.py for Qwen2.5-VL-3B on one 24 GB card: LoRA r=64 on every linear layer, bf16.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 18 B: 2 bf16, 4 fp32 master,
                        8 AdamW's moments, 4 gradient                   2.8 GiB
    kept activations    one input a block: 36 x T x 2048 x 2 B and
                        32 x P x 1280 x 2 B; at T = 11,344 and
                        P = 34,560 (8 clips of 16 frames, 252x420)      4.2 GiB
    one block redone    T x 0.15 MB: 3 (3 x MLP + 8 x width) B          1.7 GiB
    together                                                           15.7 GiB

Measured so, random weights, on an H100: 15.4 GiB.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 8
pack_tokens = 12_288  # all eight clips in one pass
gradient_checkpointing = True
dataloader_num_workers = 8

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
