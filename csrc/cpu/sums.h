// Sums over chunks of rows, such as the gradient of a head, in 24 bits each: those of a float32 without its last 8.
#pragma once

#include <cstdint>

namespace gspo {

// `high` are the upper 16 bits, a bf16 number that is not rounded, and `low` the 8 bits after them.
struct Sums24 {
  uint16_t* high;
  uint8_t* low;
};

// Numbers [begin, end) of the sums, on one instruction set.
struct SumKernels {
  // Adds a product; pass 0 writes it without reading the sums. Number i of `product` belongs to sum `first` + i.
  // `pass` counts the products that have been added to these sums.
  void (*add)(const Sums24&, int64_t first, const float* product, uint32_t pass, int64_t begin, int64_t end);
  // Multiplies the sums by a factor and rounds them to bf16, in place of `high`.
  void (*round)(const Sums24&, float factor, int64_t begin, int64_t end);
};

}  // namespace gspo
