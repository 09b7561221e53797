// A row's gradient, written from its columns and a few numbers (RowGradient of csrc/row_math.h).
#pragma once

#include "../row_math.h"
#include "tanh.cuh"

namespace gspo::gpu {

__device__ __forceinline__ float gradient_of_number(float x, const RowGradient& row, const NoCap&) {
  return multiply_flushed(exp2_flushed(fmaf(x, row.scale, -row.base)), row.constant);
}

// With a cap, base and scale are relative to a pivot, and the constant has the factor 4 tanh_scale.
struct CappedRowGradient : RowGradient {
  float pivot;
};

template <class Cap>
using GradientOf = std::conditional_t<Cap::kCapped, CappedRowGradient, RowGradient>;

__device__ __forceinline__ float gradient_of_number(float x, const CappedRowGradient& row, const TanhCap& cap) {
  const TanhCap::Power power = cap.power(x);
  const float e = power.value(), up = power.minus(row.pivot), down = power.minus(-1.0f);
  const float r = reciprocal(down), q = up * r;
  const float t = fmaf(fmaf(fmaf(-q, down, up), r, q), row.scale, -row.base);
  // The derivative of tanh over 4; subnormal where the logit was changed to be within the cap.
  const float derivative = fmaf(e * r, r, -kLeastPower);
  return multiply_flushed(exp2_flushed(t), multiply_flushed(derivative, row.constant));
}

template <class T, class Row, class Cap>
__device__ __forceinline__ Vector gradient_of_vector(const Vector& v, const Row& row, const Cap& cap) {
  float x[Columns<T>::kWidth];
  unpack<T>(v, x, cap);
#pragma unroll
  for (float& one : x) one = gradient_of_number(one, row, cap);
  return packed(x, T{});
}

// The two edges of a gradient, by the threads that have them.
template <class T, class F>
__device__ __forceinline__ void write_edges(const Span<T>& to, int columns, T* g, const F& number) {
  if (threadIdx.x >= 2) return;
  const int v = to.edge(threadIdx.x);
  for (int i = 0; v >= 0 && i < Columns<T>::kWidth; ++i) {
    const int column = to.column(v, i);
    if (column >= 0 && column < columns) g[column] = narrow(number(column), T{});
  }
}

// From whole vectors where the gradient and its logits lie alike to the 16-byte boundaries, else column by column.
// `next`: the next row's slice, whose copy into the same buffer begins here; it and the gradient lie as this slice
// does. A thread then reads its own vectors and edge only, so it may replace each one after it has read it, without a
// barrier. Null: nothing is copied yet.
template <int kThreads, class T, class Source, class Row, class Cap>
__device__ __forceinline__ void write_gradient(const Slice<T>& slice, const Source& source, T* g, const Row& row,
                                               const Cap& cap, const Slice<T>* next) {
  constexpr int kWidth = Columns<T>::kWidth;
  const Span<T> to(g, slice.columns);
  auto* const vectors = reinterpret_cast<Vector*>(g - to.phase);
  const int last = to.last;
  const auto number = [&](int column) { return gradient_of_number(cap.bounded(source.column(column)), row, cap); };
  if (to.phase == slice.span.phase) {
    const auto write = [&](int v, const Vector& x) { store(vectors + v, gradient_of_vector<T>(x, row, cap)); };
    [[maybe_unused]] const Vector* const from = next ? next->vectors() : nullptr;
    const auto replace = [&]([[maybe_unused]] int v) {  // after `write`, which uses what was read there
      if constexpr (Source::kResident) source.start_vector_if(next != nullptr, v, from);
    };
    int v = to.first + static_cast<int>(threadIdx.x);
    for (; v < last - kThreads; v += 2 * kThreads) {
      const Vector one = source.whole(v), other = source.whole(v + kThreads);
      write(v, one);
      write(v + kThreads, other);
      replace(v);
      replace(v + kThreads);
    }
    if (v < last) {
      write(v, source.whole(v));
      replace(v);
    }
  } else {
#pragma unroll 1
    for (int v = to.first + static_cast<int>(threadIdx.x); v < last; v += kThreads) {
      float x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = number(to.column(v, i));
      store(vectors + v, packed(x, T{}));
    }
  }
  write_edges(to, slice.columns, g, number);
  if constexpr (Source::kResident)
    if (next) source.copy_edges(*next);
  if (slice.target >= 0 && to.owner(slice.target, kThreads) == threadIdx.x)  // the thread that wrote its vector above
    g[slice.target] = narrow(fabsf(row.target) < 0x1p-126f ? 0.0f : row.target, T{});
}

template <int kThreads, class T>
__device__ __forceinline__ void write_zeros(const Slice<T>& slice, T* g) {
  const Span<T> to(g, slice.columns);
  auto* const vectors = reinterpret_cast<Vector*>(g - to.phase);
  for (int v = to.first + static_cast<int>(threadIdx.x); v < to.last; v += kThreads) store(vectors + v, Vector{});
  write_edges(to, slice.columns, g, [](int) { return 0.0f; });
}

}  // namespace gspo::gpu
