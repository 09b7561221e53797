// Inputs and outputs of the row kernels: addresses, sizes and strides. Shared by the CPU, the GPU and the bindings.
#pragma once

#include <cstdint>

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

// A kept column, or a token, that is in another part of a vocabulary which is sharded over ranks.
constexpr int32_t kAbsent = INT32_MIN;

// Arrays of one number per row, in row order; a null pointer means "absent".
struct RowInputs {
  LogitsView logits;
  const int64_t* token_ids;
  const bool* mask;              // absent: every row is active
  const float* row_temperature;  // absent: `temperature` for every row
  double temperature;
  const int64_t* row_indices;  // of `backward` alone: row i is row row_indices[i] of the logits; absent: row i
  double tanh_scale;  // the logits are tanh(tanh_scale * x), see row_math.h; 0: they are x
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

// What all upstream gradients are multiplied by: `*factor` over the sum of `counts`; either may be absent.
struct Common {
  const float* factor;
  const float* counts;
  int64_t count_size;
};

}  // namespace gspo
