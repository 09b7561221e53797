// Products of two matrices with float32 sums (see products.cpp).
#pragma once

#include <cstdint>

namespace gspo {

// A matrix [lines, depth]; sums run over the depth. Lines are rows of the left operand, columns of the right one.
struct Operand {
  const void* data;
  int64_t lines, line_stride, depth_stride;  // strides in elements; one of them is 1
};

// out [rows, columns] = factor * left right, plus what `out` holds (`add`) or the bias of the column.
struct Product {
  Operand left, right;
  int64_t depth;
  float* out;
  int64_t out_stride;
  const float* bias;  // [columns], or null; not with `add`
  bool add;
  float factor;
};

struct ProductKernels;

void multiply(const ProductKernels& kernels, const Product& product, int threads);

// ---- for products.cpp and products.inc

// A range of the depth, for which the operand with fewer lines has been packed for all threads. Depths are in words.
struct SharedProduct {
  Product product;
  bool shares_left;
  int shared_lines;      // of a panel
  int64_t depth, range;  // of a block of the depth; of all that is packed at a time
  int64_t begin, end;
  uint32_t* packed;  // [panels][range][shared_lines]
};

struct Panels {
  int64_t begin, end;
};

// For one dtype of the right operand on one instruction set. The left operand is float32, or bf16 like the right one.
struct ProductKernels {
  int elements, rows, columns;  // of a word; of a tile of sums
  void (*pack_shared)(const SharedProduct&, const Panels&);
  // These panels of both operands; `block` is memory for those of the streamed one, a block of the depth at a time.
  void (*multiply)(const SharedProduct&, const Panels& shared, const Panels& streamed, uint32_t* block);
};

struct ProductInstructions {
  const char* name;
  bool multiplies_bfloat16;  // whether the left operand is bf16 where the right one is
  ProductKernels float32, bfloat16, float16;
};

extern const ProductInstructions kProductsBaseline;
#if defined(__x86_64__)
extern const ProductInstructions kProductsAvx2, kProductsAvx512;
extern const ProductInstructions* const kProductsAvx512Bf16;  // null where the compiler does not know them
#endif

}  // namespace gspo
