"""deepspeed --num_gpus 4 train_grpo.py for Qwen2.5-VL-32B on four 141 GB cards (H200): goes on with an SFT adapter of
rank 16, eight prompts x eight on each.

The frozen layers are parted among the cards; before sampling each gathers a whole copy of them, which is gone again
before the update.

    weights             33,452,718,336 x 2 B, 31,841,632,256 in 4 parts    17.8 GiB
    adapters            145,752,064 x (6 B + 12 B / 4 ranks)                1.2 GiB
    layers on their way two of 487,605,248 x 2 B                            1.8 GiB
    reference           145,752,064 x 2 B                                   0.3 GiB
    sampler             its fused bf16 copy of the 64 layers               58.1 GiB
    its caches          262,144 B a token: 8 x 1,162, 64 x 512             10.3 GiB
    the rest            prompts' activations, CUDA and its libraries        3.2 GiB
    together, estimated                                                    92.7 GiB

The update takes less, for the copy is gone by then. GRPO of the 72B does not fit: its copy alone takes 131 GiB.
"""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
model_ckpt = "output/video_lora"
learning_rate = 1e-5  # not tuned; TRL's default is 1e-6
adam_beta2 = 0.999
num_train_epochs = 1

num_generations = 8
per_device_train_batch_size = 64  # 8 prompts x 8
pack_tokens = 16_384
oversample = 1.0
max_completion_length = 512
max_new_tokens = 512
gradient_checkpointing = True
partition_weights = True
dataloader_num_workers = 12

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
