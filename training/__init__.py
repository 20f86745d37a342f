"""Behind trainer.py and the loops: the DeepSpeed engine, checkpoints, the run's log, GRPO's loss and its groups."""
