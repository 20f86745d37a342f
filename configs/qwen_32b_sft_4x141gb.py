"""deepspeed --num_gpus 4 train_sft.py for Qwen2.5-VL-32B on four 141 GB cards (H200), rank 16, eight clips in a pass.

The frozen layers are parted among the cards of a machine; one computes, the next is on its way.

    weights             33,452,718,336 x 2 B, 31,841,632,256 in 4 parts    17.8 GiB
    adapters            145,752,064 x (6 B + 12 B / 4 ranks)                1.2 GiB
    layers on their way two of 487,605,248 x 2 B                            1.8 GiB
    buffers             two of 25,000,000 x 2 B for the reductions          0.1 GiB
    kept activations    64 x T x 5120 x 2 B; of the tower 94 KB x P        10.0 GiB
    one block redone    T x 0.34 MB; T = 11,344, P = 34,560                 3.6 GiB
    the rest            CUDA and its libraries, the batch                   1.4 GiB
    together, estimated                                                    35.9 GiB

36 GiB of 141: four cards of 48 GB do too. The same file runs on 2 cards (32.6 GiB of weights on each) and on 8.
"""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
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
