// A row's columns as vectors of 16 bytes, for rows that begin at any address.
//
// Columns before the first 16-byte boundary, and after the last one, are an edge each: read and written one by one.
#pragma once

#include <cmath>
#include <type_traits>

#include "device.cuh"

namespace gspo::gpu {

template <class T>
struct Columns {
  static constexpr int kWidth = 16 / sizeof(T);  // in a vector
};

__device__ __forceinline__ void unpack(const Vector& v, float (&x)[4], float) {
  for (int i = 0; i < 4; ++i) x[i] = as_float(v.words[i]);
}

__device__ __forceinline__ void unpack(const Vector& v, float (&x)[8], BFloat16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = as_float(v.words[i] << 16);
    x[2 * i + 1] = as_float(v.words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const Vector& v, float (&x)[8], Float16) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = widen(Float16{static_cast<uint16_t>(v.words[i])});
    x[2 * i + 1] = widen(Float16{static_cast<uint16_t>(v.words[i] >> 16)});
  }
}

__device__ __forceinline__ Vector packed(const float (&x)[4], float) {
  return {{as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])}};
}

template <class T>
__device__ __forceinline__ Vector packed(const float (&x)[8], T) {
  Vector v;
#pragma unroll
  for (int i = 0; i < 4; ++i) v.words[i] = pack(x[2 * i], x[2 * i + 1], T{});
  return v;
}

__device__ __forceinline__ float minus_infinity(float) { return -INFINITY; }
__device__ __forceinline__ BFloat16 minus_infinity(BFloat16) { return {0xff80}; }
__device__ __forceinline__ Float16 minus_infinity(Float16) { return {0xfc00}; }

__device__ __forceinline__ float narrow(float x, float) { return x; }
template <class T>
__device__ __forceinline__ T narrow(float x, T) {
  return {static_cast<uint16_t>(pack(x, 0.0f, T{}))};
}

// How columns divide into vectors: an edge, whole vectors, an edge; either edge may be absent. Thread 0 has the first
// edge, thread 1 the last one; of the whole vectors each thread has every `threads`-th.
template <class T>
struct Span {
  static constexpr int kWidth = Columns<T>::kWidth;

  int phase;    // how many columns after a 16-byte boundary the first column lies: 0 to kWidth - 1
  int first;    // whole vectors [first, last), counted from that boundary
  int last;
  int vectors;  // with the edges

  Span() = default;
  __device__ __forceinline__ Span(const T* address, int columns)
      : phase(static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T))),
        first(phase == 0 ? 0 : 1),
        last((phase + columns) / kWidth),
        vectors(columns == 0 ? 0 : (phase + columns + kWidth - 1) / kWidth) {
    last = last > first ? last : first;
  }

  // The vector at the edge that thread 0 or 1 has; -1 if there is none.
  __device__ __forceinline__ int edge(unsigned thread) const {
    return vectors == 0 ? -1 : thread == 0 ? first - 1 : last < vectors ? last : -1;
  }

  // The thread, of `threads`, that has a column's vector.
  __device__ __forceinline__ unsigned owner(int column, unsigned threads) const {
    const int v = (phase + column) / kWidth;
    return v < first ? 0 : v < last ? (v - first) % threads : 1;
  }

  __device__ __forceinline__ int column(int v, int i) const { return v * kWidth + i - phase; }
};

// A block's part of a row.
template <class T>
struct Slice {
  const T* x;   // the first column
  int columns;  // may be 0
  Span<T> span;
  int target;   // the target column, counted from x; -1 if it is of another slice

  Slice() = default;
  __device__ __forceinline__ Slice(const T* row, int64_t vocab, int64_t token, unsigned rank, unsigned ranks)
      : x(row + begin_of(vocab, rank, ranks)),
        columns(static_cast<int>(begin_of(vocab, rank + 1, ranks) - begin_of(vocab, rank, ranks))),
        span(x, columns) {
    const int64_t from_here = token - (x - row);
    target = from_here >= 0 && from_here < columns ? static_cast<int>(from_here) : -1;
  }

  static __device__ __forceinline__ int64_t begin_of(int64_t vocab, unsigned rank, unsigned ranks) {
    constexpr int kWidth = Columns<T>::kWidth;
    const int64_t begin = ((vocab + ranks - 1) / ranks + kWidth - 1) / kWidth * kWidth * rank;
    return begin < vocab ? begin : vocab;
  }

  __device__ __forceinline__ const Vector* vectors() const { return reinterpret_cast<const Vector*>(x - span.phase); }
  __device__ __forceinline__ int vector_of_target() const {
    return target < 0 ? -1 : (span.phase + target) / Columns<T>::kWidth;
  }

  // The vector at an edge. Columns of other slices, and the column `left_out`, are -inf in it.
  __device__ __forceinline__ Vector edge(int v, int left_out = -1) const {
    Vector out{};
#pragma unroll
    for (int i = 0; i < Columns<T>::kWidth; ++i) {
      const int column = span.column(v, i);
      put(out, i, column >= 0 && column < columns && column != left_out ? x[column] : minus_infinity(T{}));
    }
    return out;
  }

  __device__ __forceinline__ void leave_out_target(Vector& of_target) const {
    put(of_target, (span.phase + target) % Columns<T>::kWidth, minus_infinity(T{}));
  }

  // Sets the i-th column of a vector, by masks: an index would force the vector out of registers into local memory.
  static __device__ __forceinline__ void put(Vector& v, int i, T one) {
    constexpr int kPerWord = Columns<T>::kWidth / 4;
    constexpr uint32_t kOnes = 0xffffffffu >> (32 - 32 / kPerWord);
    const int shift = i % kPerWord * (32 / kPerWord);
    uint32_t bits = 0;
    memcpy(&bits, &one, sizeof(T));
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t changed = w == i / kPerWord ? kOnes << shift : 0u;
      v.words[w] = (v.words[w] & ~changed) | (bits << shift & changed);
    }
  }
};

// Vectors of shared memory for the longest slice of a row, wherever the row begins.
template <class T>
__host__ __device__ __forceinline__ int64_t vectors_of_buffer(int64_t vocab, unsigned ranks) {
  constexpr int kWidth = Columns<T>::kWidth;
  return ((vocab + ranks - 1) / ranks + kWidth - 1) / kWidth + 1;
}

}  // namespace gspo::gpu
