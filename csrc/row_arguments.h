// Python's arguments that the row kernels of the CPU and of the GPU share (rows/extension.py).
#pragma once

#include "python.h"
#include "rows.h"

namespace gspo {

inline RowShape shape_of(python::Arguments& in) {
  const auto outer = in["outer"].integer(), inner = in["inner"].integer(), vocab = in["vocab"].integer();
  if (outer < 0 || inner < 0 || vocab < 0) throw std::invalid_argument("rows: sizes out of range");
  return {outer * inner, inner, vocab};
}

inline LogitsView view_of(python::Arguments& in, const char* name) {
  const auto [data, outer_stride, inner_stride] = in[name].items("address", "outer stride", "inner stride");
  return {data.address<char>(), outer_stride.integer(), inner_stride.integer()};
}

inline RowInputs inputs_of(python::Arguments& in, const LogitsView& logits) {
  RowInputs inputs{};
  inputs.logits = logits;
  inputs.token_ids = in["token_ids"].address<const int64_t>();
  inputs.mask = in["mask"].address<const bool>();
  inputs.temperature = in["temperature"].real();
  inputs.row_temperature = in["row_temperature"].address<const float>();
  inputs.tanh_scale = in["tanh_scale"].real();
  return inputs;
}

inline RowOutputs outputs_of(python::Arguments& in) {
  float* const logprobs = in["logprobs"].address<float>();
  float* const entropy = in["entropy"].address<float>();
  return {logprobs, entropy, in["lse"].address<double>()};
}

}  // namespace gspo
