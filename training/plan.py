"""What a run will do before it runs."""

from training.memory import Load


def group_loads(prompts, completions, cfg):
    """The update's micro-batches of a rank, as train_grpo.micro_batches cuts them: a Load each.

    prompts: (tokens, patches) of each; completions: their completions' lengths, a list a prompt.
    """
    bins, tokens = [], 0  # of (prompt number, length)
    for number, lengths in enumerate(completions):
        for length in lengths:
            prompt = prompts[number][0]
            cost = length + (0 if bins and bins[-1][-1][0] == number else prompt)
            full = bins and len(bins[-1]) == cfg.per_device_train_batch_size
            if not bins or full or (cfg.pack_tokens and tokens + cost > cfg.pack_tokens):
                bins.append([])
                tokens, cost = 0, length + prompt
            bins[-1].append((number, length))
            tokens += cost
    return [_load(prompts, members) for members in bins]


def _load(prompts, members):
    """A prompt stands once, but for its last token, which begins every completion (dataset.batch.pack_groups)."""
    own = dict.fromkeys(number for number, _ in members)
    shared = sum(prompts[number][0] - 1 for number in own)
    answers = sum(length for _, length in members)
    keys = shared + sum(prompts[number][0] - 1 + length for number, length in members)
    patches = sum(prompts[number][1] for number in own)
    return Load(shared + answers, answers, patches, len(own), len(own) + len(members), keys)
