// A vector of floats as wide as the instruction set this file is compiled for, from the compiler's vector extension:
// one source for AVX-512, AVX2, baseline x86-64 and arm64. Included once per instruction set, inside its own namespace.
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vfloat __attribute__((vector_size(4 * kLanes)));
typedef double vdouble __attribute__((vector_size(8 * kLanes)));
typedef int32_t vint __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vuint __attribute__((vector_size(4 * kLanes)));
typedef uint16_t vshort __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline vfloat broadcast(float x) { return x - vfloat{}; }

// The second operand wins where either is NaN, so `at_least(floor, x)` keeps the NaN of x.
inline vfloat at_least(float floor, vfloat x) {
#if defined(__AVX512F__)
  return _mm512_max_ps(_mm512_set1_ps(floor), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_set1_ps(floor), x);
#else
  return x < floor ? broadcast(floor) : x;
#endif
}

inline vfloat maximum(vfloat a, vfloat b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// a * b - c, rounded once where kFused, twice elsewhere.
inline vfloat multiply_subtract(vfloat a, float b, float c) {
#if defined(__AVX512F__)
  return _mm512_fmsub_ps(a, _mm512_set1_ps(b), _mm512_set1_ps(c));
#elif defined(__FMA__)
  return _mm256_fmsub_ps(a, _mm256_set1_ps(b), _mm256_set1_ps(c));
#else
  return a * b - c;
#endif
}

// a * b + c, the same.
inline vfloat multiply_add(vfloat a, vfloat b, vfloat c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

#if defined(__FMA__) || defined(__AVX512F__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif

inline bool all_at_most(float limit, vfloat v) {  // a NaN is not
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, _mm512_set1_ps(limit), _CMP_NLE_UQ) == 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_set1_ps(limit), _CMP_NLE_UQ)) == 0;
#elif defined(__x86_64__)
  return _mm_movemask_ps(_mm_cmpnle_ps(v, _mm_set1_ps(limit))) == 0;
#else
  bool all = true;
  for (int i = 0; i < kLanes; ++i) all &= v[i] <= limit;
  return all;
#endif
}

