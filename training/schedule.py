"""How many steps a run has, how large each is, and what happens after which.

    total = total_steps(cfg, loader)
    lr = schedule(engine, cfg, step, total)     step 0 … total-1
"""

import math


def total_steps(cfg, loader):
    """Optimizer steps of the whole run."""
    return cfg.max_steps if cfg.max_steps > 0 else loader.num_steps(cfg.num_train_epochs)


def warmup_steps(cfg, total):
    return cfg.warmup_steps or math.ceil(cfg.warmup_ratio * total)


def lr_factor(step, total, kind="cosine", warmup=0, floor=0.0):
    """Share of the peak learning rate in step 0 … total-1.

    The warm-up rises by equal amounts, from above 0 to below 1. After it, "cosine" and "linear" fall from 1 towards
    `floor`, which they would reach in step `total`; "constant" stays 1.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    fall = 1 - done if kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * fall


def set_lr(engine, factor):
    """Every group at `factor` of its peak. Returns the last group's rate: the language model's, if that is trained."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return engine.optimizer.param_groups[-1]["lr"]


def schedule(engine, cfg, step, total):
    """Set the learning rates of step 0 … total-1. Returns the language model's."""
    factor = lr_factor(step, total, cfg.lr_scheduler_type, warmup_steps(cfg, total), cfg.min_lr_ratio)
    return set_lr(engine, factor)


def is_due(every, step, total):
    """Whether something that happens every so many steps (0 = only at the end) happens after step 1 … total."""
    return step == total or (every > 0 and step % every == 0)


def saved_every(cfg, loader):
    """Steps between checkpoints; 0 = only at the end."""
    return {"steps": cfg.save_steps, "epoch": loader.steps_per_epoch, "no": 0}[cfg.save_strategy]
