// Matrix products with float32 sums. Both operands are copied ("packed") into panels of a few lines, which one loop
// multiplies: 6 rows by 64 columns of sums in registers (AVX-512). It reads 32-bit words: a float, or two neighbours in
// depth of bf16, which one instruction multiplies and adds. Where there is no such instruction, bf16 and fp16 become
// floats while they are packed.
//
// The operand with fewer lines is packed once, by all threads. The lines of the other one are split into blocks: a task
// packs a block into its second-level cache and multiplies it by the first operand. Where the depth is a vocabulary,
// this is done for one range of the depth after the other.
//
// The order of a sum depends on the depth alone: blocks of almost equal depth, each summed from its first word to its
// last, are added to `out` one after the other. Panels are filled up with zeros, so that every row and every column
// takes the same instructions. So bits depend neither on the number of rows and columns, nor on their position, nor on
// the number of threads.
#include "products.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "parallel.h"

namespace gspo {

namespace {

constexpr int64_t kBlockDepth = 512;       // words: a panel of 6 rows is 12 KB and stays in the first-level cache
constexpr int64_t kBlockWords = 64 << 10;  // 256 KB: a task's block stays in the second-level cache
constexpr int64_t kSharedWords = 4 << 20;  // 16 MB for the operand that all tasks read
constexpr int64_t kTasksPerThread = 4;

struct Free {
  void operator()(uint32_t* p) const { std::free(p); }
};
using Words = std::unique_ptr<uint32_t[], Free>;

Words allocate(int64_t words) {
  void* p = std::aligned_alloc(64, (words * 4 + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Words(static_cast<uint32_t*>(p));
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void multiply(const ProductKernels& kernels, const Product& product, int threads) {
  SharedProduct s{};
  s.product = product;
  s.shares_left = product.left.lines <= product.right.lines;
  s.shared_lines = s.shares_left ? kernels.rows : kernels.columns;
  const int streamed_lines = s.shares_left ? kernels.columns : kernels.rows;
  const int64_t shared_panels = divide_up(std::min(product.left.lines, product.right.lines), s.shared_lines);
  const int64_t panels = divide_up(std::max(product.left.lines, product.right.lines), streamed_lines);

  const int64_t words = divide_up(product.depth, kernels.elements);
  s.depth = divide_up(words, divide_up(words, kBlockDepth));
  const int64_t shared_words = shared_panels * s.shared_lines * s.depth;  // of one block of the depth
  s.range = std::min(words, std::max<int64_t>(1, kSharedWords / shared_words) * s.depth);
  const Words packed = allocate(shared_panels * s.shared_lines * s.range);
  s.packed = packed.get();

  const int64_t tasks = kTasksPerThread * threads;  // at least, as far as there are panels
  const int64_t block = std::max<int64_t>(1, std::min(kBlockWords / (streamed_lines * s.depth), panels / tasks));
  const int64_t blocks = divide_up(panels, block);
  const int64_t parts = std::min(shared_panels, divide_up(tasks, blocks));  // of the shared operand

  for (s.begin = 0; s.begin < words; s.begin = s.end) {
    s.end = std::min(s.begin + s.range, words);
    parallel_for(shared_panels, divide_up(shared_panels, tasks), threads,
                 [&](int64_t first, int64_t last) { kernels.pack_shared(s, {first, last}); });
    parallel_for(blocks * parts, 1, threads, [&](int64_t task, int64_t) {
      static thread_local const Words memory = allocate(kBlockWords);  // one block, kept for the thread's next task
      const int64_t first = task / parts * block, part = task % parts;
      kernels.multiply(s, {shared_panels * part / parts, shared_panels * (part + 1) / parts},
                       {first, std::min(first + block, panels)}, memory.get());
    });
  }
}

}  // namespace gspo
