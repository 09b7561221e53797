// One read of each row: its statistics and, where the gradient depends on no other row, its gradient.
//
// A cluster of blocks processes a row: each block holds a slice of the columns in its shared memory for both passes,
// the sums and the gradient (`Resident`). Without clusters, a block processes the whole row and reads it twice, the
// second time from the L2 cache (`Again`). The mathematics of a row is in csrc/row_math.h, that of a token's loss in
// csrc/token_slope.h.
//
// A cluster takes its next row by a ticket as soon as it is done with one: rows that are masked or have no gradient
// cost little. The blocks of a cluster exchange their sums once a row. A thread reads the vectors that it copied
// itself, before that exchange and after it. The exception is a gradient that lies otherwise to the 16-byte boundaries
// than its logits: it is computed from vectors of other threads, too, after the exchange, and the next row copied after
// a barrier.
#pragma once

#include "gradient.cuh"
#include "rows.h"
#include "sums.cuh"

namespace gspo::gpu {

// Two sources that a block reads its slice from. In both a thread has every kThreads-th of the whole vectors.

// Shared memory, where each thread has copied its vectors. A cluster shares the row.
template <class T, int kThreads_>
class Resident {
 public:
  static constexpr int kThreads = kThreads_;
  static constexpr bool kResident = true;
  static constexpr int kGroup = 4;  // vectors between two updates of the running maximum

  __device__ __forceinline__ Resident(const Slice<T>& slice, Vector* buffer)
      : buffer_(buffer), phase_(slice.span.phase) {}

  // Begins to copy a slice.
  __device__ __forceinline__ void start(const Slice<T>& slice) const {
    const Vector* const from = slice.vectors();
    const int last = slice.span.last;
#pragma unroll 4
    for (int v = slice.span.first + static_cast<int>(threadIdx.x); v < last; v += kThreads)
      copy_async(buffer_ + v, from + v);
    copy_edges(slice);
  }

  __device__ __forceinline__ void start_vector_if(bool needed, int v, const Vector* from) const {
    copy_async_if(needed, buffer_ + v, from + v);
  }

  __device__ __forceinline__ void copy_edges(const Slice<T>& slice) const {
    if (threadIdx.x >= 2) return;
    const int at_edge = slice.span.edge(threadIdx.x);
    if (at_edge >= 0) buffer_[at_edge] = slice.edge(at_edge);
  }

  // Waits for the vectors that this thread has begun to copy. Other threads may not read them yet.
  __device__ __forceinline__ void await() const { wait_for_copies(); }
  __device__ __forceinline__ Vector whole(int v) const { return buffer_[v]; }
  __device__ __forceinline__ float column(int i) const { return widen(reinterpret_cast<const T*>(buffer_)[phase_ + i]); }

  // Returns the target's logit and leaves -inf in its place. Called by the thread that has its vector.
  __device__ __forceinline__ float take_target(const Slice<T>& slice) const {
    const float logit = column(slice.target);
    Vector& at_target = buffer_[slice.vector_of_target()];
    Vector without = at_target;
    slice.leave_out_target(without);
    at_target = without;
    return logit;
  }

 private:
  Vector* buffer_;
  int phase_;
};

// Global memory, or the L2 cache. A block has the whole row.
template <class T, int kThreads_>
class Again {
 public:
  static constexpr int kThreads = kThreads_;
  static constexpr bool kResident = false;
  static constexpr int kGroup = 8;  // loads in progress at a time

  __device__ __forceinline__ Again(const Slice<T>& slice, Vector*) : slice_(slice), vectors_(slice.vectors()) {}

  __device__ __forceinline__ void await() const {}
  __device__ __forceinline__ Vector whole(int v) const { return load(vectors_ + v); }
  __device__ __forceinline__ float column(int i) const { return widen(*global(slice_.x + i)); }
  __device__ __forceinline__ float take_target(const Slice<T>& slice) const { return column(slice.target); }

