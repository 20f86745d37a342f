"""The product of a decoding step: few rows times one big frozen matrix in bf16, int8, fp8 or nf4, its adapter apart.

    out = norm(x) W^T + b + norm(x) A^T B^T        W read once, as it is stored; B holds the adapter's scale

Into low-bit weights nothing is merged: the smallest adapter reaches the sampler, and no copy of the weights exists. (In
bf16 decoder.py hands over merged weights without adapters, which is faster.) The norm's weight is in x already, whoever
wrote x put it there; what is left of the norm is one factor a row. Behind the product stand bias, SwiGLU or the
residual. x A^T costs no launch of its own: the first programs of the product compute it while the others read weights
and look for it when they are through with theirs. A GPU starts programs in their order, so nobody waits for a program
that could not start.

nf4 is decoded by byte permutes: a table in memory, or comparisons, would take longer than reading bf16.
"""

from model.quantized import NF4

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # CPU builds of torch bring none
    triton = None

KINDS = {"bf16": 16, "int8": 8, "fp8": 9, "nf4": 4}  # bits a weight; of two formats of eight the second is 9


def permutes() -> str:
    """PTX: four bytes of nf4 -> the bf16 numbers of their high halves ($0, $1) and low halves ($2, $3).

    A permute picks four of eight bytes by the low three bits of four selectors. So high and low bytes of the 16 codes
    are picked from codes 0 to 7 and from 8 to 15, and the selector's fourth bit, spread over a byte, chooses."""
    import torch

    planes = NF4.to(torch.bfloat16).view(torch.uint8).view(16, 2).T  # low bytes, high bytes
    words = [[f"0x{int.from_bytes(bytes(plane[i : i + 4].tolist()), 'little'):08x}" for i in (0, 4, 8, 12)]
             for plane in planes]  # fmt: skip
    text = ["{", ".reg .b32 u, s0, s1, m0, m1, a, b, l0, l1, h0, h1;", "shl.b32 u, $4, 4;"]
    text += ["and.b32 s0, $4, 0x7777;", "shr.u32 s1, $4, 16;", "and.b32 s1, s1, 0x7777;"]
    text += ["prmt.b32 m0, u, $4, 0xd9c8;", "prmt.b32 m1, u, $4, 0xfbea;"]  # fourth bits of four halves each
    for name, plane in zip("lh", words):
        for i in (0, 1):
            text += [f"prmt.b32 a, {plane[0]}, {plane[1]}, s{i};", f"prmt.b32 b, {plane[2]}, {plane[3]}, s{i};"]
            text += [f"lop3.b32 {name}{i}, a, b, m{i}, 0xd8;"]  # b where the mask is set, else a
    text += ["prmt.b32 $0, l0, h0, 0x7351;", "prmt.b32 $1, l1, h1, 0x7351;"]
    return "\n".join([*text, "prmt.b32 $2, l0, h0, 0x6240;", "prmt.b32 $3, l1, h1, 0x6240;", "}"])


