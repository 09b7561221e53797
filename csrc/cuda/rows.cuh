// One read of each row: its statistics and, where the coefficient needs no other row, its gradient.
//
// A cluster of blocks has a row: each block a slice of the columns, which stays in its shared memory from the one pass
// to the other (`Resident`). Where there are no clusters, a block has the whole row and reads it again, out of the L2
// cache if few rows are under way (`Again`). The mathematics of a row is csrc/row_math.h's.
//
// Clusters take rows as they get done, by tickets; rows that do not count, or have no gradient, cost little. Blocks of a
// cluster meet once in a row, to exchange their sums; only behind that does a thread read what another brought, where a
// gradient lies otherwise than its logits.
#pragma once

#include "gradient.cuh"
#include "rows.h"
#include "sums.cuh"

namespace gspo::gpu {

// Whole vectors that stay in shared memory, each brought there by the thread that has it.
template <class T, int kThreads>
class Resident {
 public:
  static constexpr int kGroup = 4;  // vectors between two looks at the maximum

  __device__ __forceinline__ Resident(const Slice<T>& slice, Vector* room) : room_(room), phase_(slice.span.phase) {}

  __device__ __forceinline__ void bring(const Slice<T>& slice) const {
    const Span<T> span = slice.span;
    const Vector* const from = slice.vectors();
    for (int v = span.first + static_cast<int>(threadIdx.x); v < span.last; v += kThreads) copy_async(room_ + v, from + v);
    if (threadIdx.x < 2) {
      const int v = span.edge(threadIdx.x);
      if (v >= 0) room_[v] = slice.edge(v);
    }
    wait_for_copies();
    if (slice.target >= 0 && span.owner(slice.target, kThreads) == threadIdx.x)
      slice.leave_out_target(room_[slice.vector_of_target()]);
  }

  __device__ __forceinline__ Vector whole(int v) const { return room_[v]; }
  __device__ __forceinline__ Vector without_target(int v) const { return room_[v]; }
  // Of any thread's, after a barrier; the target is -inf.
  __device__ __forceinline__ float column(int i) const { return widen(reinterpret_cast<const T*>(room_)[phase_ + i]); }

 private:
  Vector* room_;
  int phase_;
};

// Vectors that are read whenever they are asked for.
template <class T, int kThreads>
class Again {
 public:
  static constexpr int kGroup = 8;  // as many loads on their way

  __device__ __forceinline__ Again(const Slice<T>& slice, Vector*) : slice_(slice), vectors_(slice.vectors()) {}

  __device__ __forceinline__ void bring(const Slice<T>&) const {}
  __device__ __forceinline__ Vector whole(int v) const { return load(vectors_ + v); }
  __device__ __forceinline__ Vector without_target(int v) const {
    Vector out = whole(v);
    if (v == slice_.vector_of_target()) slice_.leave_out_target(out);
    return out;
  }
  __device__ __forceinline__ float column(int i) const { return widen(*global(slice_.x + i)); }

