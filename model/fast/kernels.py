"""Triton kernels of one decoding step for a few rows, where every weight is read once and little else costs anything.

    pick_up     token ids -> embeddings, and the sum of squares of each row
    linear      in linears.py: rows x a big matrix
    round_rows  the input of a product with fp8 weights
    attention   rotary, cache write, and one query a row against the prompt's keys (shared by a group) and its own
    combine     the parts of that attention -> one
    final_norm  the last norm
    choose      logits -> one token a row and its log-prob

Two things are shared by all. `table` holds the addresses of weights and caches as int64, so that a captured graph
outlives them: a rollout frees its weights, the next one makes new ones and only rewrites the table. And with PDL
(programmatic dependent launch, Hopper and later) a kernel starts while the one before it still runs, asks for its
weights, and waits for the other's results only then; what it reads before `gdc_wait` nobody writes within a step.
Each lets the next one start only after its own wait, so that never more than two are under way.

decoder.py launches them. Their plain forms are in qwen.py, or in tests/test_gpu.py.
"""

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # CPU builds of torch bring none
    triton = None

if triton:

    @triton.jit
    def pick_up_kernel(ids, table, cell, norm_cell, x, scaled, ssq, used, ready, C: tl.constexpr, SLOTS: tl.constexpr,
                       R_PAD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr, READY: tl.constexpr,
                       PDL: tl.constexpr):  # fmt: skip
        """x, and scaled = x times the first norm's weight. ready (READY,): the step's counters of `linear`, cleared."""
        r = tl.program_id(0)
        if PDL:
            gdc_launch_dependents()
        if r == 0:  # the step's number: nobody else reads it in this kernel
            tl.store(used, tl.load(used) + 1)
            tl.store(ready + tl.arange(0, READY), tl.zeros([READY], tl.int32))
        embedding = tl.load(table + cell).to(tl.pointer_type(x.dtype.element_ty))
        c = tl.arange(0, BLOCK)
        row = tl.load(embedding + tl.load(ids + r) * C + c, mask=c < C, other=0.0)
        tl.store(x + r * C + c, row, mask=c < C)
        norm = tl.load(table + norm_cell).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(scaled + r * C + c, row.to(tl.float32) * tl.load(norm + c, mask=c < C, other=0.0), mask=c < C)
        square = tl.sum(row.to(tl.float32) * row.to(tl.float32), 0)
        slot = tl.arange(0, BLOCK_SLOTS)
        tl.store(ssq + slot * R_PAD + r, tl.where(slot == 0, square, 0.0), mask=slot < SLOTS)

    @triton.jit
    def round_rows_kernel(x, rounded, scale, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """rounded = the numbers of e4m3 nearest x / scale, scale (R,) = a row's largest / 448: quantized.rounded_rows.
        A factor of a whole row, such as the norm's, changes scale alone."""
        r = tl.program_id(0)
        k = tl.arange(0, BLOCK)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)
        size = tl.max(tl.abs(row), 0) / 448.0
        tl.store(scale + r, size)
        row = tl.minimum(tl.maximum(row / tl.where(size == 0, 1.0, size), -448.0), 448.0)
        tl.store(rounded + r * K + k, row.to(tl.float8e4nv).to(rounded.dtype.element_ty), mask=k < K)

    @triton.jit
    def turned(source, c, s, half: tl.constexpr, mask):
        """Rotary embedding of vectors behind pointers `source` to their first halves: two halves, rounded."""
        a = tl.load(source, mask=mask, other=0.0)
        b = tl.load(source + half, mask=mask, other=0.0)
        kind = a.dtype
        a, b = a.to(tl.float32), b.to(tl.float32)
        return (a * c - b * s).to(kind), (b * c + a * s).to(kind)

    @triton.jit
    def one_softmax(score, v, top, total, acc):
        """Another tile of keys into a running softmax: its scores (M, keys) float32 and values."""
        new_top = tl.maximum(top, tl.max(score, 1))
        p = tl.exp(score - new_top[:, None])
        fade = tl.exp(top - new_top)
        return new_top, total * fade + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * fade[:, None])

    @triton.jit
    def key_tile(keys, values, i, key, there, STEP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                 WIDE: tl.constexpr):  # fmt: skip
        """Keys i + key as two halves (HALF, keys) and their values (keys, WIDE); zeros where not `there`."""
        half, wide = tl.arange(0, HALF), tl.arange(0, WIDE)
        from_k = keys + (i + key)[None, :] * STEP + half[:, None]
        mask = there[None, :] & (half < D // 2)[:, None]
        k1 = tl.load(from_k, mask=mask, other=0.0)
        k2 = tl.load(from_k + D // 2, mask=mask, other=0.0)
        from_v = values + (i + key)[:, None] * STEP + wide[None, :]
        v = tl.load(from_v, mask=there[:, None] & (wide < D)[None, :], other=0.0)
        return k1, k2, v

    @triton.jit
    def shared_part(
        pid, qkv, table, cell, layer, lengths, used, cos, sin, part, part_lse, N, G, Lp, S, shared_splits, splits,
        tiles, scale, H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """The rows and heads of a group that share a kv head, against a part of their prompt."""
        kind = qkv.dtype.element_ty
        h: tl.constexpr = H // KV
        WIDTH: tl.constexpr = (H + 2 * KV) * D
        STEP: tl.constexpr = KV * D  # from one key to the next
        half, wide, key = tl.arange(0, HALF), tl.arange(0, WIDE), tl.arange(0, KEYS)
        half_in = half < D // 2
        split = pid % shared_splits
        kv = (pid // shared_splits) % KV
        tile = (pid // (shared_splits * KV)) % tiles
        prompt = pid // (shared_splits * KV * tiles)
        first = split * SPAN
        length = tl.minimum(tl.load(lengths + prompt) - first, SPAN)
        base = ((layer * N + prompt).to(tl.int64) * Lp + first) * STEP + kv * D
        keys = tl.multiple_of(tl.load(table + cell).to(tl.pointer_type(kind)), 16) + base
        values = tl.multiple_of(tl.load(table + cell + 1).to(tl.pointer_type(kind)), 16) + base
        j = tile * QUERIES + tl.arange(0, QUERIES)
        row = prompt * G + j // h
        head = kv * h + j % h
        real = j < G * h
        k1, k2, v = key_tile(keys, values, 0, key, key < length, STEP, D, HALF, WIDE)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        place = (row * H + head).to(tl.int64) * splits + split
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        if length <= 0:
            tl.store(part_lse + place, top, mask=real)
        else:
            angle = (prompt * S + tl.load(used)) * (D // 2) + half
            c = tl.load(cos + angle, mask=half_in, other=0.0).to(tl.float32)[None, :]
            s = tl.load(sin + angle, mask=half_in, other=0.0).to(tl.float32)[None, :]
            from_q = qkv + row[:, None] * WIDTH + head[:, None] * D + half[None, :]
            q1, q2 = turned(from_q, c, s, D // 2, real[:, None] & half_in[None, :])
            total = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, WIDE], tl.float32)
            score = tl.where((key < length)[None, :], tl.dot(q2, k2, tl.dot(q1, k1)) * scale, float("-inf"))
            top, total, acc = one_softmax(score, v, top, total, acc)
            for i in range(KEYS, length, KEYS):
                there = i + key < length
                k1, k2, v = key_tile(keys, values, i, key, there, STEP, D, HALF, WIDE)
                score = tl.where(there[None, :], tl.dot(q2, k2, tl.dot(q1, k1)) * scale, float("-inf"))
                top, total, acc = one_softmax(score, v, top, total, acc)
            tl.store(part_lse + place, top + tl.log(total), mask=real)
            to = part + place[:, None] * D + wide[None, :]
            tl.store(to, acc / total[:, None], mask=real[:, None] & (wide < D)[None, :])

    @triton.jit
    def own_part(
        pid, qkv, table, cell, layer, used, cos, sin, part, part_lse, N, G, S, shared_splits, own_splits, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """The heads of one row that share a kv head, against a part of the row's own keys. The part that the new token
        falls into also turns its key and writes it and its value down."""
        kind = qkv.dtype.element_ty
        h: tl.constexpr = H // KV
        WIDTH: tl.constexpr = (H + 2 * KV) * D
        STEP: tl.constexpr = KV * D
        half, wide, key = tl.arange(0, HALF), tl.arange(0, WIDE), tl.arange(0, KEYS)
        half_in = half < D // 2
        split = pid % own_splits
        kv = (pid // own_splits) % KV
        row = pid // (own_splits * KV)
        first = split * SPAN
        base = ((layer * N * G + row).to(tl.int64) * S + first) * STEP + kv * D
        keys = tl.multiple_of(tl.load(table + cell + 2).to(tl.pointer_type(kind)), 16) + base
        values = tl.multiple_of(tl.load(table + cell + 3).to(tl.pointer_type(kind)), 16) + base
        j = tl.arange(0, QUERIES)
        head = kv * h + j
        real = j < h
        # Before the wait: nothing of this step but the qkv product may still run, so the step's number is written, and
        # the keys of earlier steps are.
        now = tl.load(used) - first  # the slot of this step's token, counted from this part's first
        end = tl.minimum(now + 1, SPAN)
        k1, k2, v = key_tile(keys, values, 0, key, (key < end) & (key != now), STEP, D, HALF, WIDE)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        place = (row * H + head).to(tl.int64) * (shared_splits + own_splits) + shared_splits + split
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        if now < 0:
            tl.store(part_lse + place, top, mask=real)
        else:
            angle = (row // G * S + now + first) * (D // 2) + half
            c = tl.load(cos + angle, mask=half_in, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=half_in, other=0.0).to(tl.float32)
            from_q = qkv + row * WIDTH + head[:, None] * D + half[None, :]
            q1, q2 = turned(from_q, c[None, :], s[None, :], D // 2, real[:, None] & half_in[None, :])
            here = qkv + row * WIDTH + (H + kv) * D
            new1, new2 = turned(here + half, c, s, D // 2, half_in)
            new_v = tl.load(here + KV * D + wide, mask=wide < D, other=0.0)
            if now < SPAN:
                tl.store(keys + now * STEP + half, new1, mask=half_in)
                tl.store(keys + now * STEP + D // 2 + half, new2, mask=half_in)
                tl.store(values + now * STEP + wide, new_v, mask=wide < D)
            total = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, WIDE], tl.float32)
            for i in range(0, end, KEYS):
                new = i + key == now
                if i > 0:
                    there = (i + key < end) & (i + key != now)
                    k1, k2, v = key_tile(keys, values, i, key, there, STEP, D, HALF, WIDE)
                k1 = tl.where(new[None, :], new1[:, None], k1)
                k2 = tl.where(new[None, :], new2[:, None], k2)
                v = tl.where(new[:, None], new_v[None, :], v)
                score = tl.dot(q2, k2, tl.dot(q1, k1)) * scale
                score = tl.where((i + key < end)[None, :], score, float("-inf"))
                top, total, acc = one_softmax(score, v, top, total, acc)
            tl.store(part_lse + place, top + tl.log(total), mask=real)
            to = part + place[:, None] * D + wide[None, :]
            tl.store(to, acc / total[:, None], mask=real[:, None] & (wide < D)[None, :])

    @triton.jit(do_not_specialize=["cell", "layer", "N", "G", "shared_splits", "own_splits"])
    def attention_kernel(
        qkv, table, cell, layer, lengths, used, cos, sin, part, part_lse,
        N, G, Lp, S, shared_splits, own_splits, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
        QUERIES: tl.constexpr, OWN_QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
        OWN_SPAN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Two sorts of programs: first those of (prompt, tile of queries, kv head, part of the prompt's keys), then
        those of (row, kv head, part of its own keys). Prompt cache (L, N, Lp, KV, D), own cache (L, R, S, KV, D); out
        come parts (R, H, splits, D) float32 with their log-sum-exp (R, H, splits). SPAN keys a part, KEYS at a time."""
        tiles = (G * (H // KV) + QUERIES - 1) // QUERIES
        shared = N * KV * tiles * shared_splits
        pid = tl.program_id(0)
        if pid < shared:
            shared_part(pid, qkv, table, cell, layer, lengths, used, cos, sin, part, part_lse, N, G, Lp, S,
                        shared_splits, shared_splits + own_splits, tiles, scale, H, KV, D, HALF, WIDE, QUERIES, KEYS,
                        SPAN, PDL)  # fmt: skip
        else:
            own_part(pid - shared, qkv, table, cell, layer, used, cos, sin, part, part_lse, N, G, S, shared_splits,
                     own_splits, scale, H, KV, D, HALF, WIDE, OWN_QUERIES, KEYS, OWN_SPAN, PDL)  # fmt: skip

    @triton.jit(do_not_specialize=["splits"])
    def combine_kernel(part, part_lse, out, splits, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
                       CHUNK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
        """One (row, head) a program: parts weighted by exp of their log-sum-exp."""
        pid = tl.program_id(0).to(tl.int64)
        wide = tl.arange(0, WIDE)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        all_splits = tl.arange(0, BLOCK)
        lse = tl.load(part_lse + pid * splits + all_splits, mask=all_splits < splits, other=float("-inf"))
        top = tl.max(lse, 0)
        total = tl.sum(tl.exp(lse - top), 0)
        acc = tl.zeros([WIDE], tl.float32)
        for i in range(0, splits, CHUNK):
            j = i + tl.arange(0, CHUNK)
            weight = tl.load(part_lse + pid * splits + j, mask=j < splits, other=float("-inf"))
            there = (weight > float("-inf"))[:, None] & (wide < D)[None, :]
            o = tl.load(part + (pid * splits + j)[:, None] * D + wide[None, :], mask=there, other=0.0)
            acc += tl.sum(o * tl.exp(weight - top)[:, None], 0)
        tl.store(out + pid * D + wide, acc / total, mask=wide < D)

    @triton.jit
    def final_norm_kernel(x, weight, out, eps, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
        r = tl.program_id(0)
        c = tl.arange(0, BLOCK)
        w = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = tl.load(x + r * C + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(out + r * C + c, row * tl.rsqrt(tl.sum(row * row, 0) / C + eps) * w, mask=c < C)

    @triton.jit
    def log_weights(logits, hidden, r, token, V, scale):
        there = token < V
        there = there & (tl.load(hidden + token, mask=there, other=1) == 0)
        return tl.load(logits + r.to(tl.int64) * V + token, mask=there, other=float("-inf")).to(tl.float32) * scale

    @triton.jit(do_not_specialize=["chunks"])
    def choose_chunk_kernel(logits, hidden, seed, used, inverse, best, V, chunks, GREEDY: tl.constexpr,
                            BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
        """Of 4 BLOCK tokens of one row: the winner of the exponential race (its score, number and log-weight), and the
        chunk's largest log-weight and sum, which score and sum are relative to. hidden: (V,) uint8, 1 = never drawn.
        inverse: 1 / temperature. Noise is Philox of (the row's seed, step, token), 7 rounds as in Salmon et al., 2011
        (doi 10.1145/2063384.2063405), who find no fault with it; drawing it is most of this kernel's work."""
        r = tl.program_id(0)
        chunk = tl.program_id(1)
        i = tl.arange(0, BLOCK)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        scale = tl.load(inverse)
        step = (tl.load(used) + 1).to(tl.uint32)
        number = (chunk * BLOCK + i).to(tl.uint32)
        zero = number * 0
        key = tl.load(seed + r).to(tl.uint64)
        draws = tl.philox(key, number, zero + step, zero, zero, 7)
        top = tl.full([BLOCK], float("-inf"), tl.float32)
        for j in tl.static_range(4):
            top = tl.maximum(top, log_weights(logits, hidden, r, chunk * (4 * BLOCK) + j * BLOCK + i, V, scale))
        high = tl.max(top, 0)
        base = tl.where(high == float("-inf"), 0.0, high)
        win, win_z, total = tl.full([BLOCK], -1.0, tl.float32), top, tl.zeros([BLOCK], tl.float32)
        win_token = chunk * (4 * BLOCK) + i
        for j in tl.static_range(4):
            token = chunk * (4 * BLOCK) + j * BLOCK + i
            z = log_weights(logits, hidden, r, token, V, scale)  # again: from the nearest cache
            weight = tl.exp(z - base)
            total += weight
            score = weight
            if not GREEDY:  # -log(1 - u), u in (0, 1), to full precision where it is small: there the race is won
                u = (draws[j].to(tl.float32) + 0.5) * 2.0**-32
                race = -0.6931471805599453 * tl.log2(1.0 - tl.minimum(u, 0.99999994))
                score = weight / tl.where(u < 0.01, u * (1.0 + u * (0.5 + u * (1 / 3))), race)
            better = score > win
            win, win_z = tl.where(better, score, win), tl.where(better, z, win_z)
            win_token = tl.where(better, token, win_token)
        total = tl.sum(total, 0)
        top_win = tl.max(win, 0)
        token = tl.min(tl.where(win == top_win, win_token, V), 0)  # of equal scores the first, as argmax takes it
        z = tl.max(tl.where(win_token == token, win_z, float("-inf")), 0)
        to = best + (r * chunks + chunk) * 5
        tl.store(to, top_win)
        tl.store(to + 1, token.to(tl.float32))  # exact: below 2**24
        tl.store(to + 2, z)
        tl.store(to + 3, high)
        tl.store(to + 4, total)

    @triton.jit(do_not_specialize=["chunks", "T"])
    def choose_kernel(best, ids, all_ids, all_logp, used, chunks, V, T, BLOCK: tl.constexpr, PDL: tl.constexpr):
        """The chunks of a row -> its token, kept as input of the next step and in column used + 1 of (R, T)."""
        r = tl.program_id(0)
        j = tl.arange(0, BLOCK)
        if PDL:
            gdc_wait()
        place = best + (r * chunks + j) * 5
        tops = tl.load(place + 3, mask=j < chunks, other=float("-inf"))
        top = tl.max(tops, 0)
        fade = tl.exp(tops - top)
        at = tl.argmax(tl.load(place, mask=j < chunks, other=0.0) * fade, 0)
        # logits that are not finite may choose anything, but nothing from outside
        at = tl.maximum(tl.minimum(at, chunks - 1), 0)
        token = tl.load(best + (r * chunks + at) * 5 + 1).to(tl.int64)
        token = tl.maximum(tl.minimum(token, V - 1), 0)
        z = tl.load(best + (r * chunks + at) * 5 + 2)
        total = tl.sum(tl.load(place + 4, mask=j < chunks, other=0.0) * fade, 0)
        column = tl.load(used) + 1
        tl.store(ids + r, token)
        tl.store(all_ids + r * T + column, token)
        tl.store(all_logp + r * T + column, z - top - tl.log(total))
