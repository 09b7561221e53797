// The products of a sparse head, which multiplies each row of hidden states by a few rows of the head: N K D operations
// for N rows of K entries, in place of N V D. All of them read scattered rows, so each kernel prefetches the row after
// the one it reads.
//
// Logits are dot products: bits depend on the two rows alone. Both gradients are sums of rows: a row of hidden states
// gets the sum over its entries, a row of the head that over all entries with its id. A sum has one order, that of the
// entries. Long sums are split by columns, never by terms, so bits do not depend on the number of threads either.
#include "sparse.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "../rows.h"
#include "denormals.h"
#include "parallel.h"

namespace gspo {

namespace {

constexpr int64_t kTermsPerTask = 64;  // rows that a task reads, some 100 KB
constexpr int64_t kMinColumns = 256;   // of a part of a long sum
constexpr int64_t kNumbersPerThread = 1 << 17;  // less than 0.1 ms of work: waking a thread would cost more

int useful_threads(int64_t terms, int64_t columns, int threads) {
  return static_cast<int>(std::min<int64_t>(threads, 1 + terms * columns / kNumbersPerThread));
}

bool is_active(const SparseEntries& entries, int64_t row) { return !entries.active || entries.active[row]; }

bool is_inside(const Matrix& matrix, int64_t row) { return 0 <= row && row < matrix.rows; }

// ---- sums of rows

struct Term {
  float factor;  // 0: the row is not read
  const char* row;
};

// Sums [first, last), columns [column, column + columns) of them.
struct SumTask {
  int64_t first, last, column, columns;
};

// Sum i has terms [begins[i], begins[i + 1]). A long sum is a task, or several with a part of the columns each.
std::vector<SumTask> sum_tasks(const int64_t* begins, int64_t sums, int64_t columns, int threads) {
  const int64_t parts = std::clamp<int64_t>(columns / kMinColumns, 1, threads);
  const int64_t width = (columns + parts - 1) / parts;
  std::vector<SumTask> tasks;
  for (int64_t first = 0, last; first < sums; first = last) {
    last = first + 1;
    if (begins[last] - begins[first] > kTermsPerTask) {
      for (int64_t column = 0; column < columns; column += width)
        tasks.push_back({first, last, column, std::min(width, columns - column)});
      continue;
    }
    while (last < sums && begins[last + 1] - begins[first] <= kTermsPerTask && last - first < kTermsPerTask) ++last;
    tasks.push_back({first, last, 0, columns});
  }
  return tasks;
}

// write(i, column, columns, sums) for each sum; `sums` is null where it has no terms. `term(t, column)` is number t.
template <class TermOf, class Write>
void for_each_sum(const SparseKernels& kernels, const std::vector<int64_t>& begins, int64_t columns, int threads,
                  const TermOf& term, const Write& write) {
  const int64_t sums = static_cast<int64_t>(begins.size()) - 1;
  threads = useful_threads(begins[sums] - begins[0] + sums, columns, threads);
  const std::vector<SumTask> tasks = sum_tasks(begins.data(), sums, columns, threads);
  parallel_for(static_cast<int64_t>(tasks.size()), 1, threads, [&](int64_t number, int64_t) {
    const FlushDenormals scope;
    const SumTask& task = tasks[number];
    float* buffer = static_cast<float*>(thread_buffer(task.columns * sizeof(float)));
    const int64_t end = begins[task.last];
    const auto next_term = [&](int64_t t) {  // that has a factor
      for (; t < end; ++t)
        if (const Term found = term(t, task.column); found.factor != 0.0f) return std::pair{t, found};
      return std::pair{end, Term{0.0f, nullptr}};
    };
    auto [at, current] = next_term(begins[task.first]);
    for (int64_t i = task.first; i < task.last; ++i) {
      const bool any = at < begins[i + 1];
      if (any) std::memset(buffer, 0, task.columns * sizeof(float));
      while (at < begins[i + 1]) {
        const auto next = next_term(at + 1);
        kernels.add(buffer, current.factor, current.row, task.columns, next.second.row ? next.second.row : current.row);
        std::tie(at, current) = next;
      }
      write(i, task.column, task.columns, any ? buffer : nullptr);
    }
  });
}

}  // namespace

void kept_logits(const SparseInstructions& isa, const Matrix& hidden, const Matrix& head, ElementType rounded_to,
                 const SparseEntries& entries, float* out, bool add, int threads) {
  const auto widen = isa.kernels[hidden.type][rounded_to].widen;
  const auto dot = isa.kernels[head.type][rounded_to].dot;
  threads = useful_threads(entries.count, hidden.columns, threads);
  parallel_for(entries.count, kTermsPerTask, threads, [&](int64_t begin, int64_t end) {
    const FlushDenormals scope;
    float* left = static_cast<float*>(thread_buffer(hidden.columns * sizeof(float)));
    int64_t row_in_buffer = -1;
    for (int64_t e = begin; e < end; ++e) {
      const int64_t row = entries.row_of[e], id = entries.ids[e];
      if (!is_active(entries, row)) {
        out[e] = 0.0f;
      } else if (!is_inside(head, id)) {
        out[e] = id == kAbsent ? -std::numeric_limits<float>::infinity() : std::numeric_limits<float>::quiet_NaN();
      } else {
        if (row != row_in_buffer) widen(hidden.at(row, 0), hidden.columns, left);
        row_in_buffer = row;
        const int64_t next = e + 1 < end && is_inside(head, entries.ids[e + 1]) ? entries.ids[e + 1] : id;
        const float logit = dot(left, head.at(id, 0), hidden.columns, head.at(next, 0));
        out[e] = add ? out[e] + logit : logit;
      }
    }
  });
}

void hidden_gradient(const SparseInstructions& isa, const float* gradient, const Matrix& head, ElementType rounded_to,
                     const SparseEntries& entries, const Matrix& out, int threads) {
  const std::vector<int64_t> begins(entries.offsets, entries.offsets + entries.rows + 1);
  const auto term = [&](int64_t e, int64_t column) {
    const int64_t id = entries.ids[e];
    const bool counts = is_inside(head, id) && is_active(entries, entries.row_of[e]);
    return counts ? Term{gradient[e], head.at(id, column)} : Term{0.0f, nullptr};
  };
  const auto write = [&](int64_t row, int64_t column, int64_t columns, const float* sums) {
    if (sums)
      isa.store[out.type](sums, columns, out.at(row, column));
    else
      std::memset(out.at(row, column), 0, columns * out.bytes());
  };
  for_each_sum(isa.kernels[head.type][rounded_to], begins, head.columns, threads, term, write);
}

void weight_gradient(const SparseInstructions& isa, const float* gradient, const Matrix& hidden, ElementType rounded_to,
                     const SparseEntries& entries, const int64_t* order, const int64_t* destination, const Matrix& out,
                     int threads) {
  const auto id = [&](int64_t s) { return entries.ids[order[s]]; };
  int64_t first = 0;
  while (first < entries.count && id(first) < 0) ++first;  // absent
  if (first == entries.count) return;
  std::vector<int64_t> begins{first};
  for (int64_t s = first + 1; s < entries.count; ++s)
    if (id(s) != id(s - 1)) begins.push_back(s);
  begins.push_back(entries.count);
  const auto term = [&](int64_t s, int64_t column) {
    const int64_t row = entries.row_of[order[s]];
    return is_active(entries, row) ? Term{gradient[order[s]], hidden.at(row, column)} : Term{0.0f, nullptr};
  };
  const auto write = [&](int64_t run, int64_t column, int64_t columns, const float* sums) {
    const int64_t row = destination[begins[run]];
    if (sums && is_inside(out, row)) isa.store[out.type](sums, columns, out.at(row, column));
  };
  for_each_sum(isa.kernels[hidden.type][rounded_to], begins, hidden.columns, threads, term, write);
}

}  // namespace gspo
