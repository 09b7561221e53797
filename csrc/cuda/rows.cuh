// One read of each row: its statistics and, where the coefficient needs no other row, its gradient.
//
// A cluster of blocks has a row: each block a slice of the columns, which stays in its shared memory from the one pass
// to the other (`Resident`). Where there are no clusters, a block has the whole row and reads it again, out of the L2
// cache if few rows are under way (`Again`). The mathematics of a row is csrc/row_math.h's.
//
// A row starts at any address. Columns before a slice's first 16-byte boundary, and behind its last, are read and written
// one by one; all others 16 bytes at a time. Blocks meet once in a row, to exchange their sums; only behind that does a
// thread read what another brought, where a gradient lies otherwise than its logits.
#pragma once

#include <cmath>

#include "../row_math.h"
#include "device.cuh"
#include "rows.h"

namespace gspo::gpu {

// ---- columns

template <class T>
struct Columns {
  static constexpr int kWidth = 16 / sizeof(T);  // in a vector
};

constexpr float kLowest = -1e20f;          // stands for a logit of -inf: finite, so that 0 times it is 0
constexpr uint32_t kLowestPair = 0xe0ade0adu;  // in bf16
constexpr float kFloor = -1e9f;            // a running maximum over nothing yet, in base 2: logits below it count as -inf

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

// ---- sums

// Of 2^t and t 2^t, t = x scale - top, over the columns a thread has seen.
struct Sums {
  float top = kFloor, total = 0.0f, weighted = 0.0f;

  // -inf becomes a number, and `highest` the largest one; NaN stays.
  template <int kVectors>
  static __device__ __forceinline__ float prepare(Vector (&v)[kVectors], BFloat16) {
    uint32_t highest = kLowestPair;
#pragma unroll
    for (int k = 0; k < kVectors; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[k].words[i] = max_or_nan_pair(v[k].words[i], kLowestPair);
        highest = max_or_nan_pair(highest, v[k].words[i]);
      }
    return max_or_nan(as_float(highest << 16), as_float(highest & 0xffff0000u));
  }

  template <int kVectors, class T>
  static __device__ __forceinline__ float prepare(Vector (&v)[kVectors], T) {
    float highest = kLowest;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[Columns<T>::kWidth];
      unpack(v[k], x, T{});
#pragma unroll
      for (float one : x) highest = max_or_nan(highest, one);
    }
    return highest;
  }

  template <class T, int kVectors>
  __device__ __forceinline__ void add(Vector (&v)[kVectors], float scale) {
    const float new_top = fmaxf(top, prepare(v, T{}) * scale);  // where that is NaN every t is
    const float shift = top - new_top, shrink = exp2_flushed(shift);
    weighted = (weighted + total * shift) * shrink;
    total *= shrink;
    top = new_top;
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      float x[Columns<T>::kWidth];
      unpack(v[k], x, T{});
#pragma unroll
      for (float one : x) {
        const float t = fmaf(one, scale, -top), e = exp2_flushed(t);
        total += e;
        weighted = fmaf(e, bounded(t, T{}), weighted);
      }
    }
  }

  // Where 2^t is 0, t may not be -inf. In bf16 `prepare` has seen to that.
  static __device__ __forceinline__ float bounded(float t, BFloat16) { return t; }
  template <class T>
  static __device__ __forceinline__ float bounded(float t, T) {
    return max_or_nan(t, -127.0f);
  }
};

// The same sums as they travel between blocks.
struct Partial {
  double top, total, weighted;
};

// ---- a block's part of a row

// How columns lie in the vectors of memory: an edge, vectors that are theirs as a whole, an edge. Threads have the whole
// ones by turns; the edges, of which there may be none, thread 0 and thread 1.
template <class T>
struct Span {
  static constexpr int kWidth = Columns<T>::kWidth;

  int phase;     // columns' worth of memory between the last 16-byte boundary and the first column
  int first;     // whole vectors [first, last), counted from that boundary
  int last;
  int vectors;   // that have a column

