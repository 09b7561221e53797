"""Arithmetic that Triton kernels share: float32 alone, to the last digits where a row or a sequence needs them.

A number that float32 cannot hold is a pair `(hi, lo)`, their unevaluated sum. Products that enter an error-free sum are
computed by `product`, which no compiler fuses with the addition that follows. Nothing here makes a float64 instruction:
consumer GPUs have almost no float64 units, so a float64 result (`lse`) is assembled from its bits.

The functions take scalars of a row and blocks alike.
"""

# mypy: ignore-errors
# The bodies below are Triton's language, which is typed by Triton's compiler.

from __future__ import annotations

import os

import triton
import triton.language as tl

# Under TRITON_INTERPRET=1 kernels run in numpy, on CPU tensors: no inline assembly there, no fused multiply-add, and
# narrowing a float cuts its digits off instead of rounding.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y"))

LN2_HI, LN2_LO = tl.constexpr(0.6931471824645996), tl.constexpr(-1.904654323148236e-09)
LOG2E_HI, LOG2E_LO = tl.constexpr(1.4426950216293335), tl.constexpr(1.925963033500011e-08)
TINY = tl.constexpr(2.0**-126)  # smaller gradients are set to zero: a subnormal slows the next GEMM
LOWEST = tl.constexpr(-1e20)  # stands for a logit of -inf, finite: no inf - inf, no 0 times inf can arise
FLOOR = tl.constexpr(-1e9)  # a running maximum over nothing yet, in base 2: logits below it count as -inf
INFINITY = tl.constexpr(float("inf"))
FAR, FAR_LSE = tl.constexpr(7.4e8), tl.constexpr(2.0**29)  # of far rows: |largest logit| in base 2, |lse| in nats
POWER, POWER_BITS = tl.constexpr(2.0**32), tl.constexpr(32 << 52)  # POWER times a float64: POWER_BITS more in its bits
SIGN_BIT = tl.constexpr(-(2**63))

# PTX of several instructions; tests/rows/test_ptx.py runs it. Operands, a register each: results, then arguments.
WIDEN_BF16 = tl.constexpr("""{
    .reg .b32 pair, lowest;
    mov.b32 lowest, 0xe0ade0ad;
    max.NaN.bf16x2 pair, $2, lowest;
    shl.b32 $0, pair, 16;
    and.b32 $1, pair, 0xffff0000;
}""")
BOUND_BF16 = tl.constexpr("""{
    .reg .b32 t;
    max.NaN.bf16x2 t, $1, $2;
    min.NaN.bf16x2 $0, t, $3;
}""")
JOIN_32 = tl.constexpr("""{
    .reg .pred two, one;
    .reg .b32 t;
    .reg .f32 a0, a1, a2, a3, a4;
    and.b32 t, $12, 2;
    setp.ne.u32 two, t, 0;
    and.b32 t, $12, 1;
    setp.ne.u32 one, t, 0;
    selp.f32 a0, $6, $4, two;
    selp.f32 a1, $7, $5, two;
    selp.f32 a2, $8, $6, two;
    selp.f32 a3, $9, $7, two;
    selp.f32 a4, $10, $8, two;
    selp.f32 $0, a1, a0, one;
    selp.f32 $1, a2, a1, one;
    selp.f32 $2, a3, a2, one;
    selp.f32 $3, a4, a3, one;
}""")
JOIN_16 = tl.constexpr("""{
    .reg .pred four, two;
    .reg .b32 t, a0, a1, a2, a3, a4, a5, b0, b1, b2, b3, b4;
    and.b32 t, $12, 4;
    setp.ne.u32 four, t, 0;
    and.b32 t, $12, 2;
    setp.ne.u32 two, t, 0;
    and.b32 t, $12, 1;
    shl.b32 t, t, 4;
    selp.b32 a0, $6, $4, four;
    selp.b32 a1, $7, $5, four;
    selp.b32 a2, $8, $6, four;
    selp.b32 a3, $9, $7, four;
    selp.b32 a4, $10, $8, four;
    selp.b32 a5, $11, $9, four;
    selp.b32 b0, a1, a0, two;
    selp.b32 b1, a2, a1, two;
    selp.b32 b2, a3, a2, two;
    selp.b32 b3, a4, a3, two;
    selp.b32 b4, a5, a4, two;
    shf.r.wrap.b32 $0, b0, b1, t;
    shf.r.wrap.b32 $1, b1, b2, t;
    shf.r.wrap.b32 $2, b2, b3, t;
    shf.r.wrap.b32 $3, b3, b4, t;
}""")


