// The interface of the GPU's row kernels, without CUDA's headers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../rows.h"
#include "../token_slope.h"

namespace gspo::gpu {

// Statistics of each row and its gradient, where the gradient depends on this row alone. Addresses are of the device.
struct OneRead {
  RowShape shape;
  RowInputs in;
  RowOutputs out;
  UpstreamArrays upstream;  // dL/dlogprob of every row; with old_logprobs what its slope is multiplied by. Others: none
  Common common;
  TokenSlope slope;
  LogitsView gradient;  // of the logits' dtype; may lie over them
  unsigned* tickets;    // one, and 0
};

// How a launch is laid out.
struct Layout {
  bool resident;    // the row stays on the chip; else it is read twice
  unsigned blocks;  // of a cluster
  unsigned clusters;
  unsigned threads;
  size_t shared_bytes;  // of a block
};

// Why no kernel can run on this device; empty if they can.
std::string unavailable_reason(int device);

// The CUDA release that the kernels were built with, such as "13.0".
std::string release();

// Names of the kernel's variants in this build, the default first; others are compiled to be measured (GSPO_VARIANTS).
std::vector<std::string> variants();

// Makes launches use this variant from now on, in the whole process. Throws std::invalid_argument for an unknown name.
void use_variant(const std::string& name);

// Both throw std::runtime_error with CUDA's message and the kernel's name. `dtype`: float32, bfloat16, float16. The
// device becomes the current one: the caller, who has made it that already, puts another one back. The layout is that
// of logits without a cap.
Layout layout(const std::string& dtype, int64_t vocab, int64_t rows, int device);
void one_read(const std::string& dtype, const OneRead& arguments, int device, uintptr_t stream);

}  // namespace gspo::gpu
