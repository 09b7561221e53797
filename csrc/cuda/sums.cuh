// A row's sums: over a thread's columns, a block's threads and a cluster's blocks.
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

// Sums of 2^t and of t 2^t over columns, where t = x scale - top. For a logit of -inf the product is -inf * 0, a NaN:
// kBounded bounds t from below, which takes an instruction more a column.
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

// The sums over `kLanes` neighbouring lanes, in each of them.
template <unsigned kLanes>
__device__ __forceinline__ Sums sums_of_lanes(const Sums& of_lane) {
  Sums sums = of_lane;
  for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2) sums.top = fmaxf(sums.top, of_lane_xor(sums.top, lanes));
  const float shift = of_lane.top - sums.top, shrink = exp2_flushed(shift);
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
  float top, total, weighted, target;
};

constexpr unsigned kMostBlocks = 8;  // of a cluster: as many as every GPU with clusters takes

// Shared memory by which the threads of a block, and then the blocks of a cluster, exchange their sums. A block waits
// for what it is sent, not at a barrier of the cluster, which would also wait for every thread's accesses to global
// memory. `kCluster`: there may be more than one block.
template <int kThreads, bool kCluster>
struct Exchange {
  static constexpr unsigned kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && kMostBlocks <= kWarp);

  float tops[kWarps], totals[kWarps], weighted[kWarps];
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
  __device__ __forceinline__ void publish(const Sums& of_thread, bool has_target, int turn) {
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const Sums of_warp = sums_of_lanes<kWarp>(of_thread);
    if (lane == 0) {
      tops[warp] = of_warp.top;
      totals[warp] = of_warp.total;
      weighted[warp] = of_warp.weighted;
    }
    __syncthreads();
    if (warp > 0) return;
    Sums sums;
    if (lane < kWarps) {
      sums.top = tops[lane];
      sums.total = totals[lane];
      sums.weighted = weighted[lane];
    }
    sums = sums_of_lanes<kWarp>(sums);
    if (lane >= blocks_in_cluster()) return;  // one thread sends to each block
    const Partial partial{sums.top, sums.total, sums.weighted, has_target ? target : 0.0f};
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
  __device__ __forceinline__ Partial of_cluster(int turn) const {
    const unsigned block = threadIdx.x % kMostBlocks;
    Sums sums;
    float target = 0.0f;
    if (block < blocks_in_cluster()) {
      const Partial& partial = of_blocks[turn][block];
      sums.top = partial.top;
      sums.total = partial.total;
      sums.weighted = partial.weighted;
      target = partial.target;
    }
    sums = sums_of_lanes<kMostBlocks>(sums);
    for (unsigned lanes = kMostBlocks / 2; lanes > 0; lanes /= 2) target += of_lane_xor(target, lanes);
    return {sums.top, sums.total, sums.weighted, target};
  }
};

}  // namespace gspo::gpu