 private:
  const Slice<T>& slice_;
  const Vector* vectors_;
};

// The sums of a thread's share, by `add`: kGroup vectors at a time; one by one at the end and in the group that has the
// target, which is left out. (Of uncapped logits `Resident` has replaced the target by -inf already.) `add` is told, as
// bits, which columns of a vector do not count; they are -inf there, of which capped logits may have others.
template <class Running, class T, class Source, class Add>
__device__ __forceinline__ Running sums_of(const Slice<T>& slice, const Source& source, const Add& add) {
  constexpr int kThreads = Source::kThreads, kGroup = Source::kGroup, kStride = kGroup * kThreads;
  constexpr int kWidth = Columns<T>::kWidth;
  constexpr bool kFindsTarget = !Source::kResident || Running::kCapped;
  Running sums;
  const int last = slice.span.last, begin = slice.span.first + static_cast<int>(threadIdx.x);
  const int of_target = kFindsTarget ? slice.vector_of_target() - slice.span.first : -1;
  int v = begin, stop = of_target < 0 ? last : begin + of_target / kStride * kStride;
#pragma unroll 1
  for (int part = 0; part < 2; ++part, stop = last) {
    const int whole_groups = min(stop, last - (kGroup - 1) * kThreads);
    for (; v < whole_groups; v += kStride) {
      Vector group[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) group[k] = source.whole(v + k * kThreads);
      add(sums, group, 0u);
    }
    const int one_by_one = min(stop + kStride, last);
#pragma unroll 1
    for (; v < one_by_one; v += kThreads) {
      Vector one[1] = {source.whole(v)};
      unsigned left_out = 0;
      if (kFindsTarget && v == slice.vector_of_target()) {
        slice.leave_out_target(one[0]);
        left_out = 1u << (slice.span.phase + slice.target) % kWidth;
      }
      add(sums, one, left_out);
    }
  }
  if (threadIdx.x < 2) {
    const int at_edge = slice.span.edge(threadIdx.x);
    if (at_edge >= 0) {
      const Vector one[1] = {slice.edge(at_edge, slice.target)};
      unsigned left_out = 0;
      for (int i = 0; i < kWidth; ++i) {
        const int column = slice.span.column(at_edge, i);
        if (column < 0 || column >= slice.columns || column == slice.target) left_out |= 1u << i;
      }
      add(sums, one, left_out);
    }
  }
  return sums;
}

// `kBounded`: some logit may be -inf.
template <bool kBounded, class T, class Source>
__device__ __forceinline__ RunningSums uncapped_sums(const Slice<T>& slice, const Source& source, float scale) {
  return sums_of<RunningSums>(slice, source, [&](RunningSums& sums, const auto& vectors, unsigned) {
    sums.add<kBounded, T>(vectors, scale);
  });
}

template <class T, class Source>
__device__ __forceinline__ CappedSums capped_sums(const Slice<T>& slice, const Source& source, float scale,
                                                  const TanhCap& cap) {
  return sums_of<CappedSums>(slice, source, [&](CappedSums& sums, const auto& vectors, unsigned left_out) {
    sums.add<T>(vectors, scale, cap, left_out);
  });
}

// The same where the largest logit of the share is known and RunningSums says that it is too far from 0.
template <class T, class Source>
__device__ __forceinline__ Sums ties_of(const Slice<T>& slice, const Source& source, float largest) {
  Ties ties{largest};
  const int last = slice.span.last;
#pragma unroll 1
  for (int v = slice.span.first + static_cast<int>(threadIdx.x); v < last; v += Source::kThreads) {
    Vector one = source.whole(v);
    if (!Source::kResident && v == slice.vector_of_target()) slice.leave_out_target(one);
    ties.add<T>(one);
  }
  const int at_edge = threadIdx.x < 2 ? slice.span.edge(threadIdx.x) : -1;
  if (at_edge >= 0) ties.add<T>(slice.edge(at_edge, slice.target));
  return {largest, 0.0f, ties.total, ties.total - ties.total};
}

template <class T>
__device__ __forceinline__ T* row_of(const RowShape& shape, const LogitsView& view, int64_t row) {
  const int64_t outer = row / shape.inner, inner = row - outer * shape.inner;
  return reinterpret_cast<T*>(view.data) + outer * view.outer_stride + inner * view.inner_stride;
}

// What all gradients are multiplied by; in every thread. NaN where the counts' sum is none: no row counts, or a caller's
// normalizer is no count.
__device__ __forceinline__ double common_of(const Common& common) {
  const double factor = common.factor ? *common.factor : 1.0;
  if (!common.counts) return factor;
  double total = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < common.count_size; i += kWarp) total += common.counts[i];
  for (unsigned lanes = kWarp / 2; lanes > 0; lanes /= 2) total += of_lane_xor(total, lanes);
  return total > 0.0 ? factor / total : NAN;
}

