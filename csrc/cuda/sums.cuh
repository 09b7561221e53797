// A row's sums: over a thread's columns, a block's threads and a cluster's blocks.
#pragma once

#include "../row_math.h"
#include "tanh.cuh"

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

// Sums over columns of 2^t and of t 2^t, where t = (x - largest) scale - residual, of capped logits (y - y_P) scale.
struct Sums {
  float largest = -INFINITY;  // logit of all that are summed up; of capped ones the pivot P
  float residual = 0.0f;      // but for a thread's own sums always 0
  float total = 0.0f, weighted = 0.0f;
};

// A thread's sums while it adds columns to them, where t = x scale - top and top = largest scale, rounded.
struct RunningSums {
  static constexpr bool kCapped = false;
  static constexpr float kMost = 1e9f;  // beyond, the rounding of `top` is too coarse

  float top = -kMost, largest = -INFINITY, total = 0.0f, weighted = 0.0f;

  // For a logit of -inf the product is -inf * 0, a NaN: kBounded bounds t from below, an instruction more a column.
  template <bool kBounded, class T, int kVectors>
  __device__ __forceinline__ void add(const Vector (&v)[kVectors], float scale) {
    Vector high = v[0];
#pragma unroll
    for (int k = 1; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) high.words[i] = larger_words(high.words[i], v[k].words[i], T{});
    const float of_group = gpu::largest(high.words, T{});
    largest = fmaxf(largest, of_group);
    const float new_top = fmaxf(top, of_group * scale);
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

  // Whether the largest logit is so far from 0 that these sums are wrong. Where all are -inf there are none.
  __device__ __forceinline__ bool too_far() const { return !(fabsf(top) < kMost) && largest > -INFINITY; }

  __device__ __forceinline__ Sums sums(float scale) const {
    return {largest, fmaf(-largest, scale, top), total, weighted};
  }
};

// The same of capped logits, where t = (y - y_P) scale and the pivot P belongs to the largest logit. Every logit is as
// good as a finite one.
struct CappedSums {
  static constexpr bool kCapped = true;

  float pivot = kLeastPower, total = 0.0f, weighted = 0.0f;

  // Bits of `left_out` are columns that do not count.
  template <class T, int kVectors>
  __device__ __forceinline__ void add(const Vector (&v)[kVectors], float scale, const TanhCap& cap,
                                      unsigned left_out = 0) {
    Vector high = v[0];
#pragma unroll
    for (int k = 1; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) high.words[i] = larger_words(high.words[i], v[k].words[i], T{});
    const float new_pivot = fmaxf(pivot, cap.pivot_of(gpu::largest(high.words, T{})));
    const float steep = steepness(new_pivot, scale);
    const float shift = from_pivot_to(pivot, new_pivot, steep), shrink = exp2_flushed(shift);
    pivot = new_pivot;
    weighted = fmaf(total, shift, weighted) * shrink;
    total *= shrink;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[Columns<T>::kWidth];
      unpack<T>(v[k], x, cap);
#pragma unroll
      for (int i = 0; i < Columns<T>::kWidth; ++i) {
        float t = cap.above(x[i], pivot) * steep;
        if (kVectors == 1 && (left_out >> i & 1u)) t = -1e9f;
        const float e = exp2_flushed(t);
        total += e;
        weighted = fmaf(e, t, weighted);
      }
    }
  }

  __device__ __forceinline__ Sums sums() const { return {pivot, 0.0f, total, weighted}; }
};

// Sums over columns where the largest logit is known and so far from 0 that, in base 2, all others are 59 or more below
// it: how many equal it. NaN and +inf make them NaN.
struct Ties {
  float largest, total = 0.0f;

  template <class T>
  __device__ __forceinline__ void add(const Vector& v) {
    float x[Columns<T>::kWidth];
    unpack(v, x, T{});
#pragma unroll
    for (float one : x) total += one < INFINITY ? (one == largest ? 1.0f : 0.0f) : NAN;
  }
};

// The sums over `kLanes` neighbouring lanes, in each of them.
template <unsigned kLanes, class Cap>
__device__ __forceinline__ Sums sums_of_lanes(const Sums& of_lane, float scale) {
  constexpr float kLeast = -1e4f;  // where 2^shift is 0; so that no lane has inf * 0 or inf - inf
  Sums sums;
  sums.largest = of_lane.largest;
  for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2)
    sums.largest = fmaxf(sums.largest, of_lane_xor(sums.largest, lanes));
  float shift;
  if constexpr (Cap::kCapped) {
    sums.largest = fmaxf(sums.largest, kLeastPower);
    const float own = fmaxf(of_lane.largest, kLeastPower);
    shift = fmaxf(from_pivot_to(own, sums.largest, steepness(sums.largest, scale)), kLeast);
  } else {
    shift = fmaxf(fmaf(of_lane.largest - sums.largest, scale, of_lane.residual), kLeast);
  }
  const float shrink = exp2_flushed(shift);
  sums.total = of_lane.total * shrink;
  sums.weighted = (of_lane.weighted + of_lane.total * shift) * shrink;
  for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    sums.total += of_lane_xor(sums.total, lanes);
    sums.weighted += of_lane_xor(sums.weighted, lanes);
  }
  return sums;
}