 private:
  const Slice<T>& slice_;
  const Vector* vectors_;
};

// A thread's share of a slice: several vectors at a time, one by one where the target is among them and at the end.
template <bool kBounded, int kThreads, class T, class Source>
__device__ __forceinline__ Sums sums_of(const Slice<T>& slice, const Source& source, float scale) {
  constexpr int kGroup = Source::kGroup, kStride = kGroup * kThreads;
  Sums sums;
  const int last = slice.span.last, begin = slice.span.first + static_cast<int>(threadIdx.x);
  const int of_target = slice.vector_of_target() - slice.span.first;
  int v = begin, stop = of_target < 0 ? last : begin + of_target / kStride * kStride;
#pragma unroll 1
  for (int part = 0; part < 2; ++part, stop = last) {
    const int whole_groups = min(stop, last - (kGroup - 1) * kThreads);
    for (; v < whole_groups; v += kStride) {
      Vector group[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) group[k] = source.whole(v + k * kThreads);
      sums.add<kBounded, T>(group, scale);
    }
    const int one_by_one = min(stop + kStride, last);
#pragma unroll 1
    for (; v < one_by_one; v += kThreads) {
      const Vector one[1] = {source.without_target(v)};
      sums.add<kBounded, T>(one, scale);
    }
  }
  if (threadIdx.x < 2) {
    const int at_edge = slice.span.edge(threadIdx.x);
    if (at_edge >= 0) {
      const Vector one[1] = {slice.edge(at_edge)};
      sums.add<kBounded, T>(one, scale);
    }
  }
  return sums;
}

// dL/dlogprob of a row: what it is where the ratio is 1, times the ratio where that is neither clipped nor too large.
__device__ __forceinline__ double coefficient_of(double on_policy, double logprob, const TokenClip& clip, int64_t row) {
  if (!clip.old_logprobs || on_policy == 0.0) return on_policy;
  const auto finite = [](double x) { return x > 1e30 ? 1e30 : x < -1e30 ? -1e30 : x; };  // no inf - inf
  const double log_ratio = finite(logprob) - finite(clip.old_logprobs[row]);
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

// What a block has to do next, made out by one of its threads while the others are at the row before.
template <class T>
struct Task {
  int64_t row;  // of no row, if there are fewer
  bool counts;
  Slice<T> slice;
  T* gradient;
  float target_logit;  // before any block writes a gradient over it
  float scale;         // of the logits to base 2; what a float keeps of it, with which kernels count
  double exact_scale;

  __device__ __forceinline__ void prepare(const OneRead& args, int64_t new_row) {
    row = new_row;
    if (row >= args.shape.rows) return;
    counts = !args.in.mask || args.in.mask[row];
    const int64_t token = args.in.token_ids[row];
    const bool known = token >= 0 && token < args.shape.vocab;
    const T* x = row_of<T>(args.shape, args.in.logits, row);
    slice = Slice<T>(x, args.shape.vocab, known ? token : -1, rank_in_cluster(), blocks_in_cluster());
    gradient = row_of<T>(args.shape, args.gradient, row) + (slice.x - x);
    target_logit = !counts ? 0.0f : known ? widen(x[token]) : NAN;
    exact_scale = kLog2e / (args.in.row_temperature ? args.in.row_temperature[row] : args.in.temperature);
    scale = static_cast<float>(exact_scale);
  }
};

template <class T, int kThreads>
struct Shared {
  Exchange<kThreads> sums;
  Task<T> task[2];  // by turns, as the sums
  uint64_t next[2];
  double common;
  RowGradient gradient;
};

// What comes of a row's sums: its statistics, stored by one block, and its gradient.
template <class T>
__device__ __forceinline__ RowGradient finish(const OneRead& args, const Task<T>& task, const Partial* blocks,
                                              double common) {
  const int64_t row = task.row;
  const bool stores = rank_in_cluster() == 0;
  if (!task.counts) {
    if (stores) {
      args.out.logprobs[row] = args.out.entropy[row] = 0.0f;
      args.out.lse[row] = 0.0;
    }
    return RowGradient{};
  }
  const double scale = task.exact_scale;
  const RowStats stats = combine(others_of(blocks, blocks_in_cluster(), scale, task.scale), task.target_logit, scale);
  const float logprob = static_cast<float>(stats.logprob);
  if (stores) {
    args.out.logprobs[row] = logprob;
    args.out.entropy[row] = static_cast<float>(stats.entropy);
    args.out.lse[row] = stats.lse;
  }
  const double coefficient = coefficient_of(args.upstream.logprobs[row], logprob, args.clip, row);
  if (coefficient == 0.0) return RowGradient{};  // whatever the logits and the common factor are
  const double lse = stats.lse * kLog2e * (task.scale / scale);  // in the units of x * scale
  const float base = static_cast<float>(lse);
  return gradient_of({coefficient * common, 0.0, 0.0}, logprob, 0.0, scale, base, (lse - base) * kLn2);
}

// Three blocks with a slice of a row each share a multiprocessor; one with a whole row has it to itself.
template <class T, template <class, int> class Source, int kThreads>
__global__ void __launch_bounds__(kThreads, kThreads == 256 ? 3 : 1) one_read(const __grid_constant__ OneRead args) {
#if defined(GSPO_ON_HOST)
  auto* room = static_cast<Vector*>(on_host::dynamic_shared());
  auto& shared = *static_cast<Shared<T, kThreads>*>(on_host::static_shared(sizeof(Shared<T, kThreads>)));
#else
  extern __shared__ Vector room[];
  __shared__ Shared<T, kThreads> shared;
#endif
  const unsigned ranks = blocks_in_cluster();
  const unsigned first = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  const double common = common_of(args.common);
  if (threadIdx.x == 0) {
    shared.common = common;
    shared.task[0].prepare(args, first);
  }
  sync_cluster();  // a block that has not begun has no memory to be written to

  for (int turn = 0; shared.task[turn].row < args.shape.rows; turn ^= 1) {
    const Task<T>& task = shared.task[turn];
    if (rank_in_cluster() == 0 && threadIdx.x == 0) {
      const uint64_t next = uint64_t{clusters} + take_ticket(args.tickets);
      for (unsigned b = 0; b < ranks; ++b) store_to_block(&shared.next[turn], b, next);
    }
    const Source<T, kThreads> source(task.slice, room);
    if (task.counts) {
      source.bring(task.slice);
      Sums sums = sums_of<false, kThreads>(task.slice, source, task.scale);
      if (sums.weighted != sums.weighted)  // for a logit of -inf, or one that is no number
        sums = sums_of<true, kThreads>(task.slice, source, task.scale);
      shared.sums.publish(sums, turn);
    }
    sync_cluster();

    if (threadIdx.x == 0) shared.gradient = finish(args, task, shared.sums.of_blocks[turn], shared.common);
    if (threadIdx.x == kWarp) shared.task[turn ^ 1].prepare(args, static_cast<int64_t>(shared.next[turn]));
    __syncthreads();
    const RowGradient gradient = shared.gradient;
    if (gradient.constant == 0.0f && gradient.target == 0.0f)
      write_zeros<kThreads>(task.slice, task.gradient);
    else
      write_gradient<kThreads>(task.slice, source, task.gradient, gradient, task.scale);
    __syncthreads();  // before anybody writes to the room, or to `gradient`, again
  }  // and no block is written to behind the last exchange, when it may be gone
}

}  // namespace gspo::gpu