// A row's arguments, for a block. One of its threads reads them during the row before.
template <class T>
struct Task {
  int64_t row;  // if this is no row of the batch, nothing else is set
  bool counts;  // not masked
  bool known;   // the token is a column
  Slice<T> slice;
  T* gradient;
  double exact_scale;  // of the logits, to base 2
  float scale;         // exact_scale, rounded: what sums and gradients are computed with
  double unscale, temperature;  // unscale: 1 / scale
  float upstream, old_logprob, rollout_logprob, advantage;

  __device__ __forceinline__ void prepare(const OneRead& args, int64_t new_row) {
    row = new_row;
    if (row >= args.shape.rows) return;
    counts = !args.in.mask || args.in.mask[row];
    const int64_t token = args.in.token_ids[row];
    known = token >= 0 && token < args.shape.vocab;
    temperature = args.in.row_temperature ? args.in.row_temperature[row] : args.in.temperature;
    upstream = args.upstream.logprobs[row];
    const TokenSlope& slope = args.slope;
    old_logprob = slope.old_logprobs ? slope.old_logprobs[row] : 0.0f;
    rollout_logprob = slope.rollout_logprobs ? slope.rollout_logprobs[row] : old_logprob;
    advantage = slope.old_logprobs ? slope.advantages[row] : 0.0f;
    const T* x = row_of<T>(args.shape, args.in.logits, row);
    slice = Slice<T>(x, args.shape.vocab, known ? token : -1, rank_in_cluster(), blocks_in_cluster());
    gradient = row_of<T>(args.shape, args.gradient, row) + (slice.x - x);
    exact_scale = kLog2e / temperature;
    scale = static_cast<float>(exact_scale);
    unscale = 1.0 / scale;
  }
};

// dL/dlogprob of a row, without the common factor.
template <class T>
__device__ __forceinline__ double coefficient_of(const Task<T>& task, double logprob, const TokenSlope& loss) {
  const double upstream = task.upstream;
  if (!loss.old_logprobs || upstream == 0.0) return upstream;
  const double slope = slope_of({logprob, task.old_logprob, task.rollout_logprob, task.advantage}, loss);
  return slope == 0.0 ? 0.0 : upstream * slope;
}

template <class T, class Source, class Cap>
struct Shared {
  Exchange<Source::kThreads, Source::kResident, Cap> exchange;
  Task<T> task[2];  // this row's and the next one's, by turns
  double common;
  GradientOf<Cap> gradient;
};

// What t = x * scale - base of the gradient is computed from. Where all but the largest logit have a probability of 0,
// any scale will do that is a power of two, so that t is exact, and gives the next smaller logit a t of -128 or less.
__device__ __forceinline__ Base scaled_base(const RowStats& stats, double temperature, float scale) {
  if (only_ties(stats)) {
    const float largest = logit_of_ties(stats, temperature);
    const uint32_t exponent = as_bits(largest) >> 23 & 0xffu;
    const float power = as_float((127u + 127u + 31u - exponent) << 23);  // largest * power: from 2^31 to 2^32
    return {largest * power, power, stats.entropy};
  }
  const double lse = stats.lse * temperature * scale;
  const float value = static_cast<float>(lse);
  return {value, scale, (lse - value) * kLn2};
}

__device__ __forceinline__ RowGradient gradient_of_row(double coefficient, const RowStats& stats, double temperature,
                                                       double exact_scale, float scale, double, double, const NoCap&) {
  return gradient_of({coefficient, 0.0, 0.0}, stats, exact_scale, scaled_base(stats, temperature, scale));
}

