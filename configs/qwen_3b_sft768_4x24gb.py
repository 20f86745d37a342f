"""deepspeed --num_gpus 4 train_sft.py for Qwen2.5-VL-3B on 4 cards of 24 GB that share each clip of 768
frames, rank 16.

6.4 minutes at two frames a second, 364x644: 114,816 vision tokens. Each card has 1/4 of the tokens, whole weights and
all tokens of 1/4 of the attention heads.

    weights             3,754,622,976 x 2 B, whole on every card            7.0 GiB
    adapters            41,363,456 x (6 B + 12 B / 4 ranks)                 0.3 GiB
    kept activations    (36 x T + P / 4) x 2048 x 2 B                       4.1 GiB
    one block redone    T x 0.14 MB; T = 28,788, P = 114,816                3.8 GiB
    the rest            CUDA and its libraries, the batch                   1.6 GiB
    together, estimated                                                    16.8 GiB
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 1  # of 4 cards together
pack_tokens = 131_072
max_seq_length = 131_072
gradient_checkpointing = True
sequence_parallel = 4
dataloader_num_workers = 8
eval_data_path = None  # python infer.py --data_path afterwards

fps = 2.0
max_frames = 768
video_min_pixels = None
video_max_pixels = None  # qwen-vl-utils' budget: 364x644 for a 360p clip
