"""What a step costs by its shapes alone: floating-point operations, a multiplication and its addition counted as two.

Products with weights grow with the tokens, attention with queries times keys. They are counted apart: with frozen
weights a product's backward pass is one more product (the gradient to its input), while FlashAttention's backward is
2.5 times its forward (five products instead of two; Dao, 2023). Adapters and everything elementwise are left out.
"""

ATTENTION_BACKWARD = 2.5  # times the forward pass


def vision_flops(config, grid: tuple[int, int, int]) -> tuple[float, float]:
    """(products, attention) of the tower's forward pass over one clip of this (t, h, w) in patches: attention within
    windows and, in a few blocks, within whole grid steps."""
    v, (t, h, w) = config.vision, grid
    P, cell = t * h * w, v.spatial_merge_size**2 * v.hidden_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    merger = (cell * cell + cell * v.out_hidden_size) / v.spatial_merge_size**2
    side, whole = v.window_size // v.patch_size, len(v.fullatt_block_indexes)
    area = [n // side * side**2 + (n % side) ** 2 for n in (h, w)]  # patches x patches of the windows along each side
    keys = whole * h * w + (v.depth - whole) * area[0] * area[1] / (h * w)  # of a patch, in all blocks together
    return 2 * P * (block * v.depth + embed + merger), 4 * P * keys * v.hidden_size


def language_flops(config, prompt: int, completions=()) -> tuple[float, float]:
    """(products, attention) of the layers' forward pass over a prompt of so many tokens, causal, and its completions'
    lengths; without the head."""
    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = 2 * C * C + 2 * C * config.num_key_value_heads * config.head_dim + 3 * C * inner
    pairs = prompt * prompt / 2 + sum(own * (prompt + own / 2) for own in completions)  # queries x keys
    return layers * 2 * (prompt + sum(completions)) * weights, layers * 4 * pairs * C


def head_flops(config, tokens: int) -> float:
    """The head's forward pass for so many tokens."""
    return 2 * tokens * config.hidden_size * config.vocab_size


def forward_flops(config, grids, prompt: int, completions=(), head_tokens: int = 0) -> float:
    """One forward pass over clips of these grids, their prompt once, and its completions."""
    bodies = [vision_flops(config, grid) for grid in grids] + [language_flops(config, prompt, completions)]
    return sum(map(sum, bodies)) + head_flops(config, head_tokens)


def training_flops(config, grids, prompt: int, answers: int, completions=(), recompute: bool = False) -> float:
    """Forward and backward pass with adapters on frozen weights, tower included. answers: tokens through the head,
    whose logits are made again in the backward pass. recompute: the blocks' forward pass is made again as well."""
    bodies = [vision_flops(config, grid) for grid in grids] + [language_flops(config, prompt, completions)]
    products, attention = map(sum, zip(*bodies))
    again = products + attention if recompute else 0.0
    return 2 * products + (1 + ATTENTION_BACKWARD) * attention + again + 3 * head_flops(config, answers)
