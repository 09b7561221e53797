// What the row kernels take and give: addresses, sizes and strides. Shared by every instruction set and the bindings.
#pragma once

#include <cstdint>

#include "../row_math.h"

namespace gspo {

// [outer, inner, vocab] logits, or a gradient of that shape: two leading strides in elements, the last one is 1.
struct LogitsView {
  char* data;
  int64_t outer_stride;
  int64_t inner_stride;
};

struct RowShape {
  int64_t rows;   // outer * inner
  int64_t inner;
  int64_t vocab;
};

// Arrays of one number per row, in row order; a null pointer means "absent".
struct RowInputs {
  LogitsView logits;
  const int64_t* token_ids;
  const bool* mask;              // absent: every row counts
  const float* row_temperature;  // absent: `temperature` for every row
  double temperature;
  const int64_t* places;  // for the gradient alone: row i is row places[i] of the logits; absent: row i
};

struct RowOutputs {
  float* logprobs;
  float* entropy;
  double* lse;
};

struct UpstreamArrays {
  const float* logprobs;  // each may be absent: zero
  const float* entropy;
  const double* lse;
};

// Rows [begin, end) of the whole, for one dtype on one instruction set.
struct RowKernels {
  void (*forward)(const RowShape&, const RowInputs&, const RowOutputs&, int64_t begin, int64_t end);
  // `saved` holds what the forward found. The gradient has the dtype of the logits, or is bf16. It may lie over the
  // logits: a row is written behind its own reading.
  void (*backward)(const RowShape&, const RowInputs&, const RowOutputs& saved, const UpstreamArrays&,
                   const LogitsView& gradient, int64_t begin, int64_t end);
  void (*backward_bfloat16)(const RowShape&, const RowInputs&, const RowOutputs& saved, const UpstreamArrays&,
                            const LogitsView& gradient, int64_t begin, int64_t end);
  // Both in one visit to each row, for a gradient that is known beforehand: the second read comes from the cache.
  void (*forward_backward)(const RowShape&, const RowInputs&, const RowOutputs&, const UpstreamArrays&,
                           const LogitsView& gradient, int64_t begin, int64_t end);
  void (*scale)(const RowShape&, const LogitsView&, float factor, int64_t begin, int64_t end);
};

struct InstructionSet {
  const char* name;
  RowKernels float32, bfloat16, float16;
};

extern const InstructionSet kBaseline;
#if defined(__x86_64__)
extern const InstructionSet kAvx2;
extern const InstructionSet kAvx512;
#endif

}  // namespace gspo
