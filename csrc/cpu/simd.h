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

// bf16: even columns in one, odd ones in the other, so that nothing has to be widened, narrowed or moved between lanes.
inline Pair load_pair(const BFloat16* p) {
  const vuint both = read<vuint>(p);
  return {(vfloat)(both << 16), (vfloat)(both & 0xffff0000u)};
}

inline void store_pair(BFloat16* p, Pair v) {
  const vuint both = (round_to_bf16(v.a) >> 16) | (round_to_bf16(v.b) & 0xffff0000u);
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

// ---- 2^t for t <= 127, zero below -126.5; NaN stays NaN

template <int Degree>
inline vfloat exp2_fraction(vfloat f) {  // |f| <= 1/2; minimax in relative error with 2^0 = 1 exactly
  static_assert(Degree == 4 || Degree == 5, "");
  if (Degree == 4)  // 2.8e-6: an eighth of a thousandth of a bf16 step
    return (((9.582852945e-03f * f + 5.590642616e-02f) * f + 2.402409911e-01f) * f + 6.931241751e-01f) * f + 1.0f;
  return ((((1.326472731e-03f * f + 9.671512991e-03f) * f + 5.550733581e-02f) * f + 2.402224243e-01f) * f +  // 9.1e-8
          6.931470037e-01f) * f + 1.0f;
}

template <int Degree>
inline vfloat exp2_of(vfloat t) {
#if defined(__AVX512F__) && !defined(NOSCALEF)
  const vfloat whole = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction<Degree>(t - whole), whole);
#else
  constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const vfloat shifted = t + kRound;
  const vfloat power = (vfloat)(((vuint)shifted + 127u) << 23);
  return exp2_fraction<Degree>(t - (shifted - kRound)) * power;
#endif
}

}  // namespace
