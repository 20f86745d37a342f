"""deepspeed --num_gpus 2 train_sft.py for Qwen2.5-VL-3B on 2 cards of 40 GB that share each clip of 768
frames, rank 16.

6.4 minutes at two frames a second, 364x644: 114,816 vision tokens. Each card has 1/2 of the tokens, whole weights and
all tokens of 1/2 of the attention heads.

    weights             3,754,622,976 x 2 B, whole on every card            7.0 GiB
    adapters            41,363,456 x (6 B + 12 B / 2 ranks)                 0.5 GiB
    kept activations    (36 x T + P / 4) x 2048 x 2 B                       8.1 GiB
    one block redone    T x 0.14 MB; T = 57,577, P = 229,632                7.5 GiB
    the rest            CUDA and its libraries, the batch                   1.9 GiB
    together, estimated                                                    25.0 GiB

One card alone holds it from 48 GB on (40.4 GiB by the plan).
"""

model_id = "Qwen/Qwen2.5-VL-3B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 2e-4
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 1  # of 2 cards together
pack_tokens = 131_072
max_seq_length = 131_072
gradient_checkpointing = True
sequence_parallel = 2
dataloader_num_workers = 8
eval_data_path = None  # python infer.py --data_path afterwards

fps = 2.0
max_frames = 768
video_min_pixels = None
video_max_pixels = None  # qwen-vl-utils' budget: 364x644 for a 360p clip
