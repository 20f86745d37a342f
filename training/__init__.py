"""Behind trainer.py and the loops: DeepSpeed engine, checkpoints, run log, evaluation, GRPO's loss and its groups."""