// What a block sends to every block of its cluster: its sums and the target's logit; 0 if another block has the target.
struct alignas(16) Partial {
  float largest, total, weighted, target;
};

constexpr unsigned kFewestBlocks = 2;  // of a cluster: a block that is alone may not send itself anything by st.async
constexpr unsigned kMostBlocks = 8;    // as many as every GPU with clusters takes

// Shared memory by which the threads of a block, and then the blocks of a cluster, exchange their sums. A block waits
// for what it is sent, not at a barrier of the cluster, which would also wait for every thread's accesses to global
// memory. `kCluster`: there are kFewestBlocks or more.
template <int kThreads, bool kCluster, class Cap>
struct Exchange {
  static constexpr unsigned kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && kMostBlocks <= kWarp);

  float largest[kWarps], totals[kWarps], weighted[kWarps];
  float target;  // the target's logit, in the block that has it
  uint64_t after_next;  // in block 0: the row that comes after the next one
  Partial of_blocks[2][kMostBlocks];  // by turns: a fast block may be a row ahead of a slow one
  uint64_t next[2];  // the row that comes after the one of this turn
  uint64_t landed[2];  // flags: all that this block is sent in this turn has landed

  __device__ __forceinline__ void initialize() {
    if constexpr (kCluster)
      for (uint64_t& flag : landed) initialize_flag(&flag);
  }

  // Brings this block's sums to every block of the cluster, which has them when `wait` returns. Block 0 sends
  // `after_next`, too.
  __device__ __forceinline__ void publish(const Sums& of_thread, float scale, bool has_target, int turn) {
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Sums of_warp = sums_of_lanes<kWarp, Cap>(of_thread, scale);
    if (lane == 0) {
      largest[warp] = of_warp.largest;
      totals[warp] = of_warp.total;
      weighted[warp] = of_warp.weighted;
    }
    __syncthreads();
    if (warp > 0) return;
    Sums sums;
    if (lane < kWarps) {
      sums.largest = largest[lane];
      sums.total = totals[lane];
      sums.weighted = weighted[lane];
    }
    sums = sums_of_lanes<kWarp, Cap>(sums, scale);
    if (lane >= blocks_in_cluster()) return;  // one thread sends to each block
    const Partial partial{sums.largest, sums.total, sums.weighted, has_target ? target : 0.0f};
    uint64_t words[2];
    memcpy(words, &partial, sizeof(partial));
    auto* place = reinterpret_cast<uint64_t*>(&of_blocks[turn][rank_in_cluster()]);
    for (int i = 0; i < 2; ++i) send(place + i, lane, words[i], turn);
    if (rank_in_cluster() == 0) send(&next[turn ^ 1], lane, after_next, turn);
  }

  // Called by the first warp, the only one that reads `of_blocks`.
  __device__ __forceinline__ void wait(int turn, unsigned parity) {
    if constexpr (kCluster) {
      if (threadIdx.x == 0)
        expect_bytes(&landed[turn], blocks_in_cluster() * static_cast<uint32_t>(sizeof(Partial)) + sizeof(uint64_t));
      wait_for_phase(&landed[turn], parity);
    } else {
      sync_warp();
    }
  }

  __device__ __forceinline__ void send(uint64_t* place, unsigned rank, uint64_t value, int turn) {
    if constexpr (kCluster)
      store_async(place, rank, value, &landed[turn]);
    else
      *place = value;
  }

  // What the blocks of the cluster sent; in every lane of the warp that calls it.
  __device__ __forceinline__ Partial of_cluster(float scale, int turn) const {
    const unsigned block = threadIdx.x % kMostBlocks;
    Sums sums;
    float target = 0.0f;
    if (block < blocks_in_cluster()) {
      const Partial& partial = of_blocks[turn][block];
      sums.largest = partial.largest;
      sums.total = partial.total;
      sums.weighted = partial.weighted;
      target = partial.target;
    }
    sums = sums_of_lanes<kMostBlocks, Cap>(sums, scale);
    for (unsigned lanes = kMostBlocks / 2; lanes > 0; lanes /= 2) target += of_lane_xor(target, lanes);
    return {sums.largest, sums.total, sums.weighted, target};
  }
};

}  // namespace gspo::gpu
