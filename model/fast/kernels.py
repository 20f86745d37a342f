"""Triton kernels of one decoding step for a few rows, where every weight is read once and little else costs anything.

    linear      norm(x) W^T, bias and adapter, then SwiGLU or the residual
    attention   rotary, cache write, and one query a row against the prompt's keys (shared by a group) and its own
    combine     the parts of that attention -> one
    choose      logits -> one token a row and its log-prob

Two things are shared by all. `table` holds the addresses of weights and caches as int64, so that a captured graph
outlives them: a rollout frees its weights, the next one makes new ones and only rewrites the table. And with PDL
(programmatic dependent launch, Hopper and later) a kernel starts while the one before it still runs, asks for its
weights, and waits for the other's results only then; what it reads before `gdc_wait` nobody writes within a step.
Each lets the next one start only after its own wait, so that never more than two are under way.

decoder.py launches them. Their plain forms are in qwen.py, or in tests/test_gpu.py.
"""

from model.fast.quantized import nf4_sums

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # CPU builds of torch bring none
    triton = None

if triton:
    # -- Products

    @triton.jit
    def ask(address, rows, STRIDE: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr):
        """Have `BYTES` of each row brought to the L2 cache. rows: (ROWS,) int64, STRIDE: bytes from one to the next."""
        PIECES: tl.constexpr = 128 // ROWS if ROWS < 128 else 1  # one request a thread
        SIZE: tl.constexpr = BYTES // PIECES
        pointers = address.to(tl.pointer_type(tl.int8)) + rows[:, None] * STRIDE + tl.arange(0, PIECES)[None, :] * SIZE
        size = tl.full([ROWS, PIECES], SIZE, tl.int32)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0", "=r,l,r", [pointers, size], tl.int32, False, 1
        )

    @triton.jit
    def sums(x, w, w_up, out, m, rows, first, R, K: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr,
             SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
        """x[m, first:] @ W[rows, first:]^T over STEPS * BLOCK_K columns, and with W_up likewise; scales are left out.
        Numbers of any format are multiplied in out's."""
        kind = out.dtype.element_ty
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        k = tl.arange(0, BLOCK_K)
        from_x = x + m[:, None] * K + first + k[None, :]
        place = first + rows[None, :] * K + k[:, None]
        from_w, from_up = w + place, w_up + place
        for i in range(STEPS):
            if WHOLE:
                a, b = tl.load(from_x, mask=m[:, None] < R, other=0.0), tl.load(from_w)
            else:
                left = K - first - i * BLOCK_K
                a = tl.load(from_x, mask=(m[:, None] < R) & (k[None, :] < left), other=0.0)
                b = tl.load(from_w, mask=k[:, None] < left, other=0.0)
            acc = tl.dot(a.to(kind), b.to(kind), acc)
            if SWIGLU:
                b = tl.load(from_up) if WHOLE else tl.load(from_up, mask=k[:, None] < left, other=0.0)
                up = tl.dot(a.to(kind), b.to(kind), up)
                from_up += BLOCK_K
            from_x += BLOCK_K
            from_w += BLOCK_K
        return acc, up

    @triton.jit
    def last_of(acc, partial, counter, tile, tiles, number, SPLIT: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
        """SPLIT programs have a part each of this tile's sum: (the whole sum, True) for the last of them to come. The
        parts are added up in a fixed order."""
        place = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
        tl.store(partial + (number * tiles + tile) * (M * N) + place, acc, cache_modifier=".cg")
        tl.debug_barrier()  # every thread's part is written before the count says so
        last = tl.atomic_add(counter + tile, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros([M, N], tl.float32)
            for s in tl.static_range(SPLIT):
                acc += tl.load(partial + (s * tiles + tile) * (M * N) + place, cache_modifier=".cg")
            tl.store(counter + tile, 0)
        return acc, last

    @triton.jit
    def with_adapter(acc, h, b, m, n, R, N, first, RANK: tl.constexpr, RANKS: tl.constexpr):
        """acc + h[:, first : first + RANK] B^T; h (R, RANKS), B (N, RANK)."""
        BLOCK_R: tl.constexpr = 64 if RANK % 64 == 0 else 16
        for i in tl.static_range(0, RANK, BLOCK_R):
            r = i + tl.arange(0, BLOCK_R)
            u = tl.load(h + m[:, None] * RANKS + first + r[None, :], mask=m[:, None] < R, other=0.0)
            acc = tl.dot(u, tl.load(b + n[None, :] * RANK + r[:, None], mask=n[None, :] < N, other=0.0), acc)
        return acc

    @triton.jit
    def finish(acc, up, m, n, rows, which, number, x_scale, table, cell, bias, ssq, h, out, residual, ssq_out, scaled,
               R, eps, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, SLOTS: tl.constexpr,
               BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr,
               RESIDUAL: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr):  # fmt: skip
        """From a tile's sums to its numbers of out, with the roundings of the training forward."""
        kind = out.dtype.element_ty
        if KIND == "int8" or KIND == "fp8":
            scales = tl.load(table + cell + 3 + which).to(tl.pointer_type(tl.float32))
            up_scales = tl.load(table + cell + 4).to(tl.pointer_type(tl.float32)) if SWIGLU else scales
            if KIND == "int8":
                acc *= tl.load(scales + rows)[None, :]
                up *= tl.load(up_scales + rows)[None, :]
            else:
                factor = tl.load(x_scale + m, mask=m < R, other=0.0)[:, None]
                acc *= factor * tl.load(scales)
                up *= factor * tl.load(up_scales)
        if SLOTS > 0:  # 1 / rms of each row, from the sums of squares of its pieces
            slot = tl.arange(0, BLOCK_SLOTS)
            squares = tl.load(ssq + slot[:, None] * R_PAD + m[None, :], mask=slot[:, None] < SLOTS, other=0.0)
            inverse_rms = tl.rsqrt(tl.sum(squares, 0) / K + eps)[:, None]
            acc *= inverse_rms
            up *= inverse_rms
        if BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if RANK > 0:
            b = tl.multiple_of(tl.load(table + cell + 7).to(tl.pointer_type(kind)), 16)
            acc = with_adapter(acc, h, b, m, n, R, N, which * RANK, RANK, RANKS)
            if SWIGLU:
                up = with_adapter(up, h, b + N * RANK, m, n, R, N, RANK, RANK, RANKS)
        inside = (m[:, None] < R) & (n[None, :] < N)
        place = m[:, None].to(tl.int64) * N + n[None, :]
        acc = acc.to(kind).to(tl.float32)
        if SWIGLU:
            acc = acc * tl.sigmoid(acc) * up.to(kind).to(tl.float32)
        if RESIDUAL:
            acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
            acc = acc.to(kind).to(tl.float32)
            tl.store(ssq_out + number * R_PAD + m, tl.sum(tl.where(inside, acc * acc, 0.0), 1), mask=m < R_PAD)
            norm = tl.load(table + cell + 8).to(tl.pointer_type(kind))  # of the product behind this one
            norm = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
            tl.store(scaled + place, (acc * norm[None, :]).to(kind), mask=inside)
        tl.store(out + place, acc.to(kind), mask=inside)

    @triton.jit(do_not_specialize=["cell", "R"])
    def linear_kernel(
        x, x_scale, table, cell, bias, ssq, h, out, residual, ssq_out, scaled, partial, counter, R, eps,
        N: tl.constexpr, N_0: tl.constexpr, N_1: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
        SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr, BIAS: tl.constexpr, SWIGLU: tl.constexpr,
        RESIDUAL: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """x (R, K), in e4m3 with x_scale (R,) for fp8. The norm's weight is in x already; what is left of the norm is
        one factor a row, by its sums of squares ssq (SLOTS, R_PAD); none where SLOTS is 0. N_0 and N_1: rows of the
        first and second of three matrices below one another, or N and 0 of one. With SWIGLU gate is the first matrix
        and up the second, N rows each. cell: where in table this product's addresses begin (decoder.CELLS). h
        (R, RANKS): x A^T. SPLIT programs share the columns of x; AHEAD of them are asked for before the wait."""
        element = tl.float8e4nv if KIND == "fp8" else tl.int8 if KIND == "int8" else tl.uint8
        element = out.dtype.element_ty if KIND == "bf16" else element
        BITS: tl.constexpr = 16 if KIND == "bf16" else 4 if KIND == "nf4" else 8
        ROW: tl.constexpr = (K + 127) // 128 * 64 if KIND == "nf4" else K * BITS // 8  # bytes
        blocks: tl.constexpr = R_PAD // BLOCK_M
        tiles: tl.constexpr = blocks * ((N + BLOCK_N - 1) // BLOCK_N)
        STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
        pid = tl.program_id(0)
        tile = pid % tiles
        m = tile % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        number = tile // blocks
        n = number * BLOCK_N + tl.arange(0, BLOCK_N)
        which, start = 0, 0  # of matrices that stand below one another, the one that this tile lies in
        if N_0 < N:
            which = (number * BLOCK_N >= N_0).to(tl.int32) + (number * BLOCK_N >= N_0 + N_1).to(tl.int32)
            start = tl.where(which == 0, 0, tl.where(which == 1, N_0, N_0 + N_1))
        first = pid // tiles * (STEPS * BLOCK_K)
        rows = (tl.minimum(n, N - 1) - start).to(tl.int64)
        address = tl.load(table + cell + which)
        up_address = tl.load(table + cell + 1) if SWIGLU else address
        if PDL:
            if AHEAD > 0:
                if first + AHEAD <= K:
                    ask(address + first * BITS // 8, rows, ROW, AHEAD * BITS // 8, BLOCK_N)
                    if SWIGLU:
                        ask(up_address + first * BITS // 8, rows, ROW, AHEAD * BITS // 8, BLOCK_N)
            gdc_wait()
            gdc_launch_dependents()
        w = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
        w_up = tl.multiple_of(up_address.to(tl.pointer_type(element)), 16)
        if KIND == "nf4":
            scales = tl.load(table + cell + 3 + which).to(tl.pointer_type(tl.int32))
            up_scales = tl.load(table + cell + 4).to(tl.pointer_type(tl.int32)) if SWIGLU else scales
            acc, up = nf4_sums(x, w, w_up, scales, up_scales, m, rows, first, R, K, STEPS, SWIGLU, BLOCK_M, BLOCK_N)
        else:
            acc, up = sums(x, w, w_up, out, m, rows, first, R, K, STEPS, K % (BLOCK_K * SPLIT) == 0, SWIGLU, BLOCK_M,
                           BLOCK_N, BLOCK_K)  # fmt: skip
        last = True
        if SPLIT > 1:
            acc, last = last_of(acc, partial, counter, tile, tiles, pid // tiles, SPLIT, BLOCK_M, BLOCK_N)
        if last:
            finish(acc, up, m, n, rows, which, number, x_scale, table, cell, bias, ssq, h, out, residual, ssq_out,
                   scaled, R, eps, N, K, KIND, SLOTS, BLOCK_SLOTS, R_PAD, BIAS, SWIGLU, RESIDUAL, RANK,
                   RANKS)  # fmt: skip

    # -- Attention

    @triton.jit
    def turned(source, c, s, half: tl.constexpr, mask):
        """Rotary embedding of vectors behind pointers `source` to their first halves: two halves, rounded."""
        a = tl.load(source, mask=mask, other=0.0)
        b = tl.load(source + half, mask=mask, other=0.0)
        kind = a.dtype
        a, b = a.to(tl.float32), b.to(tl.float32)
        return (a * c - b * s).to(kind), (b * c + a * s).to(kind)

    @triton.jit
    def key_tile(keys, values, slot, mask, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr):
        """Keys of some slots as two halves (HALF, keys) and their values (keys, WIDE); zeros where the mask is not."""
        half, wide = tl.arange(0, HALF), tl.arange(0, WIDE)
        from_k = keys + slot[None, :] * D + half[:, None]
        k1 = tl.load(from_k, mask=mask[None, :] & (half < D // 2)[:, None], other=0.0)
        k2 = tl.load(from_k + D // 2, mask=mask[None, :] & (half < D // 2)[:, None], other=0.0)
        from_v = values + slot[:, None] * D + wide[None, :]
        return k1, k2, tl.load(from_v, mask=mask[:, None] & (wide < D)[None, :], other=0.0)

    @triton.jit
    def attend(
        row, head, real, kv, prompt, keys, values, length, new, place, qkv, used, cos, sin, part, part_lse, S, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, OWN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Queries (row, head), QUERIES of them as far as they are real, against `length` keys of their kv head. OWN: of
        one row's own keys; `new` is the slot of this step's, which is turned, and written down with its value."""
        half, wide, key = tl.arange(0, HALF), tl.arange(0, WIDE), tl.arange(0, KEYS)
        half_in = half < D // 2
        WIDTH: tl.constexpr = (H + 2 * KV) * D
        # nothing of this step but the qkv product may still run: the keys of earlier steps are there
        k1, k2, v = key_tile(keys, values, key, (key < length) & (key != new), D, HALF, WIDE)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        top = tl.full([QUERIES], float("-inf"), tl.float32)
        if length <= 0:
            tl.store(part_lse + place, top, mask=real)
        else:
            angle = (prompt * S + tl.load(used)) * (D // 2) + half
            c = tl.load(cos + angle, mask=half_in, other=0.0).to(tl.float32)
            s = tl.load(sin + angle, mask=half_in, other=0.0).to(tl.float32)
            from_q = qkv + row[:, None] * WIDTH + head[:, None] * D + half[None, :]
            q1, q2 = turned(from_q, c[None, :], s[None, :], D // 2, real[:, None] & half_in[None, :])
            if OWN:
                here = qkv + tl.max(row, 0) * WIDTH + (H + kv) * D
                new1, new2 = turned(here + half, c, s, D // 2, half_in)
                new_v = tl.load(here + KV * D + wide, mask=wide < D, other=0.0)
                is_here = new < length
                tl.store(keys + new * D + half, new1, mask=half_in & is_here)
                tl.store(keys + new * D + D // 2 + half, new2, mask=half_in & is_here)
                tl.store(values + new * D + wide, new_v, mask=(wide < D) & is_here)
            total = tl.zeros([QUERIES], tl.float32)
            acc = tl.zeros([QUERIES, WIDE], tl.float32)
            for i in range(0, length, KEYS):
                slot = i + key
                if i > 0:
                    k1, k2, v = key_tile(keys, values, slot, (slot < length) & (slot != new), D, HALF, WIDE)
                if OWN:
                    k1 = tl.where((slot == new)[None, :], new1[:, None], k1)
                    k2 = tl.where((slot == new)[None, :], new2[:, None], k2)
                    v = tl.where((slot == new)[:, None], new_v[None, :], v)
                score = tl.dot(q2, k2, tl.dot(q1, k1)) * scale
                score = tl.where((slot < length)[None, :], score, float("-inf"))
                higher = tl.maximum(top, tl.max(score, 1))
                p, fade = tl.exp(score - higher[:, None]), tl.exp(top - higher)
                top, total = higher, total * fade + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None])
            tl.store(part_lse + place, top + tl.log(total), mask=real)
            to = part + place[:, None] * D + wide[None, :]
            tl.store(to, acc / total[:, None], mask=real[:, None] & (wide < D)[None, :])

    @triton.jit(do_not_specialize=["layer", "N", "G", "shared_splits", "own_splits"])
    def attention_kernel(
        qkv, table, layer, lengths, used, cos, sin, part, part_lse, N, G, Lp, S, shared_splits, own_splits, scale,
        H: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
        QUERIES: tl.constexpr, OWN_QUERIES: tl.constexpr, KEYS: tl.constexpr, SPAN: tl.constexpr,
        OWN_SPAN: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """Two sorts of programs: first those of (prompt, tile of its group's queries, kv head, part of the prompt's
        keys), then those of (row, kv head, part of its own keys). Prompt cache (L, N, KV, Lp, D), own cache
        (L, R, KV, S, D), their addresses at the head of the table; out come parts (R, H, splits, D) float32 with
        their log-sum-exp (R, H, splits). SPAN keys a part, KEYS at a time."""
        kind = tl.pointer_type(qkv.dtype.element_ty)
        h: tl.constexpr = H // KV
        tiles = (G * h + QUERIES - 1) // QUERIES
        splits = shared_splits + own_splits
        pid = tl.program_id(0)
        if pid < N * KV * tiles * shared_splits:
            split = pid % shared_splits
            kv = (pid // shared_splits) % KV
            j = (pid // (shared_splits * KV)) % tiles * QUERIES + tl.arange(0, QUERIES)
            prompt = pid // (shared_splits * KV * tiles)
            row, head = prompt * G + j // h, kv * h + j % h
            base = (((layer * N + prompt).to(tl.int64) * KV + kv) * Lp + split * SPAN) * D
            keys = tl.multiple_of(tl.load(table).to(kind), 16) + base
            values = tl.multiple_of(tl.load(table + 1).to(kind), 16) + base
            length = tl.minimum(tl.load(lengths + prompt) - split * SPAN, SPAN)
            place = (row * H + head).to(tl.int64) * splits + split
            attend(row, head, j < G * h, kv, prompt, keys, values, length, -1, place, qkv, used, cos, sin, part,
                   part_lse, S, scale, H, KV, D, HALF, WIDE, QUERIES, KEYS, False, PDL)  # fmt: skip
        else:
            pid -= N * KV * tiles * shared_splits
            split = pid % own_splits
            kv = (pid // own_splits) % KV
            one = pid // (own_splits * KV)  # the row
            own_head = kv * h + tl.arange(0, OWN_QUERIES)
            base = (((layer * N * G + one).to(tl.int64) * KV + kv) * S + split * OWN_SPAN) * D
            keys = tl.multiple_of(tl.load(table + 2).to(kind), 16) + base
            values = tl.multiple_of(tl.load(table + 3).to(kind), 16) + base
            new = tl.load(used) - split * OWN_SPAN  # the step's number is written before the qkv product starts
            own_place = (one * H + own_head).to(tl.int64) * splits + shared_splits + split
            attend(one + 0 * own_head, own_head, own_head < kv * h + h, kv, one // G, keys, values,
                   tl.minimum(new + 1, OWN_SPAN), new, own_place, qkv, used, cos, sin, part, part_lse, S, scale, H, KV,
                   D, HALF, WIDE, OWN_QUERIES, KEYS, True, PDL)  # fmt: skip

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

    # -- The next token

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
        number = (chunk * BLOCK + i).to(tl.uint32)
        zero = number * 0
        step = zero + (tl.load(used) + 1).to(tl.uint32)
        draws = tl.philox(tl.load(seed + r).to(tl.uint64), number, step, zero, zero, 7)
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
        top_win = tl.max(win, 0)
        token = tl.min(tl.where(win == top_win, win_token, V), 0)  # of equal scores the first, as argmax takes it
        to = best + (r * chunks + chunk) * 5
        tl.store(to, top_win)
        tl.store(to + 1, token.to(tl.float32))  # exact: below 2**24
        tl.store(to + 2, tl.max(tl.where(win_token == token, win_z, float("-inf")), 0))
        tl.store(to + 3, high)
        tl.store(to + 4, tl.sum(total, 0))

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
