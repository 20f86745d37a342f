"""train_sft.py for Qwen2.5-VL-3B on one 80 GB card: longer and larger clips, 32 frames of 448x448, eight in a pass.

    weights             3,754,622,976 x 2 B                             7.0 GiB
    adapters            165,453,824 x 18 B                              2.8 GiB
    kept activations    36 x T x 2048 x 2 B and 32 x P x 1280 x 2 B;
                        T = 8 x 4,434, P = 8 x 16,384                  14.9 GiB
    one block redone    the tower's: P x 0.06 MB                        7.5 GiB
    together, estimated                                                32.2 GiB

What is left is for clips of up to 768 frames: max_frames and pack_tokens may be three times as much.
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 64
lora_alpha = 64
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 8
pack_tokens = 36_864
gradient_checkpointing = True
dataloader_num_workers = 12

fps = 2.0
max_frames = 32
video_min_pixels = None
video_max_pixels = 448 * 448
