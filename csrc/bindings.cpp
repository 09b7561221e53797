// The only extension module. It takes addresses, sizes and a thread count, and nothing of torch's ABI: one build works
// with any torch. The Python side owns shapes and lifetimes, and checks token ids before it comes here (rows/operators.py).
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/rows.h"
#include "cpu/sparse.h"
#if defined(GSPO_CUDA)
#include "cuda/bindings.h"
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

namespace {

using namespace gspo;

#if defined(__x86_64__)
bool has_f16c() {  // not every compiler's __builtin_cpu_supports knows it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
  return name == "baseline";
}

// What this processor has for products of bf16 matrices: tile units, or instructions of AVX-512.
enum class BFloat16Units { kAmx, kAvx512 };

bool has_bfloat16(BFloat16Units units) {
#if defined(__x86_64__)
  const bool amx = units == BFloat16Units::kAmx;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, amx ? 0 : 1, &eax, &ebx, &ecx, &edx)) return false;
  return (amx ? edx >> 22 : eax >> 5) & 1 && supported("avx512");
#else
  return false;
#endif
}

bool is_intel() {
#if defined(__x86_64__)
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx;
#else
  return false;
#endif
}

// The widest instruction set of this processor, or the one that GSPO_KERNELS_ISA names.
const InstructionSet& instruction_set() {
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const InstructionSet* all[] = {
#if defined(__x86_64__)
        &kAvx512, &kAvx2,
#endif
        &kBaseline};
    const char* requested = std::getenv("GSPO_KERNELS_ISA");
    for (const InstructionSet* isa : all)
      if (supported(isa->name) && (!requested || !*requested || std::string(requested) == isa->name)) return *isa;
    throw std::invalid_argument(std::string("GSPO_KERNELS_ISA: expected avx512, avx2 or baseline, as far as this "
                                            "processor has them, got '") + requested + "'");
  }();
  return chosen;
}

// Products take as much of the chosen instruction set as they have kernels for.
const ProductInstructions& product_instructions() {
#if defined(__x86_64__)
  const std::string rows = instruction_set().name;
  if (rows == "avx512")
    return has_bfloat16(BFloat16Units::kAvx512) && kProductsAvx512Bf16 ? *kProductsAvx512Bf16 : kProductsAvx512;
  if (rows != "baseline" && supported("avx2")) return kProductsAvx2;
#endif
  return kProductsBaseline;
}