  __device__ __forceinline__ Span(const T* address, int columns)
      : phase(static_cast<int>(reinterpret_cast<uintptr_t>(address) % 16 / sizeof(T))),
        first(phase == 0 ? 0 : 1),
        last((phase + columns) / kWidth),
        vectors(columns == 0 ? 0 : (phase + columns + kWidth - 1) / kWidth) {
    last = last > first ? last : first;
  }

  // Of thread 0 or 1; -1: there is none.
  __device__ __forceinline__ int edge(unsigned thread) const {
    return vectors == 0 ? -1 : thread == 0 ? first - 1 : last < vectors ? last : -1;
  }

  // The thread that has a column's vector.
  __device__ __forceinline__ unsigned owner(int column) const {
    const int v = (phase + column) / kWidth;
    return v < first ? 0 : v < last ? (v - first) % blockDim.x : 1;
  }
};

template <class T>
struct Slice {
  const T* x;   // the first column
  int columns;  // may be 0
  Span<T> span;
  int target;   // the target column, counted from x; -1 if it is of another slice

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

  __device__ __forceinline__ const T* vector(int v) const { return x + (v * Columns<T>::kWidth - span.phase); }

  // Of a vector at an edge, as it counts in the sums: what is not of the slice is -inf, and the target.
  __device__ __forceinline__ Vector edge(int v) const {
    constexpr int kWidth = Columns<T>::kWidth;
    Vector out;
    for (int i = 0; i < kWidth; ++i) {
      const int column = v * kWidth + i - span.phase;
      put(out, i, column >= 0 && column < columns && column != target ? x[column] : minus_infinity(T{}));
    }
    return out;
  }

  __device__ __forceinline__ void leave_out_target(Vector& of_target) const {
    put(of_target, (span.phase + target) % Columns<T>::kWidth, minus_infinity(T{}));
  }

  static __device__ __forceinline__ void put(Vector& v, int i, T one) {
    memcpy(reinterpret_cast<char*>(&v) + i * sizeof(T), &one, sizeof(T));
  }
};

// Whole vectors that stay in shared memory, each brought there by the thread that has it.
template <class T>
class Resident {
 public:
  __device__ __forceinline__ Resident(const Slice<T>& slice, Vector* room) : slice_(slice), room_(room) {
    const Span<T>& span = slice.span;
    for (int v = span.first + threadIdx.x; v < span.last; v += blockDim.x) copy_async(room + v, slice.vector(v));
    if (threadIdx.x < 2) {
      const int v = span.edge(threadIdx.x);
      if (v >= 0) room[v] = slice.edge(v);
    }
    wait_for_copies();
    if (slice.target >= 0 && span.owner(slice.target) == threadIdx.x)
      slice.leave_out_target(room[(span.phase + slice.target) / Columns<T>::kWidth]);
  }

  __device__ __forceinline__ Vector whole(int v) const { return room_[v]; }
  // Of any thread's, after a barrier; the target is -inf.
  __device__ __forceinline__ float column(int i) const {
    return widen(reinterpret_cast<const T*>(room_)[slice_.span.phase + i]);
  }

 private:
  const Slice<T>& slice_;
  Vector* room_;
};

// Vectors that are read whenever they are asked for.
template <class T>
class Again {
 public:
  __device__ __forceinline__ Again(const Slice<T>& slice, Vector*)
      : slice_(slice), target_(slice.target < 0 ? -1 : (slice.span.phase + slice.target) / Columns<T>::kWidth) {}

  __device__ __forceinline__ Vector whole(int v) const {
    Vector out = load(slice_.vector(v));
    if (v == target_) slice_.leave_out_target(out);
    return out;
  }
  __device__ __forceinline__ float column(int i) const { return widen(slice_.x[i]); }

 private:
  const Slice<T>& slice_;
  int target_;
};

// ---- what the threads of a block, and the blocks of a cluster, tell each other