# ---- blocks


@triton.jit
def fma(x, y, z):
    """x y + z, rounded once."""
    if INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def exp2(t, PTX: tl.constexpr):
    """2^t, results below 2^-126 as zero; one instruction."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [t], tl.float32, True, 1)
    else:
        return tl.exp2(t)


@triton.jit
def scaled_exp2(t, factor, PTX: tl.constexpr):
    """2^t factor, subnormals as zero."""
    if PTX:
        code: tl.constexpr = "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; mul.ftz.f32 $0, e, $2; }"
        return tl.inline_asm_elementwise(code, "=f,f,f", [t, factor], tl.float32, True, 1)
    else:
        result = tl.exp2(t) * factor
        return tl.where(tl.abs(result) < TINY, 0.0, result)


@triton.jit
def scaled_exp2_twice(t, factor, other, PTX: tl.constexpr):
    """2^t factor other, subnormals as zero, also where a factor is one."""
    if PTX:
        code: tl.constexpr = "{ .reg .f32 e; mul.ftz.f32 $0, $2, $3; ex2.approx.ftz.f32 e, $1; mul.ftz.f32 $0, $0, e; }"
        return tl.inline_asm_elementwise(code, "=&f,f,f,f", [t, factor, other], tl.float32, True, 1)
    else:
        return scaled_exp2(t, tl.where(tl.abs(factor) < TINY, 0.0, factor) * other, PTX)


@triton.jit
def _larger_bf16(x, y):
    return tl.inline_asm_elementwise("max.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)


@triton.jit
def _larger_fp16(x, y):
    return tl.inline_asm_elementwise("max.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.int32, True, 1)


@triton.jit
def _cap_bound(tanh_hi):
    """Beyond it tanh is 1 to more digits than are used, and e^(2 tanh_scale x) may not fit float32."""
    return tl.full((), 125.0, tl.float32) / tanh_hi


@triton.jit
def within_cap(x, tanh_hi):
    """Logits, if there is a cap no farther from 0 than its tanh can tell; NaN stays."""
    if tanh_hi is None:
        return x
    else:
        bound = _cap_bound(tanh_hi)
        x = tl.maximum(x, -bound, propagate_nan=tl.PropagateNan.ALL)
        return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bounded_columns(x, tanh_hi, PTX: tl.constexpr, dtype: tl.constexpr):
    """On NVIDIA, bf16 within the cap or, without one, -inf as -1e20; two columns an instruction; NaN stays."""
    if PTX and dtype == tl.bfloat16 and tanh_hi is not None:
        half = (_cap_bound(tanh_hi).to(tl.int32, bitcast=True) >> 16) & 0x7FFF
        most = half | (half << 16)
        return tl.inline_asm_elementwise(BOUND_BF16, "=r,r,r,r", [x, most | -0x7FFF8000, most], tl.int32, True, 1)
    elif PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, -0x1F521F53], tl.int32, True, 1)
    else:
        return x


@triton.jit
def largest(x, REPEAT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr, PTX: tl.constexpr,
            dtype: tl.constexpr):  # fmt: skip
    """The largest logit of each lane, in float32."""
    if PTX and dtype.primitive_bitwidth == 16:  # two logits an int32
        pairs = tl.reshape(x, [REPEAT, LANES, WIDTH // 2])
        if dtype == tl.bfloat16:
            pairs = tl.reduce(tl.reduce(pairs, 2, _larger_bf16), 0, _larger_bf16)
        else:
            pairs = tl.reduce(tl.reduce(pairs, 2, _larger_fp16), 0, _larger_fp16)
        low, high = halves(pairs, dtype)
        return tl.maximum(low, high)
    else:
        return tl.max(tl.max(tl.reshape(x.to(tl.float32), [REPEAT, LANES, WIDTH]), 2), 0)


@triton.jit
def halves(x, dtype: tl.constexpr):
    """float32 of the two 16-bit logits in each int32."""
    if dtype == tl.bfloat16:
        return (x << 16).to(tl.float32, bitcast=True), (x & -0x10000).to(tl.float32, bitcast=True)
    else:
        code: tl.constexpr = "{ .reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        return tl.inline_asm_elementwise(code, "=f,=f,r", [x], (tl.float32, tl.float32), True, 1)


@triton.jit
def widen(x, tanh_hi, PTX: tl.constexpr, dtype: tl.constexpr):
    """float32 of a block of logits as `load_columns` loads them and `bounded_columns` bounds them, within the cap."""
    if PTX and dtype.primitive_bitwidth == 16:  # two logits an int32
        low, high = halves(x, dtype)
        wide = tl.reshape(tl.join(low, high), [2 * x.shape[0]])
    else:
        wide = x.to(tl.float32)
    if PTX and dtype == tl.bfloat16:
        return wide
    else:
        return within_cap(wide, tanh_hi)


@triton.jit
def widen_loaded(x, tanh_hi, PTX: tl.constexpr):
    """float32 of a block of logits, within the cap. On NVIDIA -inf in bf16 becomes -1e20, two columns an instruction;
    NaN stays."""
    if tanh_hi is not None:
        return within_cap(x.to(tl.float32), tanh_hi)
    elif PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(WIDEN_BF16, "=r,=r,r", [x], tl.int32, True, 2).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def join_columns(low, high, phase, PTX: tl.constexpr):
    """Columns phase, phase + 1, ... of each 16 bytes of `low` with the 16 bytes of `high` behind them."""
    tl.static_assert(PTX, "other targets load at any address")
    if low.dtype == tl.float32:
        return tl.inline_asm_elementwise(
            JOIN_32, "=f,=f,=f,=f,f,f,f,f,f,f,f,f,r,r,r,r", [low, high, phase], tl.float32, True, 4
        )
    else:
        return tl.inline_asm_elementwise(
            JOIN_16, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r,r,r", [low, high, phase], tl.int32, True, 4
        )


@triton.jit
def prefetch(addresses):
    """Brings the 128 bytes around each address to the L2 cache of an NVIDIA GPU."""
    code: tl.constexpr = "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }"
    tl.inline_asm_elementwise(code, "=r,l", [addresses.to(tl.int64)], tl.int32, False, 1)


@triton.jit
def bounded(t, PTX: tl.constexpr, dtype: tl.constexpr):
    """An exponent that may be multiplied by its power of two: where that is 0, t may not be -inf."""
    if PTX and dtype == tl.bfloat16:
        return t  # `widen` left no -inf
    else:
        return tl.maximum(t, -127.0)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in the dtype of the logits, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        return tl.where(x == x, rounded, x).to(dtype)
    else:
        return x.to(dtype)


# ---- pairs


@triton.jit
def product(x, y):
    """x y, rounded, and left alone by the compiler: as `x * y` it could become part of a fused multiply-add."""
    return fma(x, y, 0.0)


@triton.jit
def two_sum(x, y):
    """x + y and what its rounding lost (0 where the sum is not finite)."""
    total = x + y
    part = total - x
    lost = (x - (total - part)) + (y - part)
    return total, tl.where(lost == lost, lost, 0.0)


@triton.jit
def two_product(x, y):
    """x y and what its rounding lost (0 where the product is not finite)."""
    p = product(x, y)
    return p, tl.where(tl.abs(p) < INFINITY, fma(x, y, -p), 0.0)


@triton.jit
def add_pairs(x_hi, x_lo, y_hi, y_lo):
    hi, lost = two_sum(x_hi, y_hi)
    return two_sum(hi, lost + (x_lo + y_lo))


@triton.jit
def scale_pair(hi, lo, y_hi, y_lo):
    """(hi + lo) (y_hi + y_lo) for a constant y."""
    p, lost = two_product(hi, y_hi)
    tail = tl.where(tl.abs(hi) < INFINITY, hi * y_lo + lo * y_hi, 0.0)
    return two_sum(p, lost + tail)


# ---- elementary functions of a row's scalars, good to about one unit in the last place


@triton.jit
def quotient(x, y):
    """x / y: Triton's division alone is good to two units."""
    q = x / y
    return fma(fma(-q, y, x), 1.0 / y, q)


