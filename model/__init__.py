"""Qwen2.5-VL by hand, in plain PyTorch. Nothing in this folder imports from the repository root.

    qwen2_5_vl.py   the whole model: config.json -> modules, weights in and out, the packed forward
    language.py     decoder layers          vision.py   the vision tower and its merger
    rope.py         position ids (plain ints) and rotary tables
    attention.py    one packed attention over segments; the slow twin beside the fast paths
    sequence.py     a batch shared by several ranks: who holds and computes what, and the exchanges between them
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


def nearest(word, choices, cutoff=0.5) -> str:
    """"; did you mean X?" with the choice that is most like a misspelt word, "" where none is."""
    from difflib import get_close_matches

    close = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def nearest_path(path) -> str:
    """The same for a file or folder that is not there: at the first part of the path that leads nowhere."""
    from itertools import islice
    from pathlib import Path

    path = Path(path)
    try:
        wrong = next((p for p in [*reversed(path.parents), path] if not p.exists()), None)
        if wrong is None:  # it is there, and something else
            return ""
        there = list(islice(wrong.parent.iterdir(), 10_000)) if wrong.parent.is_dir() else []
    except (OSError, ValueError):  # not to be read, or no name at all: then there is no hint
        return ""
    found = nearest(wrong.name, [p.name for p in there if not p.name.startswith(".")], cutoff=0.75)
    return found.replace("mean ", f"mean {wrong.parent}/", 1) if found and str(wrong.parent) != "." else found
