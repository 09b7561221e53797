// What a row comes to: of the columns that a thread has seen, of a block's threads, of a cluster's blocks.
#pragma once

#include "../row_math.h"
#include "columns.cuh"

namespace gspo::gpu {

__device__ __forceinline__ float largest(const uint32_t (&pairs)[4], BFloat16 t) {
  const uint32_t pair = larger_of_pairs(larger_of_pairs(pairs[0], pairs[1], t), larger_of_pairs(pairs[2], pairs[3], t), t);
  return fmaxf(as_float(pair << 16), as_float(pair & 0xffff0000u));
}

__device__ __forceinline__ float largest(const uint32_t (&pairs)[4], Float16 t) {
  const uint32_t pair = larger_of_pairs(larger_of_pairs(pairs[0], pairs[1], t), larger_of_pairs(pairs[2], pairs[3], t), t);
  return fmaxf(widen(Float16{static_cast<uint16_t>(pair)}), widen(Float16{static_cast<uint16_t>(pair >> 16)}));
}

__device__ __forceinline__ float largest(const uint32_t (&numbers)[4], float) {
  return fmaxf(fmaxf(as_float(numbers[0]), as_float(numbers[1])), fmaxf(as_float(numbers[2]), as_float(numbers[3])));
}

template <class T>
__device__ __forceinline__ uint32_t larger_words(uint32_t x, uint32_t y, T t) {
  return larger_of_pairs(x, y, t);
}

__device__ __forceinline__ uint32_t larger_words(uint32_t x, uint32_t y, float) {
  return as_bits(fmaxf(as_float(x), as_float(y)));
}

// Of 2^t and t 2^t, t = x scale - top, over columns. Where 2^t is 0, t may be -inf, and their product no number: unless it
// is bounded from below, which takes an instruction more.
struct Sums {
  float top = kFloor, total = 0.0f, weighted = 0.0f;

  template <bool kBounded, class T, int kVectors>
  __device__ __forceinline__ void add(const Vector (&v)[kVectors], float scale) {
    Vector high = v[0];
#pragma unroll
    for (int k = 1; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) high.words[i] = larger_words(high.words[i], v[k].words[i], T{});
    const float new_top = fmaxf(top, largest(high.words, T{}) * scale);
    const float shift = top - new_top, shrink = exp2_flushed(shift);
    top = new_top;
    weighted = fmaf(total, shift, weighted) * shrink;
    total *= shrink;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[Columns<T>::kWidth];
      unpack(v[k], x, T{});
#pragma unroll
      for (float one : x) {
        const float t = fmaf(one, scale, -top), e = exp2_flushed(t);
        total += e;
        weighted = fmaf(e, kBounded ? fmaxf(t, -127.0f) : t, weighted);
      }
    }
  }
};

// The same sums as they travel between blocks.
struct Partial {
  double top, total, weighted;
};

constexpr int kMostBlocks = 8;  // in a cluster, for one that every GPU with clusters takes

// Where the threads of a block leave their sums for each other, and the blocks of a cluster theirs.
template <int kThreads>
struct Exchange {
  static constexpr int kWarps = kThreads / kWarp;
  float tops[kWarps], totals[kWarps], weighted[kWarps];
  Partial of_blocks[2][kMostBlocks];  // by turns: a fast block may be a row ahead of a slow one

  // Brings this block's sums to every block of the cluster, which has them behind its next barrier.
  __device__ __forceinline__ void publish(const Sums& sums, int turn) {
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    float top = sums.top;
    for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) top = fmaxf(top, of_lane_xor(top, lanes));
    const float shift = sums.top - top, shrink = exp2_flushed(shift);
    float total = sums.total * shrink;
    float weighted_sum = (sums.weighted + sums.total * shift) * shrink;
    for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      total += of_lane_xor(total, lanes);
      weighted_sum += of_lane_xor(weighted_sum, lanes);
    }
    if (lane == 0) {
      tops[warp] = top;
      totals[warp] = total;
      weighted[warp] = weighted_sum;
    }
    __syncthreads();
    if (threadIdx.x >= blocks_in_cluster()) return;  // one thread for each block to be told
    Partial sum{kFloor, 0.0, 0.0};
    for (int w = 0; w < kWarps; ++w) sum.top = tops[w] > sum.top ? tops[w] : sum.top;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      const double down = tops[w] - sum.top, by = exp2_flushed(static_cast<float>(down));
      sum.total += totals[w] * by;
      sum.weighted += (weighted[w] + totals[w] * down) * by;
    }
    uint64_t words[3];
    memcpy(words, &sum, sizeof(sum));
    auto* place = reinterpret_cast<uint64_t*>(&of_blocks[turn][rank_in_cluster()]);
    for (int i = 0; i < 3; ++i) store_to_block(place + i, threadIdx.x, words[i]);
  }
};

// Of the whole row, in the order of the blocks; `scale` and what a float kept of it, with which the kernels counted.
__device__ __forceinline__ Others others_of(const Partial* blocks, unsigned count, double scale, float rounded) {
  double top = kFloor;
  for (unsigned b = 0; b < count; ++b) top = blocks[b].top > top ? blocks[b].top : top;
  double total = 0.0, weighted = 0.0;
#pragma unroll 1
  for (unsigned b = 0; b < count; ++b) {
    const double down = blocks[b].top - top, by = std::exp2(down);
    total += blocks[b].total * by;
    weighted += (blocks[b].weighted + blocks[b].total * down) * by;
  }
  const double error = scale / rounded - 1.0;  // of t: to first order what it makes of the sums
  return {top / rounded, total + weighted * error * kLn2, weighted};
}

}  // namespace gspo::gpu
