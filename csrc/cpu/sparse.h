// A sparse head: each row of hidden states times a few rows of the head, its entries (see sparse.cpp).
#pragma once

#include <cstdint>

namespace gspo {

enum ElementType { kFloat32, kBFloat16, kFloat16, kElementTypes };

// A matrix [rows, columns] whose columns are neighbours; the stride is in elements.
struct Matrix {
  ElementType type;
  char* data;
  int64_t rows, columns, row_stride;

  int64_t bytes() const { return type == kFloat32 ? 4 : 2; }  // of an element
  char* at(int64_t row, int64_t column) const { return data + (row * row_stride + column) * bytes(); }
};

// Row i has entries [offsets[i], offsets[i + 1]); entry e is row `ids[e]` of the head, or none (kAbsent).
struct SparseEntries {
  int64_t count, rows;
  const int32_t* ids;
  const int64_t* offsets;
  const int64_t* row_of;  // [count]
  const bool* active;     // [rows]; other rows are not read. Null: all are
};

// What a head computes on one instruction set. `rounded_to`: the dtype that elements of matrices are rounded to first.
struct SparseInstructions;

// out[e] = hidden[row_of[e]] . head[ids[e]], added to `out` if `add`. Absent entries have -inf, inactive rows 0.
void kept_logits(const SparseInstructions&, const Matrix& hidden, const Matrix& head, ElementType rounded_to,
                 const SparseEntries&, float* out, bool add, int threads);

// out[i] = sum over the entries e of row i of gradient[e] * head[ids[e]]
void hidden_gradient(const SparseInstructions&, const float* gradient, const Matrix& head, ElementType rounded_to,
                     const SparseEntries&, const Matrix& out, int threads);

// Entries in `order` are sorted by id; those with one id are a run. The sum over a run of gradient[e] * hidden[row_of[e]]
// is written to row destination[s] of `out`, s being where the run begins. Runs without a gradient write nothing.
void weight_gradient(const SparseInstructions&, const float* gradient, const Matrix& hidden, ElementType rounded_to,
                     const SparseEntries&, const int64_t* order, const int64_t* destination, const Matrix& out,
                     int threads);

// ---- for sparse.cpp and sparse.inc

// For rows of one dtype whose elements are rounded to another. `next` is the row that is read next: it is prefetched.
struct SparseKernels {
  void (*widen)(const char* row, int64_t columns, float* out);
  float (*dot)(const float* left, const char* row, int64_t columns, const char* next);
  void (*add)(float* sums, float factor, const char* row, int64_t columns, const char* next);  // sums += factor * row
};

struct SparseInstructions {
  SparseKernels kernels[kElementTypes][kElementTypes];  // of the row, rounded to
  void (*store[kElementTypes])(const float* sums, int64_t columns, char* out);
};

extern const SparseInstructions kSparseBaseline;
#if defined(__x86_64__)
extern const SparseInstructions kSparseAvx2, kSparseAvx512;
#endif

}  // namespace gspo