constexpr int kMostBlocks = 8;  // in a cluster, for one that every GPU with clusters takes

template <int kThreads>
struct Shared {
  static constexpr int kWarps = kThreads / kWarp;
  float tops[kWarps];
  float totals[kWarps], weighted[kWarps];
  Partial of_blocks[2][kMostBlocks];  // by turns: a fast block may be a row ahead of a slow one
  uint64_t next[2];
  RowGradient gradient;
};

template <int kThreads>
__device__ __forceinline__ void publish(Shared<kThreads>& shared, const Sums& sums, int turn) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  float top = sums.top;
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) top = fmaxf(top, of_lane_xor(top, lanes));
  const float shift = sums.top - top, shrink = exp2_flushed(shift);
  float total = sums.total * shrink;
  float weighted = (sums.weighted + sums.total * shift) * shrink;
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    total += of_lane_xor(total, lanes);
    weighted += of_lane_xor(weighted, lanes);
  }
  if (lane == 0) {
    shared.tops[warp] = top;
    shared.totals[warp] = total;
    shared.weighted[warp] = weighted;
  }
  __syncthreads();
  if (threadIdx.x >= blocks_in_cluster()) return;  // one thread for each block to be told
  Partial sum{kFloor, 0.0, 0.0};
  for (int w = 0; w < Shared<kThreads>::kWarps; ++w) sum.top = shared.tops[w] > sum.top ? shared.tops[w] : sum.top;
  for (int w = 0; w < Shared<kThreads>::kWarps; ++w) {
    const double down = shared.tops[w] - sum.top, by = exp2_flushed(static_cast<float>(down));
    sum.total += shared.totals[w] * by;
    sum.weighted += (shared.weighted[w] + shared.totals[w] * down) * by;
  }
  const unsigned to = threadIdx.x;
  uint64_t words[3];
  memcpy(words, &sum, sizeof(sum));
  auto* place = reinterpret_cast<uint64_t*>(&shared.of_blocks[turn][rank_in_cluster()]);
  for (int i = 0; i < 3; ++i) store_to_block(place + i, to, words[i]);
}

// Of the whole row, in the order of the blocks; `scale` and what a float kept of it, with which the kernels counted.
__device__ __forceinline__ Others others_of(const Partial* blocks, unsigned count, double scale, float rounded) {
  double top = kFloor;
  for (unsigned b = 0; b < count; ++b) top = blocks[b].top > top ? blocks[b].top : top;
  double total = 0.0, weighted = 0.0;
  for (unsigned b = 0; b < count; ++b) {
    const double down = blocks[b].top - top, by = std::exp2(down);
    total += blocks[b].total * by;
    weighted += (blocks[b].weighted + blocks[b].total * down) * by;
  }
  const double error = scale / rounded - 1.0;  // of t: to first order what it makes of the sums
  return {top / rounded, total + weighted * error * kLn2, weighted};
}

// ---- gradient

template <class T>
__device__ __forceinline__ Vector gradient_of_vector(const Vector& v, const RowGradient& row, float scale) {
  float x[Columns<T>::kWidth];
  unpack(v, x, T{});
#pragma unroll
  for (float& one : x) one = multiply_flushed(exp2_flushed(fmaf(one, scale, -row.base)), row.constant);
  return packed(x, T{});
}

// One column after the other: at edges, and where a gradient lies otherwise than its logits.
template <class T, class Source>
__device__ __forceinline__ float gradient_of_column(const Source& source, int column, const RowGradient& row, float scale) {
  return multiply_flushed(exp2_flushed(fmaf(source.column(column), scale, -row.base)), row.constant);
}