// Relative to a pivot near the row's mean logit, where most of the probability is. `logit`: the target's.
__device__ __forceinline__ CappedRowGradient gradient_of_row(double coefficient, const RowStats& stats,
                                                             double temperature, double exact_scale, float scale,
                                                             double logit, double tanh_scale, const TanhCap&) {
  CappedRowGradient row;
  row.pivot = pivot_near((stats.lse - stats.entropy) * temperature);
  const double base = (stats.lse * temperature - level_of(row.pivot)) * scale;
  const float value = static_cast<float>(base);
  const float steep = static_cast<float>(2.0 * scale / (1.0 + static_cast<double>(row.pivot)));
  static_cast<RowGradient&>(row) =
      gradient_of({coefficient, 0.0, 0.0}, stats, exact_scale, {value, steep, (base - value) * kLn2}, 4.0 * tanh_scale,
                  tanh_scale * tanh_slope(tanh_scale * logit));
  return row;
}

// From the cluster's sums: a row's statistics, stored by one block, and what its gradient is computed from. Every lane
// of the calling warp computes the same.
template <class Cap, class T, class Exchange>
__device__ __forceinline__ GradientOf<Cap> finish(const OneRead& args, const Task<T>& task, const Exchange& exchange,
                                                  int turn, double common, const Cap& cap) {
  const int64_t row = task.row;
  const bool stores = rank_in_cluster() == 0 && threadIdx.x % kWarp == 0;
  if (!task.counts) {
    if (stores) {
      args.out.logprobs[row] = args.out.entropy[row] = 0.0f;
      args.out.lse[row] = 0.0;
    }
    return GradientOf<Cap>{};
  }
  const Partial whole = exchange.of_cluster(task.scale, turn);
  const double scale = task.exact_scale;
  const double error = scale * task.unscale - 1.0;  // relative, of the rounded scale; corrected to first order
  Others others{whole.largest, whole.total + whole.weighted * error * kLn2, whole.weighted};
  double target = task.known ? whole.target : NAN;
  if constexpr (Cap::kCapped) {
    others.base = level_of(whole.largest);
    target = std::tanh(args.in.tanh_scale * target);
  }
  RowStats stats = combine(others, target, scale);
  stats.logprob = static_cast<float>(stats.logprob);
  if (stores) {
    args.out.logprobs[row] = static_cast<float>(stats.logprob);
    args.out.entropy[row] = static_cast<float>(stats.entropy);
    args.out.lse[row] = stats.lse;
  }
  const double coefficient = coefficient_of(task, stats.logprob, args.slope);
  if (coefficient == 0.0) return GradientOf<Cap>{};  // whatever the logits and the common factor are
  return gradient_of_row(coefficient * common, stats, task.temperature, scale, task.scale, whole.target,
                         args.in.tanh_scale, cap);
}

// Whether the slice, its gradient and the next row's slice lie alike to the 16-byte boundaries. Then each thread reads
// and replaces its own vectors only, and the next slice can be copied while the gradient is written. (Their lengths are
// the same: a block has the same columns of every row.)
template <class T>
__device__ __forceinline__ bool lie_alike(const Slice<T>& slice, const T* gradient, const Slice<T>& next) {
  return Span<T>(gradient, slice.columns).phase == slice.span.phase && next.span.phase == slice.span.phase;
}