if triton:
    PERMUTES: tl.constexpr = tl.constexpr(permutes())

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
    def halves(byte, table, ASM: tl.constexpr):
        """Bytes of nf4 -> the codes' numbers of their high and low halves. ASM: in bf16, by permutes."""
        if ASM:
            high, low = tl.inline_asm_elementwise(
                PERMUTES, "=r,=r,=r,=r,r", [byte], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
            )
        else:
            high = tl.load(table + byte.to(tl.int32) * 2)
            low = tl.load(table + byte.to(tl.int32) * 2 + 1)
        return high, low

    @triton.jit
    def inverse_rms(ssq, m, K, eps, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr):
        """1 / rms of rows m, from the sums of squares of their pieces."""
        slot = tl.arange(0, BLOCK_SLOTS)
        squares = tl.load(ssq + slot[:, None] * R_PAD + m[None, :], mask=slot[:, None] < SLOTS, other=0.0)
        return tl.rsqrt(tl.sum(squares, 0) / K + eps)

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
    def adapter_part(
        pid, x, table, cell, ssq, h, partial, counter, ready, R, eps, K: tl.constexpr, RANKS: tl.constexpr,
        SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr, SPLIT: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """h (R, RANKS) = norm(x) A^T, rounded as training rounds it; then `ready` counts one more tile of it."""
        kind = x.dtype.element_ty
        blocks: tl.constexpr = R_PAD // BLOCK_M
        tiles: tl.constexpr = blocks * (RANKS // 16)
        STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
        tile = pid % tiles
        m = tile % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        j = tile // blocks * 16 + tl.arange(0, 16)
        k = pid // tiles * (STEPS * BLOCK_K) + tl.arange(0, BLOCK_K)
        a = tl.multiple_of(tl.load(table + cell).to(tl.pointer_type(kind)), 16)
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        acc = tl.zeros([BLOCK_M, 16], tl.float32)
        for _ in range(STEPS):
            rows = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < R) & (k[None, :] < K), other=0.0)
            acc = tl.dot(rows, tl.load(a + j[None, :] * K + k[:, None], mask=k[:, None] < K, other=0.0), acc)
            k += BLOCK_K
        acc, last = last_of(acc, partial, counter, tile, tiles, pid // tiles, SPLIT, BLOCK_M, 16)
        if last:
            if SLOTS > 0:
                acc *= inverse_rms(ssq, m, K, eps, SLOTS, BLOCK_SLOTS, R_PAD)[:, None]
            tl.store(h + m[:, None] * RANKS + j[None, :], acc.to(kind), cache_modifier=".cg")
            tl.debug_barrier()
            tl.atomic_add(ready, 1, sem="release")

    @triton.jit
    def with_adapter(acc, h, b, m, n, R, N, first, RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK_R: tl.constexpr):
        """acc + h[:, first : first + RANK] B^T; h (R, RANKS), B (N, RANK)."""
        for i in tl.static_range(0, RANK, BLOCK_R):
            r = i + tl.arange(0, BLOCK_R)
            there = (m[:, None] < R) & (r[None, :] < RANK)
            u = tl.load(h + m[:, None] * RANKS + first + r[None, :], mask=there, other=0.0, cache_modifier=".cg")
            there = (n[None, :] < N) & (r[:, None] < RANK)
            acc = tl.dot(u, tl.load(b + n[None, :] * RANK + r[:, None], mask=there, other=0.0), acc)
        return acc

    @triton.jit
    def sums_of_bytes(w, w_up, x, m, rows, first, R, K: tl.constexpr, STRIDE: tl.constexpr, STEPS: tl.constexpr,
                      WHOLE: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
        """x[m, first:] @ W[rows, first:]^T over STEPS * BLOCK_K columns, and with W_up likewise; W's scales are left
        out. STRIDE: from one row of W to the next, in its own elements."""
        kind = x.dtype.element_ty
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        k = tl.arange(0, BLOCK_K)
        from_x = x + m[:, None] * K + first + k[None, :]
        place = first + rows[None, :] * STRIDE + k[:, None]
        from_w, from_up = w + place, w_up + place
        for i in range(STEPS):
            if WHOLE:
                a, b = tl.load(from_x, mask=m[:, None] < R, other=0.0), tl.load(from_w)
            else:
                left = K - first - i * BLOCK_K
                a = tl.load(from_x, mask=(m[:, None] < R) & (k[None, :] < left), other=0.0)
                b = tl.load(from_w, mask=k[:, None] < left, other=0.0)
            acc = tl.dot(a, b.to(kind), acc)
            if SWIGLU:
                b = tl.load(from_up) if WHOLE else tl.load(from_up, mask=k[:, None] < left, other=0.0)
                up = tl.dot(a, b.to(kind), up)
                from_up += BLOCK_K
            from_x += BLOCK_K
            from_w += BLOCK_K
        return acc, up

    @triton.jit
    def add_halves(acc, byte, pair, a_high, a_low, nf4, ASM: tl.constexpr):
        """acc + a tile of 128 columns: bytes (64, N), two scales (N,) in 32 bits, the columns of x for either half."""
        high, low = halves(byte, nf4, ASM)
        kind = a_high.dtype
        acc += tl.dot(a_high, high.to(kind)) * (pair << 16).to(tl.float32, bitcast=True)[None, :]
        return acc + tl.dot(a_low, low.to(kind)) * ((pair >> 16) << 16).to(tl.float32, bitcast=True)[None, :]

    @triton.jit
    def sums_of_halves(w, w_up, scales, up_scales, nf4, x, m, rows, first, R, K: tl.constexpr, STRIDE: tl.constexpr,
                       STEPS: tl.constexpr, WHOLE: tl.constexpr, SWIGLU: tl.constexpr, BLOCK_M: tl.constexpr,
                       BLOCK_N: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
        """sums_of_bytes for nf4, scales included, 128 columns a step: quantized.TILE."""
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        k = tl.arange(0, 64)
        from_x = x + m[:, None] * K + first + k[None, :]
        place = first // 2 + rows[None, :] * STRIDE + k[:, None]
        block = first // 128 + rows * (STRIDE // 64)
        from_w, from_s = w + place, scales.to(tl.pointer_type(tl.int32)) + block
        from_up, from_up_s = w_up + place, up_scales.to(tl.pointer_type(tl.int32)) + block
        for i in range(STEPS):
            left = K - first - i * 128  # of a last step beyond the row nothing is read
            there = left > 0
            if WHOLE:
                a = tl.load(from_x, mask=m[:, None] < R, other=0.0)
                b = tl.load(from_x + 64, mask=m[:, None] < R, other=0.0)
                byte, pair = tl.load(from_w), tl.load(from_s)
            else:
                a = tl.load(from_x, mask=(m[:, None] < R) & (k[None, :] < left), other=0.0)
                b = tl.load(from_x + 64, mask=(m[:, None] < R) & (k[None, :] + 64 < left), other=0.0)
                byte, pair = tl.load(from_w, mask=there, other=0), tl.load(from_s, mask=there, other=0)
            acc = add_halves(acc, byte, pair, a, b, nf4, ASM)
            if SWIGLU:
                if WHOLE:
                    byte, pair = tl.load(from_up), tl.load(from_up_s)
                else:
                    byte, pair = tl.load(from_up, mask=there, other=0), tl.load(from_up_s, mask=there, other=0)
                up = add_halves(up, byte, pair, a, b, nf4, ASM)
                from_up += 64
                from_up_s += 1
            from_x += 128
            from_w += 64
            from_s += 1
        return acc, up

    @triton.jit
    def weight_part(
        pid, x, x_scale, table, cell, bias, ssq, out, residual, ssq_out, scaled, nf4, partial, counter, h,
        ready, R, eps, N: tl.constexpr, N_0: tl.constexpr, N_1: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
        STRIDE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr, BIAS: tl.constexpr,
        SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, ASM: tl.constexpr,
        PDL: tl.constexpr,
    ):  # fmt: skip
        kind = x.dtype.element_ty
        blocks: tl.constexpr = R_PAD // BLOCK_M
        tiles: tl.constexpr = blocks * ((N + BLOCK_N - 1) // BLOCK_N)
        STEPS: tl.constexpr = (K + SPLIT * BLOCK_K - 1) // (SPLIT * BLOCK_K)
        WHOLE: tl.constexpr = K % (BLOCK_K * SPLIT) == 0
        BITS: tl.constexpr = 8 if KIND == 9 else KIND
        ELEMENT: tl.constexpr = 2 if KIND == 16 else 1  # bytes of W that are loaded as one
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
        scales_address = tl.load(table + cell + 3 + which)
        up_scales_address = tl.load(table + cell + 4) if SWIGLU else scales_address
        if PDL:
            if AHEAD > 0:
                if first + AHEAD * 8 // BITS <= K:
                    ask(address + first * BITS // 8, rows, STRIDE * ELEMENT, AHEAD, BLOCK_N)
                    if SWIGLU:
                        ask(up_address + first * BITS // 8, rows, STRIDE * ELEMENT, AHEAD, BLOCK_N)
            gdc_wait()
            gdc_launch_dependents()
        if KIND == 4:
            w = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
            w_up = tl.multiple_of(up_address.to(tl.pointer_type(tl.uint8)), 16)
            scales = scales_address.to(tl.pointer_type(tl.bfloat16))
            up_scales = up_scales_address.to(tl.pointer_type(tl.bfloat16))
            acc, up = sums_of_halves(w, w_up, scales, up_scales, nf4, x, m, rows, first, R, K, STRIDE, STEPS, WHOLE,
                                     SWIGLU, BLOCK_M, BLOCK_N, ASM)  # fmt: skip
        else:
            element = kind if KIND == 16 else tl.float8e4nv if KIND == 9 else tl.int8
            w = tl.multiple_of(address.to(tl.pointer_type(element)), 16)
            w_up = tl.multiple_of(up_address.to(tl.pointer_type(element)), 16)
            scales = scales_address.to(tl.pointer_type(tl.float32))
            up_scales = up_scales_address.to(tl.pointer_type(tl.float32))
            acc, up = sums_of_bytes(w, w_up, x, m, rows, first, R, K, STRIDE, STEPS, WHOLE, SWIGLU, BLOCK_M, BLOCK_N,
                                    BLOCK_K)  # fmt: skip
        last = True
        if SPLIT > 1:
            acc, last = last_of(acc, partial, counter, tile, tiles, pid // tiles, SPLIT, BLOCK_M, BLOCK_N)
        if last:
            if KIND == 8:
                acc *= tl.load(scales + rows)[None, :]
                up *= tl.load(up_scales + rows)[None, :]
            if KIND == 9:
                factor = tl.load(x_scale + m, mask=m < R, other=0.0)[:, None]
                acc *= factor * tl.load(scales)
                up *= factor * tl.load(up_scales)
            if SLOTS > 0:
                rstd = inverse_rms(ssq, m, K, eps, SLOTS, BLOCK_SLOTS, R_PAD)[:, None]
                acc *= rstd
                up *= rstd
            if BIAS:
                acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
            if RANK > 0:
                BLOCK_R: tl.constexpr = 64 if RANK % 64 == 0 else 16
                b = tl.multiple_of(tl.load(table + cell + 7).to(tl.pointer_type(kind)), 16)
                count = tl.atomic_add(ready, 0, sem="acquire")
                while count < blocks * (RANKS // 16):
                    count = tl.atomic_add(ready, 0, sem="acquire")
                acc = with_adapter(acc, h, b, m, n, R, N, which * RANK, RANK, RANKS, BLOCK_R)
                if SWIGLU:
                    up = with_adapter(up, h, b + N * RANK, m, n, R, N, RANK, RANK, RANKS, BLOCK_R)
            inside = (m[:, None] < R) & (n[None, :] < N)
            place = m[:, None].to(tl.int64) * N + n[None, :]
            acc = acc.to(kind).to(tl.float32)  # the same roundings as the training forward
            if SWIGLU:
                acc = acc * tl.sigmoid(acc) * up.to(kind).to(tl.float32)
            if RESIDUAL:
                acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
                acc = acc.to(kind).to(tl.float32)
                squares_out = tl.sum(tl.where(inside, acc * acc, 0.0), 1)
                tl.store(ssq_out + number * R_PAD + m, squares_out, mask=m < R_PAD)
                norm = tl.load(table + cell + 8).to(tl.pointer_type(kind))  # of the product behind this one
                norm = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
                tl.store(scaled + place, (acc * norm[None, :]).to(kind), mask=inside)
            tl.store(out + place, acc.to(kind), mask=inside)

    @triton.jit(do_not_specialize=["cell", "flag", "R"])
    def linear_kernel(
        x, x_scale, adapted, table, cell, flag, bias, ssq, out, residual, ssq_out, scaled, nf4, partial, counter, h,
        h_partial, h_counter, ready, R, eps,
        N: tl.constexpr, N_0: tl.constexpr, N_1: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr,
        STRIDE: tl.constexpr, SLOTS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, R_PAD: tl.constexpr, BIAS: tl.constexpr,
        SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, SPLIT: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
        H_SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
        AHEAD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
    ):  # fmt: skip
        """x (R, K): what W multiplies; adapted (R, K): what A multiplies, the same but for fp8. KIND: of KINDS. N_0 and
        N_1: rows of the first and second of three matrices below one another, or N and 0 of one. With SWIGLU gate is
        the first matrix and up the second, N rows each. cell: where in table this product's addresses begin, see
        decoder.CELLS. RANKS: rows of A, RANK of them for each matrix; none without adapters. SPLIT programs share the
        columns of x, H_SPLIT those for A. flag: which of `ready` is this product's."""
        helpers: tl.constexpr = R_PAD // BLOCK_M * (RANKS // 16) * H_SPLIT
        pid = tl.program_id(0)
        if RANKS > 0:
            if pid < helpers:
                adapter_part(pid, adapted, table, cell + 6, ssq, h, h_partial, h_counter, ready + flag, R, eps, K,
                             RANKS, SLOTS, BLOCK_SLOTS, R_PAD, H_SPLIT, BLOCK_M, 128, PDL)  # fmt: skip
        if pid >= helpers:
            weight_part(pid - helpers, x, x_scale, table, cell, bias, ssq, out, residual, ssq_out, scaled, nf4, partial,
                        counter, h, ready + flag, R, eps, N, N_0, N_1, K, KIND, STRIDE, SLOTS, BLOCK_SLOTS, R_PAD, BIAS,
                        SWIGLU, RESIDUAL, SPLIT, RANK, RANKS, BLOCK_M, BLOCK_N, BLOCK_K, AHEAD, ASM, PDL)  # fmt: skip