inline float largest(vfloat v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

inline double total(vdouble v) {  // fixed order: pairs, then pairs of pairs
  double lanes[kLanes];
  std::memcpy(lanes, &v, sizeof v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

template <class V>
inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- logits in memory <-> floats in registers

inline vfloat load(const float* p) { return read<vfloat>(p); }

inline vfloat load(const BFloat16* p) {
  return (vfloat)(__builtin_convertvector(read<vshort>(p), vuint) << 16);
}

inline vfloat load(const Float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(read<__m256i>(p));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(read<__m128i>(p));
#else
  const vuint half = __builtin_convertvector(read<vshort>(p), vuint);
  const vuint sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const vuint normal = (magnitude << 13) + (112u << 23) + ((magnitude >= 0x7c00u) & (112u << 23));
  const vfloat subnormal = __builtin_convertvector((vint)magnitude, vfloat) * 0x1p-24f;
  return (vfloat)(sign | (magnitude < 0x400u ? (vuint)subnormal : normal));
#endif
}

inline void store(float* p, vfloat v) { std::memcpy(p, &v, sizeof v); }

inline vuint round_to_bf16(vfloat v) {  // to nearest even, in the upper half; a NaN that arithmetic made stays one
  const vuint bits = (vuint)v;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline void store(BFloat16* p, vfloat v) {
  const vshort rounded = __builtin_convertvector(round_to_bf16(v) >> 16, vshort);
  std::memcpy(p, &rounded, sizeof rounded);
}

inline void store(Float16* p, vfloat v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
  const __m128i half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &half, sizeof half);
#else
  const vuint bits = (vuint)v;
  const vuint sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const vuint normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vuint subnormal = (vuint)((vfloat)magnitude + 0.5f) - (126u << 23);  // the adder rounds to 2^-24 for us
  vuint half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u + vuint{} : half;  // 65,520 and up round to infinity
  half = magnitude > (255u << 23) ? 0x7e00u + vuint{} : half;
  const vshort packed = __builtin_convertvector(sign | half, vshort);
  std::memcpy(p, &packed, sizeof packed);
#endif
}

// ---- two vectors at a time, where it does not matter which column lands in which lane

struct Pair {
  vfloat a, b;
};

template <class T>
inline Pair load_pair(const T* p) {
  return {load(p), load(p + kLanes)};
}

template <class T>
inline void store_pair(T* p, Pair v) {
  store(p, v.a);
  store(p + kLanes, v.b);
}

#if defined(__AVX2__)
typedef uint16_t vwords __attribute__((vector_size(4 * kLanes)));

inline vuint interleave(vuint even, vuint odd) {  // 16-bit numbers: the even ones of one, the odd ones of the other
#if defined(__AVX512F__)
  return (vuint)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)even, (__m512i)odd);
#else
  return (vuint)_mm256_blend_epi16((__m256i)even, (__m256i)odd, 0xaa);
#endif
}

inline vuint average(vuint x, vuint y) {  // of unsigned 16-bit numbers, rounded up
#if defined(__AVX512F__)
  return (vuint)_mm512_avg_epu16((__m512i)x, (__m512i)y);
#else
  return (vuint)_mm256_avg_epu16((__m256i)x, (__m256i)y);
#endif
}
#endif

// bf16: even columns in one, odd ones in the other, so that nothing has to be widened, narrowed or moved between lanes.
inline Pair load_pair(const BFloat16* p) {
  const vuint both = read<vuint>(p);
  return {(vfloat)(both << 16), (vfloat)(both & 0xffff0000u)};
}

// As round_to_bf16, for both columns of a 32-bit lane at once: 8 operations instead of 10. The upper halves of the two
// floats form one vector of 16-bit numbers, the lower halves another. An upper half is rounded up where its lower half
// plus 0x7fff plus its own last bit carries; the average of 16-bit numbers, (x + y + 1) / 2, keeps that carry.
inline void store_pair(BFloat16* p, Pair v) {
#if defined(__AVX2__)
  const vuint a = (vuint)v.a, b = (vuint)v.b;
  const vuint upper = interleave(a >> 16, b), lower = interleave(a, b << 16);
  const vuint half = (upper & 0x00010001u) | 0x7ffe7ffeu;
  const vuint both = (vuint)((vwords)upper + ((vwords)average(lower, half) >> 15));
#else
  const vuint both = (round_to_bf16(v.a) >> 16) | (round_to_bf16(v.b) & 0xffff0000u);
#endif
  std::memcpy(p, &both, sizeof both);
}

// ---- stores that bypass the caches; p is aligned to the width of a vector

inline void stream_zeros(char* p) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), _mm512_setzero_ps());
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), _mm256_setzero_ps());
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(p), _mm_setzero_ps());
#else
  std::memset(p, 0, sizeof(vfloat));
#endif
}

inline void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- factor * 2^t for t <= 127, zero below -126.5; NaN stays NaN

// The coefficients of a polynomial for factor * 2^f, |f| <= 1/2: minimax in relative error, exact at f = 0.
template <int Degree>
struct Exp2 {
  static_assert(Degree == 4 || Degree == 5, "");
  float c[Degree + 1];

  explicit Exp2(float factor) {
    constexpr float kFour[] = {1.0f, 6.931241751e-01f, 2.402409911e-01f, 5.590642616e-02f,  // 2.8e-6: an eighth of a
                               9.582852945e-03f};                                           // thousandth of a bf16 step
    constexpr float kFive[] = {1.0f, 6.931470037e-01f, 2.402224243e-01f, 5.550733581e-02f, 9.671512991e-03f,  // 9.1e-8
                               1.326472731e-03f};
    for (int i = 0; i <= Degree; ++i) c[i] = factor * (Degree == 4 ? kFour : kFive)[i];
  }

  vfloat operator()(vfloat t) const {
#if defined(__AVX512F__)
    const vfloat whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(polynomial(t - whole), whole);
#else
    constexpr float kRound = 0x1.8p23f + 127.0f;  // adding it leaves the exponent of a float in the low bits
    const vfloat shifted = t + kRound;
    return polynomial(t - (shifted - kRound)) * (vfloat)((vuint)shifted << 23);
#endif
  }

 private:
  vfloat polynomial(vfloat f) const {
    vfloat p = f * c[Degree] + c[Degree - 1];
    for (int i = Degree - 2; i >= 0; --i) p = p * f + c[i];
    return p;
  }
};

// ---- tanh, more precisely than one float can hold it: a cap of 30 multiplies its rounding error by 30

// y = whole + part, unrounded: whole is 0 or +-1, and |part| at most 1/2.
struct TanhParts {
  vfloat whole, part;
  vfloat slope() const {  // 1 - y^2 = (1 - |y|)(1 + |y|), to all its digits
    const vfloat size = (vfloat)((vuint)part & 0x7fffffffu);
    return (whole == 0.0f ? broadcast(1.0f) : size + size) - size * size;
  }
};

