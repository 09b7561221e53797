// The row kernels of a CPU, once for each instruction set.
#pragma once

#include <cstdint>

#include "../row_math.h"
#include "../rows.h"
#include "sums.h"

namespace gspo {

// Rows [begin, end) of the whole, for one dtype on one instruction set.
struct RowKernels {
  void (*forward)(const RowShape&, const RowInputs&, const RowOutputs&, int64_t begin, int64_t end);
  // `saved` holds what the forward found. The gradient has the dtype of the logits, or is bf16. It may lie over the
  // logits: a row is written behind its own reading.
  void (*backward)(const RowShape&, const RowInputs&, const RowOutputs& saved, const UpstreamArrays&,
                   const LogitsView& gradient, int64_t begin, int64_t end);
  void (*backward_bfloat16)(const RowShape&, const RowInputs&, const RowOutputs& saved, const UpstreamArrays&,
                            const LogitsView& gradient, int64_t begin, int64_t end);
  // Both for one row after the other, for a gradient that is known in advance: the second read comes from the cache.
  void (*forward_backward)(const RowShape&, const RowInputs&, const RowOutputs&, const UpstreamArrays&,
                           const LogitsView& gradient, int64_t begin, int64_t end);
  void (*scale)(const RowShape&, const LogitsView&, float factor, int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  RowKernels float32, bfloat16, float16;
  SumKernels sums;
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace gspo
