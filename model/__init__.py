"""Qwen2.5-VL by hand, in plain PyTorch. Nothing in this folder imports from the repository root.

    qwen2_5_vl.py   the whole model: config.json -> modules, weights in and out, the packed forward
    language.py     decoder layers          vision.py   the vision tower and its merger
    rope.py         position ids (plain ints) and rotary tables
    attention.py    one packed attention over segments; the slow twin beside the fast paths
    decode.py       KV cache and sampling: one prompt prefilled once, shared by its group of completions
    loss.py         log-probs of target tokens without the (T, V) logits

Dimensions, in every file of this folder:

    T packed tokens     C width            V vocabulary        L layers
    H query heads       K key/value heads  D head dimension    S segments
    P patches           M merged vision tokens (P / 4)         N clips, images or prompts
    G completions of a prompt              R rows being decoded (N * G)

This file imports nothing, so that `--help` and the error type cost no torch import.
"""


class UserError(ValueError):
    """A user's mistake, told in one line: what, found, expected, what to do. Scripts print it and exit with code 2."""
