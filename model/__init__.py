"""Qwen2.5-VL by hand, in plain PyTorch. Nothing in this folder imports from the repository root.

    qwen.py       the whole mathematics in plain PyTorch      ops.py   the operations of it that have fast forms
    packed.py     a packed batch, and who attends to whom in it
    rope.py       position ids (plain ints) and rotary tables
    adapters.py   a Linear with a LoRA adapter, and the one flat parameter of a block's adapters
    quantized.py  frozen weights in 8 or 4 bits: the formats
    loading.py    config.json -> model, weights in and out
    decode.py     KV cache and sampling: one prompt prefilled once, shared by its group of completions
    fast/         faster forms of the operations and of decoding, each tested against the plain one

Dimensions, in every file of this folder:

    T packed tokens     C width            V vocabulary        L layers
    H query heads       K key/value heads  D head dimension    S segments
    P patches           M merged vision tokens (P / 4)         N clips, images or prompts
    G completions of a prompt              R rows being decoded (N * G)

This file imports nothing, so that `--help` and the error type cost no torch import.
"""


class UserError(ValueError):
    """A user's mistake in one line: what was found, what was expected, what to do. Scripts print it, exit code 2."""


def nearest(word, choices, cutoff=0.5) -> str:
    """ "; did you mean X?" with the choice that is most like a misspelt word, "" where none is."""
    from difflib import get_close_matches

    close = get_close_matches(str(word), [str(choice) for choice in choices], n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""


def nearest_path(path) -> str:
    """The same for a file or folder that is not there: at the first part of the path that leads nowhere."""
    from itertools import islice
    from pathlib import Path

    path = Path(path)
    try:
        missing = next(p for p in [*reversed(path.parents), path] if not p.exists())
        siblings = [p.name for p in islice(missing.parent.iterdir(), 10_000) if not p.name.startswith(".")]
    except (OSError, ValueError, StopIteration):  # not to be read, no name at all, or there and something else
        return ""
    hint = nearest(missing.name, siblings, cutoff=0.75)
    return hint if str(missing.parent) == "." else hint.replace("mean ", f"mean {missing.parent}/", 1)