@triton.jit
def exp2_pair(hi, lo):
    """2^(hi + lo) for hi < 128; 0 below 2^-126."""
    h = tl.maximum(hi, -200.0)
    n = tl.floor(h + 0.5)
    y = (h - n + lo) * 0.69314718  # within 0.35
    p = y * 0.00019841270 + 0.0013888889
    p = fma(p, y, 0.0083333338)
    p = fma(p, y, 0.041666668)
    p = fma(p, y, 0.16666667)
    p = fma(p, y, 0.5)
    p = fma(p * y, y, y)
    power = ((tl.maximum(n, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    result = tl.where(n < -126.0, 0.0, fma(p, power, power))
    return tl.where(hi == hi, result, hi)


@triton.jit
def log2_pair(x):
    """log2 x as a pair, for a normal x."""
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F400000) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)  # 0.75 to 1.5
    q = quotient(m - 1.0, m + 1.0)
    s = q * q
    p = s * 0.09090909 + 0.11111111
    p = fma(p, s, 0.14285715)
    p = fma(p, s, 0.2)
    p = fma(p, s, 0.33333334)
    log2_m = fma(p * s, q, q) * 2.8853901
    return two_sum(k.to(tl.float32), tl.where(x == x, log2_m, x))


@triton.jit
def log1p(u):
    """log(1 + u) for u from 0 to 1."""
    q = quotient(u, 2.0 + u)
    s = q * q
    p = s * 0.06666667 + 0.07692308
    p = fma(p, s, 0.09090909)
    p = fma(p, s, 0.11111111)
    p = fma(p, s, 0.14285715)
    p = fma(p, s, 0.2)
    p = fma(p, s, 0.33333334)
    return 2.0 * fma(p * s, q, q)


@triton.jit
def exp(x):
    """e^x for x < 88."""
    hi, lo = scale_pair(x, 0.0, LOG2E_HI, LOG2E_LO)
    return exp2_pair(hi, lo)


@triton.jit
def expm1(x):
    """e^x - 1 for x < 88."""
    p = x * 2.7557319e-6 + 2.4801588e-5
    p = fma(p, x, 0.00019841270)
    p = fma(p, x, 0.0013888889)
    p = fma(p, x, 0.0083333338)
    p = fma(p, x, 0.041666668)
    p = fma(p, x, 0.16666667)
    p = fma(p, x, 0.5)
    return tl.where(tl.abs(x) < 0.5, fma(p * x, x, x), exp(x) - 1.0)


@triton.jit
def _log_of_others(logprob):
    """log(1 - e^logprob), of all other tokens together."""
    others = -expm1(logprob)
    k, log2_m = log2_pair(others)
    return tl.where(others > 0.0, (k + log2_m) * 0.69314718, tl.where(others == others, -INFINITY, others))


@triton.jit
def bernoulli_kl(old_logprob, logprob):
    """KL divergence of the distributions "this token or another", from its log-probabilities, at most 0."""
    of_others = -expm1(old_logprob) * (_log_of_others(old_logprob) - _log_of_others(logprob))
    found = exp(old_logprob) * (old_logprob - logprob) + tl.where(old_logprob == 0.0, 0.0, of_others)
    return tl.where(old_logprob == logprob, 0.0, found)


# ---- float64 by its bits


@triton.jit
def float64_bits(hi, lo):
    """The bits, as int64, of the float64 hi + lo, for |lo| of at most half a unit in hi's last place."""
    bits = hi.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) & 255
    mantissa = bits & 0x7FFFFF
    wide = ((exponent + 896).to(tl.int64) << 52) + (mantissa.to(tl.int64) << 29)
    wide = tl.where(exponent == 255, wide + (896 << 52), wide)
    # lo in units of the float64's last place; below 1, where that unit halves, those of the lower binade
    unit = ((306 - tl.maximum(exponent, 67)) << 23).to(tl.float32, bitcast=True)  # 2^(52 - exponent of hi)
    away = tl.where(bits < 0, -lo, lo)
    away = tl.where((mantissa == 0) & (away < 0.0), 2.0 * away, away)
    usable = (exponent > 67) & (exponent < 255)
    wide += tl.where(usable, away * unit, 0.0).to(tl.int32).to(tl.int64)
    wide = tl.where(exponent == 0, 0, wide)
    return tl.where(bits < 0, wide | SIGN_BIT, wide)


@triton.jit
def float64_pair(bits):
    """The pair of float32 that a float64, given by its bits, is the sum of; 0 for what float32 cannot hold."""
    exponent = ((bits >> 52) & 0x7FF).to(tl.int32) - 896
    mantissa = bits & 0xFFFFFFFFFFFFF
    special = exponent == 2047 - 896
    inside = (exponent > 0) & (exponent < 255)
    kept = tl.where(special, 255, tl.where(inside, exponent, 0))
    top = tl.where(inside | special, mantissa >> 29, 0).to(tl.int32)
    hi = ((kept << 23) + top).to(tl.float32, bitcast=True)
    unit = (tl.maximum(kept - 52, 0) << 23).to(tl.float32, bitcast=True)
    lo = tl.where(inside, (mantissa & 0x1FFFFFFF).to(tl.float32) * unit, 0.0)
    return tl.where(bits < 0, -hi, hi), tl.where(bits < 0, -lo, lo)