// Products by the dtype of the right operand.
const ProductKernels& product_kernels(const std::string& dtype) {
  const ProductInstructions& instructions = product_instructions();
  if (dtype == "float32") return instructions.float32;
  if (dtype == "bfloat16") return instructions.bfloat16;
  if (dtype == "float16") return instructions.float16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

// left [rows, depth], right [depth, columns]; strides in elements.
void multiply_matrices(const std::string& dtype, int64_t rows, int64_t columns, int64_t depth, uintptr_t left,
                       int64_t left_row_stride, int64_t left_depth_stride, uintptr_t right, int64_t right_depth_stride,
                       int64_t right_column_stride, uintptr_t out, int64_t out_stride, uintptr_t bias, bool add,
                       double factor, int threads) {
  if (rows < 1 || columns < 1 || depth < 1) throw std::invalid_argument("multiply: sizes out of range");
  const Product product{
      {reinterpret_cast<const void*>(left), rows, left_row_stride, left_depth_stride},
      {reinterpret_cast<const void*>(right), columns, right_column_stride, right_depth_stride},
      depth, reinterpret_cast<float*>(out), out_stride, reinterpret_cast<const float*>(bias), add,
      static_cast<float>(factor)};
  multiply(product_kernels(dtype), product, threads);
}

const RowKernels& kernels(const std::string& dtype) {
  const InstructionSet& isa = instruction_set();
  if (dtype == "float32") return isa.float32;
  if (dtype == "bfloat16") return isa.bfloat16;
  if (dtype == "float16") return isa.float16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

KeptForm form_of(const std::string& name) {
  if (name == "all") return KeptForm::kAll;
  if (name == "some") return KeptForm::kSome;
  if (name == "every") return KeptForm::kEvery;
  if (name == "gathered") return KeptForm::kGathered;
  throw std::invalid_argument("kept_form: expected all, some, every or gathered, got '" + name + "'");
}

// One call's rows: the logits, the inputs of each row, the columns that rows keep, and the number of threads.
struct Rows {
  RowShape shape;
  RowInputs inputs;
  KeptColumns kept;
  const RowKernels* kernels;
  int threads;
  int64_t columns = 0;  // that all rows keep
  size_t buffer_bytes = 0;

  Rows(const std::string& dtype, uintptr_t logits, int64_t outer, int64_t inner, int64_t vocab, int64_t outer_stride,
       int64_t inner_stride, uintptr_t token_ids, uintptr_t mask, double temperature, uintptr_t row_temperature,
       uintptr_t row_indices, double tanh_scale, const std::string& kept_form, uintptr_t kept_ids,
       uintptr_t kept_offsets, int64_t kept_entries, int threads)
      : shape{outer * inner, inner, vocab},
        inputs{{pointer<char>(logits), outer_stride, inner_stride}, pointer<const int64_t>(token_ids),
               pointer<const bool>(mask), pointer<const float>(row_temperature), temperature,
               pointer<const int64_t>(row_indices), tanh_scale},
        kept{form_of(kept_form), pointer<const int32_t>(kept_ids), pointer<const int64_t>(kept_offsets), kept_entries,
             nullptr},
        kernels(&::kernels(dtype)),
        threads(threads) {
    if (outer < 0 || inner < 0 || vocab < (gathered() ? 0 : 1) || kept_entries < 0)
      throw std::invalid_argument("rows: sizes out of range");
    count_columns();
  }

  void count_columns() {
    if (kept.form == KeptForm::kAll) {
      columns = shape.rows * shape.vocab;
      return;
    }
    int64_t most = 0;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const int64_t entries = entries_of(kept, row).count();
      columns += entries == 0 && kept.form == KeptForm::kSome ? shape.vocab : entries;
      most = std::max(most, entries);
    }
    buffer_bytes = most * sizeof(float);
  }

  // Calls run(kept, begin, end) for all rows, in which so many columns are read or written.
  template <class F>
  void for_each(int64_t columns, const F& run) const {
    constexpr int64_t kColumnsPerTask = 1 << 16;    // small vocabularies: several rows a task
    constexpr int64_t kColumnsPerThread = 1 << 18;  // less than 0.1 ms of work: waking a thread would cost more
    constexpr int64_t kColumnsOfShortRow = 256;     // that take as long as a row of one column
    constexpr int64_t kKeptRowsPerTask = 16;        // one of them may keep all columns
    const bool whole = kept.form == KeptForm::kAll;
    if (!whole) columns += shape.rows * kColumnsOfShortRow;
    const int64_t rows = std::max<int64_t>(1, kColumnsPerTask * shape.rows / std::max<int64_t>(1, columns));
    const int64_t grain = whole ? rows : std::min(rows, kKeptRowsPerTask);
    const int64_t useful = 1 + columns / kColumnsPerThread;
    parallel_for(shape.rows, grain, useful < threads ? static_cast<int>(useful) : threads,
                 [&](int64_t begin, int64_t end) {
                   KeptColumns own = kept;
                   if (buffer_bytes) own.buffer = thread_buffer(buffer_bytes);
                   run(own, begin, end);
                 });
  }

  bool gathered() const { return kept.form == KeptForm::kGathered; }
  int64_t columns_of_gradient() const { return gathered() ? columns : shape.rows * shape.vocab; }

  void forward(uintptr_t logprobs, uintptr_t entropy, uintptr_t lse) const {
    const RowOutputs out{pointer<float>(logprobs), pointer<float>(entropy), pointer<double>(lse)};
    for_each(columns, [&](const KeptColumns& own, int64_t begin, int64_t end) {
      kernels->forward(shape, inputs, own, out, begin, end);
    });
  }

  void backward(uintptr_t logprobs, uintptr_t entropy, uintptr_t lse, uintptr_t grad_logprobs, uintptr_t grad_entropy,
                uintptr_t grad_lse, uintptr_t gradient, int64_t outer_stride, int64_t inner_stride,
                bool gradient_is_bfloat16) const {
    const auto run = gradient_is_bfloat16 ? kernels->backward_bfloat16 : kernels->backward;
    const RowOutputs saved{pointer<float>(logprobs), pointer<float>(entropy), pointer<double>(lse)};
    const UpstreamArrays upstream{pointer<const float>(grad_logprobs), pointer<const float>(grad_entropy),
                                  pointer<const double>(grad_lse)};
    const LogitsView view{pointer<char>(gradient), outer_stride, inner_stride};
    for_each(columns_of_gradient(), [&](const KeptColumns& own, int64_t begin, int64_t end) {
      run(shape, inputs, own, saved, upstream, view, begin, end);
    });
  }

  void forward_backward(uintptr_t logprobs, uintptr_t entropy, uintptr_t lse, uintptr_t grad_logprobs,
                        uintptr_t gradient, int64_t outer_stride, int64_t inner_stride) const {
    const RowOutputs out{pointer<float>(logprobs), pointer<float>(entropy), pointer<double>(lse)};
    const UpstreamArrays upstream{pointer<const float>(grad_logprobs), nullptr, nullptr};
    const LogitsView view{pointer<char>(gradient), outer_stride, inner_stride};
    for_each(columns_of_gradient(), [&](const KeptColumns& own, int64_t begin, int64_t end) {
      kernels->forward_backward(shape, inputs, own, out, upstream, view, begin, end);
    });
  }

  // Multiplies the numbers (such as a saved gradient) in place; a factor of exactly 1 writes nothing.
  void scale(double factor) const {
    if (factor == 1.0) return;
    for_each(columns, [&](const KeptColumns&, int64_t begin, int64_t end) {
      kernels->scale(shape, inputs.logits, static_cast<float>(factor), begin, end);
    });
  }
};

// ---- a sparse head

const SparseInstructions& sparse_instructions() {
#if defined(__x86_64__)
  const std::string rows = instruction_set().name;
  if (rows == "avx512") return kSparseAvx512;
  if (rows == "avx2") return kSparseAvx2;
#endif
  return kSparseBaseline;
}

ElementType element_type(const std::string& dtype) {
  if (dtype == "float32") return kFloat32;
  if (dtype == "bfloat16") return kBFloat16;
  if (dtype == "float16") return kFloat16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

Matrix matrix(const std::string& dtype, uintptr_t data, int64_t rows, int64_t columns, int64_t row_stride) {
  if (rows < 0 || columns < 0) throw std::invalid_argument("matrix: sizes out of range");
  return {element_type(dtype), pointer<char>(data), rows, columns, row_stride};
}

SparseEntries sparse_entries(int64_t count, int64_t rows, uintptr_t ids, uintptr_t offsets, uintptr_t row_of,
                             uintptr_t active) {
  if (count < 0 || rows < 0) throw std::invalid_argument("entries: sizes out of range");
  return {count, rows, pointer<const int32_t>(ids), pointer<const int64_t>(offsets), pointer<const int64_t>(row_of),
          pointer<const bool>(active)};
}

// Sums in 24 bits, and `count` numbers of a product to add to them from sum `first` on.
template <class F>
void for_each_sum(int64_t count, int threads, const F& run) {
  constexpr int64_t kSumsPerTask = 1 << 14;
  parallel_for(count, kSumsPerTask, threads, run);
}

void add_to_sums(uintptr_t high, uintptr_t low, int64_t first, uintptr_t product, int64_t count, uint32_t pass,
                 int threads) {
  const Sums24 sums{pointer<uint16_t>(high), pointer<uint8_t>(low)};
  for_each_sum(count, threads, [&](int64_t begin, int64_t end) {
    instruction_set().sums.add(sums, first, pointer<const float>(product), pass, begin, end);
  });
}

void round_sums(uintptr_t high, uintptr_t low, int64_t count, float factor, int threads) {
  const Sums24 sums{pointer<uint16_t>(high), pointer<uint8_t>(low)};
  for_each_sum(count, threads,
               [&](int64_t begin, int64_t end) { instruction_set().sums.round(sums, factor, begin, end); });
}

// Page faults on a newly allocated gradient cost more than the arithmetic: request 2 MiB pages before the first write.
void request_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge, end = (address + bytes) / kHuge * kHuge;
  if (end > begin) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Row kernels of gspo_kernels (see csrc/).";
#if defined(GSPO_CUDA)
  gspo::gpu::bind(m);
#endif
  m.def("instruction_set", [] { return std::string(instruction_set().name); });
  m.def("product_instructions", [] { return std::string(product_instructions().name); });
  m.def("multiplies_bfloat16", [] { return product_instructions().multiplies_bfloat16; });
  m.def("has_amx_bfloat16", [] { return has_bfloat16(BFloat16Units::kAmx); });
  m.def("is_intel", &is_intel);
  m.def("shares_threads_with_torch", [] { return openmp_of_process() != nullptr; });
  m.def("request_huge_pages", &request_huge_pages, py::arg("address"), py::arg("bytes"));

  using released = py::call_guard<py::gil_scoped_release>;
  m.def("multiply", &multiply_matrices, released(), py::kw_only(), py::arg("dtype"), py::arg("rows"),
        py::arg("columns"), py::arg("depth"), py::arg("left"), py::arg("left_row_stride"),
        py::arg("left_depth_stride"), py::arg("right"), py::arg("right_depth_stride"), py::arg("right_column_stride"),
        py::arg("out"), py::arg("out_stride"), py::arg("bias"), py::arg("add"), py::arg("factor"), py::arg("threads"));
  m.def("add_to_sums", &add_to_sums, released(), py::kw_only(), py::arg("high"), py::arg("low"), py::arg("first"),
        py::arg("product"), py::arg("count"), py::arg("pass_number"), py::arg("threads"));
  m.def("round_sums", &round_sums, released(), py::kw_only(), py::arg("high"), py::arg("low"), py::arg("count"),
        py::arg("factor"), py::arg("threads"));
  py::class_<Matrix>(m, "Matrix", py::module_local())
      .def(py::init(&matrix), py::kw_only(), py::arg("dtype"), py::arg("data"), py::arg("rows"), py::arg("columns"),
           py::arg("row_stride"));
  py::class_<SparseEntries>(m, "SparseEntries", py::module_local())
      .def(py::init(&sparse_entries), py::kw_only(), py::arg("count"), py::arg("rows"), py::arg("ids"),
           py::arg("offsets"), py::arg("row_of"), py::arg("active"));
  m.def(
      "kept_logits",
      [](const Matrix& hidden, const Matrix& weight, const std::string& rounded_to, const SparseEntries& entries,
         uintptr_t out, bool add, int threads) {
        kept_logits(sparse_instructions(), hidden, weight, element_type(rounded_to), entries, pointer<float>(out), add,
                    threads);
      },
      released(), py::kw_only(), py::arg("hidden"), py::arg("weight"), py::arg("rounded_to"), py::arg("entries"),
      py::arg("out"), py::arg("add"), py::arg("threads"));
  m.def(
      "hidden_gradient",
      [](uintptr_t gradient, const Matrix& weight, const std::string& rounded_to, const SparseEntries& entries,
         const Matrix& out, int threads) {
        hidden_gradient(sparse_instructions(), pointer<const float>(gradient), weight, element_type(rounded_to),
                        entries, out, threads);
      },
      released(), py::kw_only(), py::arg("gradient"), py::arg("weight"), py::arg("rounded_to"), py::arg("entries"),
      py::arg("out"), py::arg("threads"));
  m.def(
      "weight_gradient",
      [](uintptr_t gradient, const Matrix& hidden, const std::string& rounded_to, const SparseEntries& entries,
         uintptr_t order, uintptr_t destination, const Matrix& out, int threads) {
        weight_gradient(sparse_instructions(), pointer<const float>(gradient), hidden, element_type(rounded_to),
                        entries, pointer<const int64_t>(order), pointer<const int64_t>(destination), out, threads);
      },
      released(), py::kw_only(), py::arg("gradient"), py::arg("hidden"), py::arg("rounded_to"), py::arg("entries"),
      py::arg("order"), py::arg("destination"), py::arg("out"), py::arg("threads"));
  py::class_<Rows>(m, "Rows")
      .def(py::init<const std::string&, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t,
                    double, uintptr_t, uintptr_t, double, const std::string&, uintptr_t, uintptr_t, int64_t, int>(),
           py::kw_only(), py::arg("dtype"), py::arg("logits"), py::arg("outer"), py::arg("inner"), py::arg("vocab"),
           py::arg("outer_stride"), py::arg("inner_stride"), py::arg("token_ids") = 0, py::arg("mask") = 0,
           py::arg("temperature") = 1.0, py::arg("row_temperature") = 0, py::arg("row_indices") = 0,
           py::arg("tanh_scale") = 0.0, py::arg("kept_form") = "all", py::arg("kept_ids") = 0,
           py::arg("kept_offsets") = 0, py::arg("kept_entries") = 0, py::arg("threads") = 1)
      .def("forward", &Rows::forward, released(), py::kw_only(), py::arg("logprobs"), py::arg("entropy"),
           py::arg("lse"))
      .def("backward", &Rows::backward, released(), py::kw_only(), py::arg("logprobs"), py::arg("entropy"),
           py::arg("lse"), py::arg("grad_logprobs"), py::arg("grad_entropy"), py::arg("grad_lse"), py::arg("gradient"),
           py::arg("outer_stride"), py::arg("inner_stride"), py::arg("gradient_is_bfloat16"))
      .def("forward_backward", &Rows::forward_backward, released(), py::kw_only(), py::arg("logprobs"),
           py::arg("entropy"), py::arg("lse"), py::arg("grad_logprobs"), py::arg("gradient"), py::arg("outer_stride"),
           py::arg("inner_stride"))
      .def("scale", &Rows::scale, released(), py::arg("factor"));
}
