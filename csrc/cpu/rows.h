// The row kernels of a CPU, once for each instruction set.
#pragma once

#include <cstdint>

#include "../row_math.h"
#include "../rows.h"
#include "sums.h"

namespace gspo {

enum class KeptForm {
  kAll,       // every row keeps all columns, and has no entries
  kSome,      // a row without entries keeps all columns
  kEvery,     // every row has entries; one without is NaN
  kGathered,  // number e of the logits, and of the gradient, is that of entry e; a row without entries has no column
};

// The columns that rows keep, such as those of top-p: entries [offsets[i], offsets[i + 1]) are those of row i, and `ids`
// their columns, in any order.
struct KeptColumns {
  KeptForm form;
  const int32_t* ids;
  const int64_t* offsets;
  int64_t entries;
  void* buffer;  // of this thread, for the logits of one row's entries
};

struct EntryRange {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Offsets that decrease, or lie outside, are clamped: they never lead out of the arrays.
static inline EntryRange entries_of(const KeptColumns& kept, int64_t row) {
  const auto clamped = [](int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; };
  if (kept.form == KeptForm::kAll) return {0, 0};
  const int64_t begin = clamped(kept.offsets[row], 0, kept.entries);
  return {begin, clamped(kept.offsets[row + 1], begin, kept.entries)};
}

// Rows [begin, end) of the whole, for one dtype on one instruction set.
struct RowKernels {
  void (*forward)(const RowShape&, const RowInputs&, const KeptColumns&, const RowOutputs&, int64_t begin, int64_t end);
  // `saved` holds what the forward found. The gradient has the dtype of the logits, or is bf16. It may lie over the
  // logits: a row is written behind its own reading.
  void (*backward)(const RowShape&, const RowInputs&, const KeptColumns&, const RowOutputs& saved,
                   const UpstreamArrays&, const LogitsView& gradient, int64_t begin, int64_t end);
  void (*backward_bfloat16)(const RowShape&, const RowInputs&, const KeptColumns&, const RowOutputs& saved,
                            const UpstreamArrays&, const LogitsView& gradient, int64_t begin, int64_t end);
  // Both for one row after the other, for a gradient that is known in advance: the second read comes from the cache.
  void (*forward_backward)(const RowShape&, const RowInputs&, const KeptColumns&, const RowOutputs&,
                           const UpstreamArrays&, const LogitsView& gradient, int64_t begin, int64_t end);
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
