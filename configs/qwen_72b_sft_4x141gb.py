"""deepspeed --num_gpus 4 train_sft.py for Qwen2.5-VL-72B on four 141 GB cards (H200), rank 16, eight clips in a pass.

The frozen layers are parted among the cards of a machine; one computes, the next is on its way.

    weights             73,410,777,344 x 2 B, 70,849,675,264 in 4 parts    37.8 GiB
    adapters            222,117,888 x (6 B + 12 B / 4 ranks)                1.9 GiB
    layers on their way two of 877,684,736 x 2 B                            3.3 GiB
    buffers             two of 25,000,000 x 2 B for the reductions          0.1 GiB
    kept activations    80 x T x 8192 x 2 B; of the tower 96 KB x P        17.0 GiB
    one block redone    T x 0.40 MB; T = 11,344, P = 34,560                 4.2 GiB
    the rest            CUDA and its libraries, the batch                   1.4 GiB
    together, estimated                                                    65.7 GiB

66 GiB of 141: four cards of 80 GB do too.
"""

model_id = "Qwen/Qwen2.5-VL-72B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 1e-4  # not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 8
pack_tokens = 12_288  # eight clips in a pass
gradient_checkpointing = True
partition_weights = True
dataloader_num_workers = 8
eval_data_path = None  # python infer.py --data_path afterwards

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
