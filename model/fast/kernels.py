"""Triton kernels of one decoding step for a few rows, where every weight is read once and little else costs anything.

    pick_up     token ids -> embeddings, and the sum of squares of each row
    linear      rows x a big matrix: the norm of its input before it, bias, SwiGLU or the residual sum behind it
    attention   rotary, cache write, and one query a row against the prompt's keys (shared by a group) and its own
    combine     the parts of that attention -> one
    final_norm  the last norm
    choose      logits -> one token a row and its log-prob

Two things are shared by all. `table` holds the addresses of weights and caches as int64, so that a captured graph
outlives them: a rollout frees its weights, the next one makes new ones and only rewrites the table. And with PDL
(programmatic dependent launch, Hopper and later) a kernel starts while the one before it still runs, asks for its
weights, and waits for the other's results only then; what it reads before `gdc_wait` nobody writes within a step.
Each lets the next one start only after its own wait, so that never more than two are under way.

decoder.py launches them. Their plain forms are in tests/test_gpu.py.
"""

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # CPU builds of torch bring none
    triton = None

if triton:

    @triton.jit
    def ask(first, rows, STRIDE: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr):
        """Have `BYTES` of each row brought to the L2 cache. first: pointer; rows: (ROWS,) int64 row numbers."""
        PIECES: tl.constexpr = 128 // ROWS if ROWS < 128 else 1  # one request a thread
        SIZE: tl.constexpr = BYTES // PIECES
        piece = tl.arange(0, PIECES)[None, :] * (SIZE // 2)
        pointers = first + rows[:, None] * STRIDE + piece
        size = tl.full([ROWS, PIECES], SIZE, tl.int32)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0", "=r,l,r", [pointers, size], tl.int32, False, 1
        )

    @triton.jit
    def pick_up_kernel(ids, table, cell, x, ssq, used, C: tl.constexpr, SLOTS: tl.constexpr, R_PAD: tl.constexpr,
                       BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
        r = tl.program_id(0)
        if PDL:
            gdc_launch_dependents()
        if r == 0:  # the step's number: nobody else reads it in this kernel
            tl.store(used, tl.load(used) + 1)
        embedding = tl.load(table + cell).to(tl.pointer_type(x.dtype.element_ty))
        c = tl.arange(0, BLOCK)
        row = tl.load(embedding + tl.load(ids + r) * C + c, mask=c < C, other=0.0)
        tl.store(x + r * C + c, row, mask=c < C)
        square = tl.sum(row.to(tl.float32) * row.to(tl.float32), 0)
        slot = tl.arange(0, BLOCK_SLOTS)
        tl.store(ssq + slot * R_PAD + r, tl.where(slot == 0, square, 0.0), mask=slot < SLOTS)

    @triton.jit(do_not_specialize=["cell", "R"])
    def linear_kernel(
        x, table, cell, bias, ssq, out, residual, ssq_out, partial, counter, R, eps,
        N: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr,
        BIAS: tl.constexpr, SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, STEPS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """out = norm(x) @ W.T, where W (N, K), or (2N, K) for SwiGLU, already holds the norm's weight: what is left of
        the norm is one factor a row. SPLIT programs share the columns of x; the last to come adds up their sums, in
        a fixed order."""
        m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        first = tl.program_id(2) * (STEPS * BLOCK_K)
        kind = x.dtype.element_ty
        w = tl.multiple_of(tl.load(table + cell).to(tl.pointer_type(kind)), 16)
        rows = tl.minimum(n, N - 1).to(tl.int64)
        if PDL:
            if AHEAD > 0:
                if first + AHEAD // 2 <= K:
                    ask(w + first, rows, K, AHEAD, BLOCK_N)
                    if SWIGLU:
                        ask(w + first + N * K, rows, K, AHEAD, BLOCK_N)
            gdc_wait()
            gdc_launch_dependents()
        if SLOTS > 0:
            slot = tl.arange(0, BLOCK_SLOTS)
            squares = tl.load(ssq + slot[:, None] * R_PAD + m[None, :], mask=slot[:, None] < SLOTS, other=0.0)
        k = tl.arange(0, BLOCK_K)
        from_x = x + m[:, None] * K + first + k[None, :]
        from_w = w + first + rows[None, :] * K + k[:, None]
        whole: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in range(STEPS):
            if whole:
                a = tl.load(from_x, mask=m[:, None] < R, other=0.0)
                b = tl.load(from_w)
            else:
                left = K - first - i * BLOCK_K
                a = tl.load(from_x, mask=(m[:, None] < R) & (k[None, :] < left), other=0.0)
                b = tl.load(from_w, mask=k[:, None] < left, other=0.0)
            acc = tl.dot(a, b, acc)
            if SWIGLU:
                if whole:
                    b = tl.load(from_w + N * K)
                else:
                    b = tl.load(from_w + N * K, mask=k[:, None] < left, other=0.0)
                up = tl.dot(a, b, up)
            from_x += BLOCK_K
            from_w += BLOCK_K
        last = True
        if SPLIT > 1:
            tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            tiles = tl.num_programs(0) * tl.num_programs(1)
            place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            tl.store(partial + (tl.program_id(2) * tiles + tile) * BLOCK_M * BLOCK_N + place, acc, cache_modifier=".cg")
            tl.debug_barrier()  # every thread's part is written before the count says so
            last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == SPLIT - 1
            if last:
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                for s in tl.static_range(SPLIT):
                    part = partial + (s * tiles + tile) * BLOCK_M * BLOCK_N + place
                    acc += tl.load(part, cache_modifier=".cg")
                tl.store(counter + tile, 0)
        if last:
            if SLOTS > 0:
                rstd = tl.rsqrt(tl.sum(squares, 0) / K + eps)
                acc *= rstd[:, None]
                up *= rstd[:, None]
            inside = (m[:, None] < R) & (n[None, :] < N)
            if BIAS:
                acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            acc = acc.to(kind).to(tl.float32)  # the same roundings as the training forward
            if SWIGLU:
                acc = acc * tl.sigmoid(acc) * up.to(kind).to(tl.float32)
            if RESIDUAL:
                acc += tl.load(residual + m[:, None] * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
                acc = acc.to(kind).to(tl.float32)
                squares_out = tl.sum(tl.where(inside, acc * acc, 0.0), 1)
                tl.store(ssq_out + tl.program_id(1) * R_PAD + m, squares_out, mask=m < R_PAD)
            tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], acc.to(kind), mask=inside)

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

    @triton.jit
    def merge_kernel(
        table, scales, like, adapter, N, K, stride, rank, ADAPTER: tl.constexpr, NORM: tl.constexpr,
        ALIGN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    ):  # fmt: skip
        """out = (W + scale B A) * norm along K, summed in float32, rounded once; the same linear of every layer.
        table (L, 5) int64: addresses of W, A, B, norm, out. like, adapter: any tensors of W's and of A's dtype.
        stride: from one row of W to the next. ALIGN: bytes that all addresses are multiples of."""
        layer = tl.program_id(2)
        kind = like.dtype.element_ty
        small = adapter.dtype.element_ty
        weight = tl.multiple_of(tl.load(table + layer * 5).to(tl.pointer_type(kind)), ALIGN)
        out = tl.multiple_of(tl.load(table + layer * 5 + 4).to(tl.pointer_type(kind)), ALIGN)
        n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(weight + n[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
        if ADAPTER:
            A = tl.multiple_of(tl.load(table + layer * 5 + 1).to(tl.pointer_type(small)), ALIGN)
            B = tl.multiple_of(tl.load(table + layer * 5 + 2).to(tl.pointer_type(small)), ALIGN)
            acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            for i in range(0, rank, BLOCK_R):
                r = i + tl.arange(0, BLOCK_R)
                b = tl.load(B + n[:, None] * rank + r[None, :], mask=(n < N)[:, None] & (r < rank)[None, :], other=0.0)
                a = tl.load(A + r[:, None] * K + k[None, :], mask=(r < rank)[:, None] & (k < K)[None, :], other=0.0)
                acc = tl.dot(b.to(kind), a.to(kind), acc)
            w += acc * tl.load(scales + layer)
        if NORM:
            norm = tl.load(table + layer * 5 + 3).to(tl.pointer_type(kind))
            w *= tl.load(norm + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        tl.store(out + n[:, None] * K + k[None, :], w, mask=inside)
