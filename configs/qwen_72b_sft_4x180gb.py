"""deepspeed --num_gpus 4 train_sft.py for Qwen2.5-VL-72B on four or more cards of 180 GB (B200), rank 16.

ZeRO-2 parts gradients and optimizer among the cards; the weights stand whole on each. With --partition_weights True 80
and 141 GB are enough: qwen_72b_sft_4x141gb.py.

    weights             73,410,777,344 x 2 B                          136.7 GiB
    adapters            222,117,888 x (6 B + 12 B / 4 ranks)            1.9 GiB
    buffers             two of 25,000,000 x 2 B for the reductions      0.1 GiB
    kept activations    80 x T x 8192 x 2 B and 32 x P x 1280 x 2 B;
                        T = 2,836, P = 8,640                            4.1 GiB
    one block redone    T x 0.46 MB                                     1.2 GiB
    together, estimated                                               144.0 GiB
"""

model_id = "Qwen/Qwen2.5-VL-72B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 1e-4  # not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 2
pack_tokens = 3_072  # two clips in a pass
gradient_checkpointing = True
dataloader_num_workers = 8
eval_data_path = None  # no room to generate beside the optimizer; python infer.py --data_path afterwards

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
