"""train_sft.py or train_grpo.py for the embedded model on two cores and little memory. The defaults are for this too;
here fewer samples go through at a time, and one thread reads clips.

Measured on two cores with 320 clips and chains of thought, resident memory at its highest, torch and its libraries
included: 990 MiB after 120 steps of SFT, of which 530 after the first.
"""

bf16 = False  # fp32: bf16 products are slower on most CPUs
pack_tokens = 4_096  # half the default: half the activations, the same update
dataloader_num_workers = 1
cache_mb = 128  # 1,000 clips of 8 frames, 56x56, take 75
