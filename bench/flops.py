"""What a batch costs: floating-point operations of one forward pass, by the shapes alone.

Products with weights grow with the tokens, attention with queries times keys, so a clip of 64 frames costs more than 16
of four. Batches are dealt to ranks by these numbers (dataset/batch.py, training/dealing.py); benchmarks divide by them.
Adapters and everything elementwise are left out. A multiplication and its addition count as two.
"""


def vision_flops(config, grid: tuple[int, int, int]) -> float:
    """The tower for one clip or image of this (t, h, w) in patches: its products with weights, and attention within
    windows and, in a few blocks, within whole grid steps."""
    v, (t, h, w) = config.vision, grid
    P, cell = t * h * w, v.spatial_merge_size**2 * v.hidden_size
    block = 4 * v.hidden_size**2 + 3 * v.hidden_size * v.intermediate_size
    embed = v.in_channels * v.temporal_patch_size * v.patch_size**2 * v.hidden_size
    merger = (cell * cell + cell * v.out_hidden_size) / v.spatial_merge_size**2
    side, whole = v.window_size // v.patch_size, len(v.fullatt_block_indexes)
    area = [n // side * side**2 + (n % side) ** 2 for n in (h, w)]  # patches x patches of the windows along each side
    keys = whole * h * w + (v.depth - whole) * area[0] * area[1] / (h * w)  # of a patch, in all blocks together
    return 2 * P * (block * v.depth + embed + merger) + 4 * P * keys * v.hidden_size


def language_flops(config, prompt: int, completions=()) -> float:
    """The layers for a prompt of so many tokens, causal, and its completions' lengths; without the head."""
    C, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    weights = 2 * C * C + 2 * C * config.num_key_value_heads * config.head_dim + 3 * C * inner
    pairs = prompt * prompt / 2 + sum(own * (prompt + own / 2) for own in completions)  # queries x keys
    return layers * (2 * (prompt + sum(completions)) * weights + 4 * pairs * C)


def head_flops(config, tokens: int) -> float:
    """The head for so many tokens."""
    return 2 * tokens * config.hidden_size * config.vocab_size


def training_flops(config, grids, tokens: int, answers: int, tower: bool = True) -> float:
    """A sample's forward and backward pass, adapters on frozen weights: the gradient goes back through every product
    once, through the tower's only if something of it is trained. grids: of its clips; answers: tokens through the
    head."""
    vision = sum(vision_flops(config, grid) for grid in grids)
    return (2 if tower else 1) * vision + 2 * (language_flops(config, tokens) + head_flops(config, answers))