template <class T, class Source>
__device__ __forceinline__ void write_gradient(const Slice<T>& slice, const Source& source, T* g,
                                               const RowGradient& row, float scale) {
  constexpr int kWidth = Columns<T>::kWidth;
  const Span<T> to(g, slice.columns);
  if (to.phase == slice.span.phase) {
    for (int v = to.first + threadIdx.x; v < to.last; v += blockDim.x)
      store(g + (v * kWidth - to.phase), gradient_of_vector<T>(source.whole(v), row, scale));
  } else {
    for (int v = to.first + threadIdx.x; v < to.last; v += blockDim.x) {
      float x[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) x[i] = gradient_of_column<T>(source, v * kWidth - to.phase + i, row, scale);
      store(g + (v * kWidth - to.phase), packed(x, T{}));
    }
  }
  if (threadIdx.x < 2) {
    const int v = to.edge(threadIdx.x);
    for (int i = 0; v >= 0 && i < kWidth; ++i) {
      const int column = v * kWidth - to.phase + i;
      if (column >= 0 && column < slice.columns) g[column] = narrow(gradient_of_column<T>(source, column, row, scale), T{});
    }
  }
  if (slice.target >= 0 && to.owner(slice.target) == threadIdx.x)  // who has just written there
    g[slice.target] = narrow(fabsf(row.target) < 0x1p-126f ? 0.0f : row.target, T{});
}

template <class T>
__device__ __forceinline__ void write_zeros(const Slice<T>& slice, T* g) {
  constexpr int kWidth = Columns<T>::kWidth;
  const Span<T> to(g, slice.columns);
  for (int v = to.first + threadIdx.x; v < to.last; v += blockDim.x) store(g + (v * kWidth - to.phase), Vector{});
  if (threadIdx.x < 2) {
    const int v = to.edge(threadIdx.x);
    for (int i = 0; v >= 0 && i < kWidth; ++i) {
      const int column = v * kWidth - to.phase + i;
      if (column >= 0 && column < slice.columns) g[column] = narrow(0.0f, T{});
    }
  }
}

// dL/dlogprob of a row: what it is where the ratio is 1, times the ratio where that is neither clipped nor too large.
__device__ __forceinline__ double coefficient_of(double on_policy, double logprob, const TokenClip& clip, int64_t row) {
  if (!clip.old_logprobs || on_policy == 0.0) return on_policy;
  const double log_ratio = logprob - clip.old_logprobs[row];
  if (log_ratio > clip.max_log_ratio) return 0.0;
  const double deviation = expm1(log_ratio);
  const float advantage = clip.advantages[row];
  const bool held = advantage > 0.0f ? deviation > clip.eps_high
                                     : deviation < -clip.eps_low || deviation > clip.dual_clip - 1.0;
  return held ? 0.0 : on_policy * (1.0 + deviation);
}

template <class T>
__device__ __forceinline__ T* row_of(const RowShape& shape, const LogitsView& view, int64_t row) {
  const int64_t outer = row / shape.inner, inner = row - outer * shape.inner;
  return reinterpret_cast<T*>(view.data) + outer * view.outer_stride + inner * view.inner_stride;
}

// What all gradients are multiplied by; in every thread.
__device__ __forceinline__ double common_of(const Common& common) {
  const double factor = common.factor ? *common.factor : 1.0;
  if (!common.counts) return factor;
  double total = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < common.count_size; i += kWarp) total += common.counts[i];
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) total += of_lane_xor(total, lanes);
  return total > 0.0 ? factor / total : factor;
}

// What comes of a row's sums: its statistics, stored by one block, and its gradient. By one thread, and not inlined: its
// doubles would take registers from all.
__device__ __noinline__ RowGradient finish(const OneRead& args, int64_t row, bool stores, const Partial* blocks,
                                           unsigned count, float target_logit, double scale, double common) {
  const float rounded = static_cast<float>(scale);
  const RowStats stats = combine(others_of(blocks, count, scale, rounded), target_logit, scale);
  const float logprob = static_cast<float>(stats.logprob);
  if (stores) {
    args.out.logprobs[row] = logprob;
    args.out.entropy[row] = static_cast<float>(stats.entropy);
    args.out.lse[row] = stats.lse;
  }
  const double upstream = args.upstream.logprobs[row];
  const double lse = stats.lse * kLog2e * (rounded / scale);  // in the units of x * rounded
  const float base = static_cast<float>(lse);
  return gradient_of({coefficient_of(upstream, logprob, args.clip, row) * common, 0.0, 0.0}, logprob, 0.0, scale, base,
                     (lse - base) * kLn2);
}

