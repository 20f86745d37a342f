"""The key names of adapters, and what PEFT makes of them.

transformers 4.52 turned Qwen2.5-VL's module tree round: `visual.*` and `model.layers.*` became `model.visual.*` and
`model.language_model.layers.*`. A PEFT adapter's keys are module names, so there are two styles, and PEFT passes over
keys that it does not know with no more than a warning: the adapter is there, and as it was before training.

What each pair of versions does was run with transformers 4.51.3 + PEFT 0.14.0, 4.57.1 + 0.17.1 and 5.23.0 + 0.21.2
(tests/make_peft4_adapter.py): the second reads both styles, the first and the last only their own.
"""

import re

from interop.saved import hf_name, our_name, split_keys

PREFIX = "base_model.model."
OLD, NEW = "transformers4", "transformers5"  # 4.51 and earlier; 4.52 and later
FIRST_WORDS = {NEW: ("model.visual.", "model.language_model."), OLD: ("visual.", "model.")}
# which style PEFT looks for there, and those it reads; whether it takes keys with the adapter's name, as of `default`
READERS = {
    "transformers 5": (NEW, {NEW}, True),
    "transformers 4.52 to 4.57": (NEW, {NEW, OLD}, False),
    "transformers 4.51": (OLD, {OLD}, False),
}
NAMED = re.compile(r"\.(lora_[AB])\.\w+\.weight$")
LOADS, PART, REFUSES = "loads it", "loads only a part of it", "refuses it: target_modules names no module there"
UNTRAINED = "loads it as untrained, with no more than a warning"


def style_of_key(key):
    """NEW or OLD; "" for a key that says nothing, such as lm_head's."""
    name = key.removeprefix(PREFIX)
    return next((style for style, words in FIRST_WORDS.items() if name.startswith(words)), "")


def styles(tensors):
    """The styles found among an adapter's keys, sorted."""
    return sorted({style_of_key(key) for key in tensors} - {""})


def modules_found(config, names, style):
    """How many of the adapter's layers (our names) target_modules finds, by PEFT's rule, in that style's tree."""
    wanted, tree = config.get("target_modules"), [hf_name(name, style == OLD) for name in names]
    if isinstance(wanted, str):
        return len(tree) if wanted == "all-linear" else sum(bool(re.fullmatch(wanted, name)) for name in tree)
    return sum(any(name == word or name.endswith(f".{word}") for word in wanted or ()) for name in tree)


def verdicts(config, tensors, folder):
    """{a range of transformers' versions: what PEFT does with the adapter there, in words}."""
    found, (layers, _) = set(styles(tensors)), split_keys(tensors, folder)
    prefixed, named = all(key.startswith(PREFIX) for key in tensors), any(NAMED.search(key) for key in tensors)
    told = {}
    for reader, (style, read, takes_names) in READERS.items():
        hit = modules_found(config, layers, style)
        if not hit:
            told[reader] = REFUSES
        elif not prefixed or not found & read or (named and not takes_names):
            told[reader] = UNTRAINED
        else:
            told[reader] = LOADS if found <= read and hit == len(layers) else PART
    return told


def renamed(config, tensors, style, folder):
    """The same adapter under the other key names -> (adapter_config, tensors).

    target_modules becomes the names of exactly its layers: a pattern for one tree may find nothing in the other. For
    NEW full names, which transformers 4.51 refuses aloud; for OLD from `layers` or `blocks` on, as they end in both
    trees, since PEFT on 4.52 to 4.57 reads such keys too.
    """
    layers, _ = split_keys(tensors, folder)
    names = [hf_name(name) if style == NEW else re.sub(r"^(model|visual)\.", "", name) for name in layers]
    rest = {"target_modules": names, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return config | rest, {renamed_key(key, style): tensor for key, tensor in tensors.items()}


def renamed_key(key, style):
    """One key in PEFT's form and the given style."""
    name = NAMED.sub(r".\1.weight", key.removeprefix(PREFIX))
    return PREFIX + hf_name(our_name(name), style == OLD)
