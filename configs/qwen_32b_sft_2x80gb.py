"""deepspeed --num_gpus 2 train_sft.py for Qwen2.5-VL-32B on two or more 80 GB cards, rank 16.

ZeRO-2 parts gradients and optimizer among the cards; the weights stand whole on each.

    weights             33,452,718,336 x 2 B                           62.3 GiB
    adapters            145,752,064 x (6 B + 12 B / 2 ranks)            1.6 GiB
    buffers             two of 25,000,000 x 2 B for the reductions      0.1 GiB
    kept activations    64 x T x 5120 x 2 B and 32 x P x 1280 x 2 B;
                        T = 2,836, P = 8,640                            2.4 GiB
    one block redone    T x 0.37 MB                                     1.0 GiB
    together, estimated                                                67.4 GiB

--partition_weights True parts them too, see qwen_32b_sft_4x141gb.py; GRPO of this size needs that.
"""

model_id = "Qwen/Qwen2.5-VL-32B-Instruct"
lora_rank = 16
lora_alpha = 32
learning_rate = 1e-4  # not tuned
warmup_ratio = 0.03
num_train_epochs = 1
adam_beta2 = 0.999

per_device_train_batch_size = 2
gradient_accumulation_steps = 2
pack_tokens = 3_072  # two clips in a pass
gradient_checkpointing = True
dataloader_num_workers = 8
eval_data_path = None  # no room to generate beside the optimizer; python infer.py --data_path afterwards

fps = 2.0
video_min_pixels = None
video_max_pixels = 252 * 420