// ---- the kernel

template <class T, template <class> class Source, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 256 ? 4 : 1) one_read(const OneRead args) {
  constexpr int kGroup = 4;  // vectors between two looks at the maximum
#if defined(GSPO_ON_HOST)
  auto* room = static_cast<Vector*>(on_host::dynamic_shared());
  auto& shared = *static_cast<Shared<kThreads>*>(on_host::static_shared(sizeof(Shared<kThreads>)));
#else
  extern __shared__ Vector room[];
  __shared__ Shared<kThreads> shared;
#endif
  const unsigned rank = rank_in_cluster(), ranks = blocks_in_cluster();
  const int64_t clusters = gridDim.x / ranks;
  const double common = common_of(args.common);

  sync_cluster();  // a block that has not begun has no memory to be written to
  int turn = 0;
  for (int64_t row = blockIdx.x / ranks; row < args.shape.rows; turn ^= 1) {
    if (rank == 0 && threadIdx.x == 0) {
      const uint64_t next = clusters + take_ticket(args.tickets);
      for (unsigned b = 0; b < ranks; ++b) store_to_block(&shared.next[turn], b, next);
    }
    const bool counts = !args.in.mask || args.in.mask[row];
    const int64_t token = args.in.token_ids[row];
    const bool known = token >= 0 && token < args.shape.vocab;
    const T* x = row_of<T>(args.shape, args.in.logits, row);
    const Slice<T> slice(x, args.shape.vocab, known ? token : -1, rank, ranks);
    T* g = row_of<T>(args.shape, args.gradient, row) + (slice.x - x);
    if (!counts) {
      if (rank == 0 && threadIdx.x == 0) {
        args.out.logprobs[row] = args.out.entropy[row] = 0.0f;
        args.out.lse[row] = 0.0;
      }
      write_zeros(slice, g);
      sync_cluster();
      row = shared.next[turn];
      continue;
    }
    const float target_logit = known ? widen(x[token]) : NAN;
    const double scale = kLog2e / (args.in.row_temperature ? args.in.row_temperature[row] : args.in.temperature);
    const float rounded = static_cast<float>(scale);

    const Source<T> source(slice, room);
    Sums sums;
    int v = slice.span.first + threadIdx.x;
    for (; v + (kGroup - 1) * kThreads < slice.span.last; v += kGroup * kThreads) {
      Vector group[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) group[k] = source.whole(v + k * kThreads);
      sums.add<T>(group, rounded);
    }
    for (; v < slice.span.last; v += kThreads) {
      Vector one[1] = {source.whole(v)};
      sums.add<T>(one, rounded);
    }
    if (threadIdx.x < 2) {
      const int at_edge = slice.span.edge(threadIdx.x);
      if (at_edge >= 0) {
        Vector one[1] = {slice.edge(at_edge)};
        sums.add<T>(one, rounded);
      }
    }
    publish(shared, sums, turn);
    sync_cluster();

    if (threadIdx.x == 0)
      shared.gradient =
          finish(args, row, rank == 0, shared.of_blocks[turn], ranks, target_logit, scale, common);
    __syncthreads();
    const RowGradient gradient = shared.gradient;
    if (gradient.constant == 0.0f && gradient.target == 0.0f)
      write_zeros(slice, g);
    else
      write_gradient(slice, source, g, gradient, rounded);
    row = shared.next[turn];
    __syncthreads();  // before anybody writes to the room, or to `gradient`, again
  }
  sync_cluster();  // a block that is gone has no memory to be written to
}

}  // namespace gspo::gpu
