// Capped logits: y = tanh(tanh_scale * x), of which a row's z is y / temperature (csrc/row_math.h).
//
// With E = e^(2 tanh_scale x), y is (E - 1) / (E + 1). What the kernels compute is how far y is from that of a pivot, a
// number P that takes E's place:
//
//     y - y_P = 2 / (P + 1) * (E - P) / (E + 1),        1 - y^2 = 4 E / (E + 1)^2
//
// So y itself, whose rounding to float is worth 2e-6 in a log-probability at a cap of 30, is never rounded; E is not
// rounded before P is subtracted from it; and where y is near y_P, or near 1, no digits are lost.
#pragma once

#include "columns.cuh"

namespace gspo::gpu {

struct NoCap {
  static constexpr bool kCapped = false;
  __device__ __forceinline__ explicit NoCap(double) {}
  __device__ __forceinline__ float bounded(float x) const { return x; }
};

constexpr float kLeastPower = 0x1p-125f;  // of bounded logits, and about the least E / (E + 1)^2
constexpr float kMostPivot = 0x1p60f;     // its y is 1 to all digits of a double

struct TanhCap {
  static constexpr bool kCapped = true;
  float high, low;  // E = 2^(x (high + low))
  float bound;      // beyond it tanh is 1, and E may not fit a float

  __device__ __forceinline__ explicit TanhCap(double tanh_scale) {
    const double exponent = 2.0 * kLog2e * tanh_scale;
    high = static_cast<float>(exponent);
    low = static_cast<float>(exponent - high);
    bound = 125.0f / high;
  }

  struct Power {  // E = power * (1 + part), where power is a power of two; part is good to 2e-8
    float power, part;
    __device__ __forceinline__ float minus(float pivot) const { return fmaf(power, part, power - pivot); }
    __device__ __forceinline__ float value() const { return fmaf(power, part, power); }
  };

  __device__ __forceinline__ Power power(float x) const {  // of a bounded logit
    constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23: added to n, it leaves n + 127 in the lowest bits
    const float shifted = fmaf(x, high, kShift), n = shifted - kShift;
    const float f = fmaf(x, low, fmaf(x, high, -n));  // from -1/2 to 1/2
    float p = fmaf(f, 0.00015403512f, 0.0013390736f);
    p = fmaf(p, f, 0.009618238f);
    p = fmaf(p, f, 0.055503573f);
    p = fmaf(p, f, 0.24022649f);
    return {as_float(as_bits(shifted) << 23), fmaf(p, f, 0.69314718f) * f};
  }

  __device__ __forceinline__ float bounded(float x) const { return bounded_number(x, bound); }

  // (E - P) / (E + 1), to be multiplied by `steepness`: that is t. The unit in the last place that the reciprocal may be
  // off changes 2^t by at most 6e-8: it is relative to t, and t 2^t is 0.53 at most.
  __device__ __forceinline__ float above(float x, float pivot) const {
    const Power e = power(x);
    return e.minus(pivot) * reciprocal(e.minus(-1.0f));
  }

  // The pivot that belongs to a logit.
  __device__ __forceinline__ float pivot_of(float x) const { return fminf(power(bounded(x)).value(), kMostPivot); }
};

// 1 / x, rounded: the step leaves the square of an error.
__device__ __forceinline__ float rounded_reciprocal(float x) {
  const float r = reciprocal(x);
  return fmaf(fmaf(-r, x, 1.0f), r, r);
}

// (y - y_P) scale is this times TanhCap::above. Rounded once, for its error is one of every t.
__device__ __forceinline__ float steepness(float pivot, float scale) {
  const float whole = pivot + 1.0f, part = pivot < 1.0f ? pivot - (whole - 1.0f) : 1.0f - (whole - pivot);
  const float r = reciprocal(whole), q = 2.0f * scale * r;
  return fmaf(fmaf(-q, whole, 2.0f * scale) - q * part, r, q);
}

// (y_P - y_Q) scale, where Q is a pivot of this steepness.
__device__ __forceinline__ float from_pivot_to(float pivot, float other, float steep) {
  return (pivot - other) * rounded_reciprocal(pivot + 1.0f) * steep;
}

__device__ __forceinline__ double level_of(double pivot) { return (pivot - 1.0) / (pivot + 1.0); }

__device__ __forceinline__ float pivot_near(double y) {  // whose y is about this
  const double bounded = fmin(fmax(y, -1.0), 1.0);
  return fminf(static_cast<float>((1.0 + bounded) / fmax(1.0 - bounded, 0x1p-24)), kMostPivot);
}

// A vector's columns, within the cap. Of bfloat16 two an instruction.
template <class T>
__device__ __forceinline__ void unpack(const Vector& v, float (&x)[Columns<T>::kWidth], const TanhCap& cap) {
  if constexpr (sizeof(T) == 2 && !std::is_same<T, Float16>::value) {
    const uint32_t half = as_bits(cap.bound) >> 16, most = half << 16 | half;
    Vector within;
#pragma unroll
    for (int i = 0; i < 4; ++i) within.words[i] = bounded_pair(v.words[i], most);
    unpack(within, x, T{});
  } else {
    unpack(v, x, T{});
#pragma unroll
    for (float& one : x) one = cap.bounded(one);
  }
}

template <class T>
__device__ __forceinline__ void unpack(const Vector& v, float (&x)[Columns<T>::kWidth], const NoCap&) {
  unpack(v, x, T{});
}

}  // namespace gspo::gpu