// tanh(tanh_scale * x) from E = e^2u, u = tanh_scale * |x|: it is (E - 1) / (E + 1), or 1 - 2 / (E + 1) above 1/2. E is
// power * (1 + p), which is never rounded, and the quotient is corrected by what rounding took from its parts. Infinities
// are taken as large numbers, NaN stays NaN.
class Tanh {
 public:
  explicit Tanh(double tanh_scale)
      : exponent_(2.0 * 1.44269504088896340736 * tanh_scale), high_(static_cast<float>(exponent_)),
        low_(static_cast<float>(exponent_ - high_)), limit_(static_cast<float>(126.0 / exponent_)) {}

  TanhParts operator()(vfloat x) const {
    const vuint sign = (vuint)x & 0x80000000u;
    vfloat size = (vfloat)((vuint)x & 0x7fffffffu);
    size = size > limit_ ? broadcast(limit_) : size;  // and not at_most, which could lose a NaN
    constexpr float kRound = 0x1.8p23f + 127.0f;  // as in Exp2
    const vfloat shifted = multiply_add(size, broadcast(high_), broadcast(kRound)), n = shifted - kRound;
    const vfloat power = (vfloat)((vuint)shifted << 23);
    const vfloat f = remainder(size, n);
    constexpr float kCoefficients[] = {6.931471825e-01f, 2.402264923e-01f, 5.550367385e-02f,  // of 2^f - 1, minimax in
                                       9.618307464e-03f, 1.338738948e-03f, 1.538365614e-04f};  // relative error: 1.3e-8
    vfloat p = broadcast(kCoefficients[5]);
    for (int i = 4; i >= 0; --i) p = multiply_add(p, f, broadcast(kCoefficients[i]));
    p = p * f;
    const vfloat above = multiply_add(power, p, power - 1.0f);  // E - 1
    const vint is_small = above < 2.0f;
    const vfloat q = kFused ? quotient(power, p, above, is_small) : wide_quotient(power, p, is_small);
    const vuint whole = is_small ? vuint{} : (vuint)broadcast(1.0f) | sign;
    const vuint part = (vuint)q ^ (is_small ? sign : sign ^ 0x80000000u);
    return {(vfloat)whole, (vfloat)part};
  }

 private:
  vfloat remainder(vfloat size, vfloat n) const {  // size * exponent - n
    if constexpr (kFused) return multiply_add(size, broadcast(low_), multiply_add(size, broadcast(high_), -n));
    const vdouble wide = __builtin_convertvector(size, vdouble) * exponent_ - __builtin_convertvector(n, vdouble);
    return __builtin_convertvector(wide, vfloat);
  }

  // (E - 1) / (E + 1) where it is small, else 2 / (E + 1)
  static vfloat quotient(vfloat power, vfloat p, vfloat above, vint is_small) {
    const vfloat below = multiply_add(power, p, power + 1.0f), reciprocal = 1.0f / below;
    const vfloat lost_above = multiply_add(power, p, power - 1.0f - above);
    const vfloat lost_below = multiply_add(power, p, power + 1.0f - below);
    const vfloat top = is_small ? above : broadcast(2.0f), q = top * reciprocal;
    const vfloat rest = multiply_add(-q, below, top) + ((is_small ? lost_above : vfloat{}) - q * lost_below);
    return multiply_add(rest, reciprocal, q);
  }

  static vfloat wide_quotient(vfloat power, vfloat p, vint is_small) {
    const vdouble wide = __builtin_convertvector(power, vdouble);
    const vdouble exponential = wide + wide * __builtin_convertvector(p, vdouble);
    const vfloat small = __builtin_convertvector((exponential - 1.0) / (exponential + 1.0), vfloat);
    const vfloat large = __builtin_convertvector(2.0 / (exponential + 1.0), vfloat);
    return is_small ? small : large;
  }

  double exponent_;
  float high_, low_, limit_;
};

// Whether a t that is out of range shows in the result: infinity for t >= 128, 0 for t below -150 (for -infinity, some
// processors say NaN). Where it does not, anything can come of t > 127 and t < -127.
#if defined(__AVX512F__)
constexpr bool kSaturates = true;
#else
constexpr bool kSaturates = false;
#endif

}  // namespace