// kBlocks share a multiprocessor, so that the loads of one, the sums of another and the stores of a third overlap. For
// each row a cluster
//
template <class T, class Source, class Cap, int kBlocks>
__global__ void __launch_bounds__(Source::kThreads, kBlocks) one_read(const __grid_constant__ OneRead args) {
#if defined(__CUDA_ARCH__) && !defined(GSPO_CLUSTERS)
  if constexpr (!Source::kResident) {  // `Resident` is not launched on GPUs without clusters
#endif
#if defined(GSPO_ON_HOST)
  auto* buffer = static_cast<Vector*>(on_host::dynamic_shared());
  using InBlock = Shared<T, Source, Cap>;
  auto& shared = *static_cast<InBlock*>(on_host::static_shared(sizeof(InBlock)));
#else
  extern __shared__ Vector buffer[];
  __shared__ Shared<T, Source, Cap> shared;
#endif
  constexpr int kThreads = Source::kThreads;
  static_assert(kThreads > static_cast<int>(kWarp));  // the second warp prepares the next row
  const unsigned ranks = blocks_in_cluster();
  const unsigned first = blockIdx.x / ranks, clusters = gridDim.x / ranks;
  const bool takes_tickets = rank_in_cluster() == 0 && threadIdx.x == 0;
  const double common = common_of(args.common);
  const Cap cap(args.in.tanh_scale);
  if (threadIdx.x == 0) {
    shared.exchange.initialize();
    shared.common = common;
    shared.task[0].prepare(args, first);
    shared.exchange.next[0] = uint64_t{clusters} + first;
  }
  sync_cluster();  // a block that has not begun has no memory to be written to

  bool started = false;    // whether this row's copies were begun during the row before; the same in every thread
  unsigned exchanges = 0;  // so far
  for (int turn = 0; shared.task[turn].row < args.shape.rows; turn ^= 1) {
    const Task<T>& task = shared.task[turn];
    const Task<T>& next = shared.task[turn ^ 1];
    const Source source(task.slice, buffer);
    if constexpr (Source::kResident) {
      if (task.counts && !started) {
        __syncthreads();  // every thread is done with the row before, which was in the buffer
        source.start(task.slice);
      }
    }
    unsigned ticket = 0;
    if (takes_tickets) ticket = take_ticket(args.tickets);
    uint64_t next_row = 0;
    if (threadIdx.x == kWarp) next_row = shared.exchange.next[turn];
    Sums sums;
    if (task.counts) {
      source.await();
      const Span<T>& span = task.slice.span;
      const int owner = task.slice.target < 0 ? -1 : static_cast<int>(span.owner(task.slice.target, kThreads));
      const int warp = static_cast<int>(threadIdx.x / kWarp);
      if (static_cast<int>(threadIdx.x) == owner) shared.exchange.target = source.take_target(task.slice);
      // Whether this warp is sure to have a -inf to sum up: at an edge or in the target's place.
      [[maybe_unused]] const bool bounded = (owner >= 0 && owner / static_cast<int>(kWarp) == warp) ||
                           (warp == 0 && (span.edge(0) >= 0 || span.edge(1) >= 0));
      if constexpr (Cap::kCapped) {
        sums = capped_sums(task.slice, source, task.scale, cap).sums();
      } else {
        RunningSums running;
        if (!bounded) running = uncapped_sums<false>(task.slice, source, task.scale);
        if (bounded || running.weighted != running.weighted)  // NaN comes of another logit of -inf, or of NaN
          running = uncapped_sums<true>(task.slice, source, task.scale);
        sums = running.too_far() ? ties_of(task.slice, source, running.largest) : running.sums(task.scale);
      }
    }
    if (takes_tickets) shared.exchange.after_next = 2 * uint64_t{clusters} + ticket;
    shared.exchange.publish(sums, task.scale, task.counts && task.slice.target >= 0, turn);

    if (threadIdx.x < kWarp) {
      shared.exchange.wait(turn, exchanges++ / 2 & 1u);
      const GradientOf<Cap> gradient = finish(args, task, shared.exchange, turn, shared.common, cap);
      if (threadIdx.x == 0) shared.gradient = gradient;
    } else if (threadIdx.x == kWarp) {
      shared.task[turn ^ 1].prepare(args, static_cast<int64_t>(next_row));
    }
    __syncthreads();
    const GradientOf<Cap> gradient = shared.gradient;
    const bool zero = gradient.constant == 0.0f && gradient.target == 0.0f;
    if constexpr (Source::kResident)
      started = next.row < args.shape.rows && next.counts && (zero || lie_alike(task.slice, task.gradient, next.slice));
    if (zero) {
      if constexpr (Source::kResident)
        if (started) source.start(next.slice);  // no thread reads the buffer after the exchange
      write_zeros<kThreads>(task.slice, task.gradient);
    } else {
      write_gradient<kThreads>(task.slice, source, task.gradient, gradient, cap, started ? &next.slice : nullptr);
    }
  }  // and after the last exchange no block writes to another, which may have ended
#if defined(__CUDA_ARCH__) && !defined(GSPO_CLUSTERS)
  }
#endif
}

}  // namespace gspo::gpu
