// The only extension module. It takes addresses, sizes and a thread count, and nothing of torch's ABI: one build works
// with any torch. The Python side owns shapes and lifetimes, and checks token ids before it comes here (rows/operators.py).
#include "row_arguments.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>

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

namespace {

using namespace gspo;
using gspo::python::Arguments;
using gspo::python::Released;

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

bool has_bfloat16([[maybe_unused]] BFloat16Units units) {
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
void multiply(Arguments& in) {
  const ProductKernels& kernels = product_kernels(in["dtype"].text());
  const auto rows = in["rows"].integer(), columns = in["columns"].integer(), depth = in["depth"].integer();
  if (rows < 1 || columns < 1 || depth < 1) throw std::invalid_argument("multiply: sizes out of range");
  const auto* left = in["left"].address<const void>();
  const auto left_row_stride = in["left_row_stride"].integer(), left_depth_stride = in["left_depth_stride"].integer();
  const auto* right = in["right"].address<const void>();
  const auto right_depth_stride = in["right_depth_stride"].integer();
  const auto right_column_stride = in["right_column_stride"].integer();
  const Product product{{left, rows, left_row_stride, left_depth_stride},
                        {right, columns, right_column_stride, right_depth_stride},
                        depth,
                        in["out"].address<float>(),
                        in["out_stride"].integer(),
                        in["bias"].address<const float>(),
                        in["add"].boolean(),
                        static_cast<float>(in["factor"].real())};
  const int threads = in["threads"].integer<int>();
  const Released released(in);
  gspo::multiply(kernels, product, threads);
}

const RowKernels& kernels(const std::string& dtype) {
  const InstructionSet& isa = instruction_set();
  if (dtype == "float32") return isa.float32;
  if (dtype == "bfloat16") return isa.bfloat16;
  if (dtype == "float16") return isa.float16;
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
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
  const RowKernels& kernels;
  RowShape shape;
  RowInputs inputs{};
  KeptColumns kept{KeptForm::kAll, nullptr, nullptr, 0, nullptr};
  int threads = 1;
  int64_t columns;  // that all rows keep
  size_t buffer_bytes = 0;

  // Of numbers alone, such as a gradient.
  explicit Rows(Arguments& in)
      : kernels(::kernels(in["dtype"].text())), shape(shape_of(in)), columns(shape.rows * shape.vocab) {
    inputs.logits = view_of(in, "logits");
  }

  void read_inputs(Arguments& in) {
    inputs = inputs_of(in, inputs.logits);
    inputs.row_indices = in["row_indices"].address<const int64_t>();
    if (in.has("kept_form")) {
      kept.form = form_of(in["kept_form"].text());
      kept.ids = in["kept_ids"].address<const int32_t>();
      kept.offsets = in["kept_offsets"].address<const int64_t>();
      kept.entries = in["kept_entries"].integer();
    }
    threads = in["threads"].integer<int>();
    if (shape.vocab < (gathered() ? 0 : 1) || kept.entries < 0) throw std::invalid_argument("rows: sizes out of range");
    count_columns();
  }

  void count_columns() {
    if (kept.form == KeptForm::kAll) return;
    int64_t most = 0;
    columns = 0;
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
};

Rows rows_with_inputs(Arguments& in) {
  Rows rows(in);
  rows.read_inputs(in);
  return rows;
}

void forward(Arguments& in) {
  const Rows rows = rows_with_inputs(in);
  const RowOutputs out = outputs_of(in);
  const Released released(in);
  rows.for_each(rows.columns, [&](const KeptColumns& own, int64_t begin, int64_t end) {
    rows.kernels.forward(rows.shape, rows.inputs, own, out, begin, end);
  });
}

void backward(Arguments& in) {
  const Rows rows = rows_with_inputs(in);
  const RowOutputs saved = outputs_of(in);
  UpstreamArrays upstream;
  upstream.logprobs = in["grad_logprobs"].address<const float>();
  upstream.entropy = in["grad_entropy"].address<const float>();
  upstream.lse = in["grad_lse"].address<const double>();
  const LogitsView gradient = view_of(in, "gradient");
  const bool bfloat16 = in["gradient_is_bfloat16"].boolean();
  const auto run = bfloat16 ? rows.kernels.backward_bfloat16 : rows.kernels.backward;
  const Released released(in);
  rows.for_each(rows.columns_of_gradient(), [&](const KeptColumns& own, int64_t begin, int64_t end) {
    run(rows.shape, rows.inputs, own, saved, upstream, gradient, begin, end);
  });
}

void forward_backward(Arguments& in) {
  const Rows rows = rows_with_inputs(in);
  const RowOutputs out = outputs_of(in);
  const UpstreamArrays upstream{in["grad_logprobs"].address<const float>(), nullptr, nullptr};
  const LogitsView gradient = view_of(in, "gradient");
  const Released released(in);
  rows.for_each(rows.columns_of_gradient(), [&](const KeptColumns& own, int64_t begin, int64_t end) {
    rows.kernels.forward_backward(rows.shape, rows.inputs, own, out, upstream, gradient, begin, end);
  });
}

// Multiplies numbers (such as a saved gradient) in place; a factor of exactly 1 writes nothing.
void scale(Arguments& in) {
  Rows rows(in);
  const double factor = in["factor"].real();
  rows.threads = in["threads"].integer<int>();
  const Released released(in);
  if (factor == 1.0) return;
  rows.for_each(rows.columns, [&](const KeptColumns&, int64_t begin, int64_t end) {
    rows.kernels.scale(rows.shape, rows.inputs.logits, static_cast<float>(factor), begin, end);
  });
}

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

Matrix matrix_of(Arguments& in, const char* name) {
  const auto [dtype, data, rows, columns, row_stride] =
      in[name].items("dtype", "address", "rows", "columns", "row stride");
  const Matrix matrix{element_type(dtype.text()), data.address<char>(), rows.integer(), columns.integer(),
                      row_stride.integer()};
  if (matrix.rows < 0 || matrix.columns < 0)
    throw std::invalid_argument(std::string(name) + ": sizes out of range");
  return matrix;
}

SparseEntries entries_of(Arguments& in) {
  SparseEntries entries;
  entries.count = in["count"].integer();
  entries.rows = in["rows"].integer();
  entries.ids = in["ids"].address<const int32_t>();
  entries.offsets = in["offsets"].address<const int64_t>();
  entries.row_of = in["row_of"].address<const int64_t>();
  entries.active = in["active"].address<const bool>();
  if (entries.count < 0 || entries.rows < 0) throw std::invalid_argument("entries: sizes out of range");
  return entries;
}

void kept_logits(Arguments& in) {
  const Matrix hidden = matrix_of(in, "hidden"), weight = matrix_of(in, "weight");
  const ElementType rounded_to = element_type(in["rounded_to"].text());
  const SparseEntries entries = entries_of(in);
  float* const out = in["out"].address<float>();
  const bool add = in["add"].boolean();
  const int threads = in["threads"].integer<int>();
  const SparseInstructions& instructions = sparse_instructions();
  const Released released(in);
  gspo::kept_logits(instructions, hidden, weight, rounded_to, entries, out, add, threads);
}

void hidden_gradient(Arguments& in) {
  const auto* gradient = in["gradient"].address<const float>();
  const Matrix weight = matrix_of(in, "weight");
  const ElementType rounded_to = element_type(in["rounded_to"].text());
  const SparseEntries entries = entries_of(in);
  const Matrix out = matrix_of(in, "out");
  const int threads = in["threads"].integer<int>();
  const SparseInstructions& instructions = sparse_instructions();
  const Released released(in);
  gspo::hidden_gradient(instructions, gradient, weight, rounded_to, entries, out, threads);
}

void weight_gradient(Arguments& in) {
  const auto* gradient = in["gradient"].address<const float>();
  const Matrix hidden = matrix_of(in, "hidden");
  const ElementType rounded_to = element_type(in["rounded_to"].text());
  const SparseEntries entries = entries_of(in);
  const auto* order = in["order"].address<const int64_t>();
  const auto* destination = in["destination"].address<const int64_t>();
  const Matrix out = matrix_of(in, "out");
  const int threads = in["threads"].integer<int>();
  const SparseInstructions& instructions = sparse_instructions();
  const Released released(in);
  gspo::weight_gradient(instructions, gradient, hidden, rounded_to, entries, order, destination, out, threads);
}

// ---- sums in 24 bits

template <class F>
void for_each_sum(int64_t count, int threads, const F& run) {
  constexpr int64_t kSumsPerTask = 1 << 14;
  parallel_for(count, kSumsPerTask, threads, run);
}

Sums24 sums_of(Arguments& in) {
  uint16_t* const high = in["high"].address<uint16_t>();
  return {high, in["low"].address<uint8_t>()};
}

// Adds `count` numbers of a product to sums from number `first` on.
void add_to_sums(Arguments& in) {
  const Sums24 sums = sums_of(in);
  const auto first = in["first"].integer();
  const auto* product = in["product"].address<const float>();
  const auto count = in["count"].integer();
  const auto pass = in["pass_number"].integer<uint32_t>();
  const int threads = in["threads"].integer<int>();
  const SumKernels& kernels = instruction_set().sums;
  const Released released(in);
  for_each_sum(count, threads,
               [&](int64_t begin, int64_t end) { kernels.add(sums, first, product, pass, begin, end); });
}

void round_sums(Arguments& in) {
  const Sums24 sums = sums_of(in);
  const auto count = in["count"].integer();
  const auto factor = static_cast<float>(in["factor"].real());
  const int threads = in["threads"].integer<int>();
  const SumKernels& kernels = instruction_set().sums;
  const Released released(in);
  for_each_sum(count, threads, [&](int64_t begin, int64_t end) { kernels.round(sums, factor, begin, end); });
}

// Page faults on a newly allocated gradient cost more than the arithmetic: request 2 MiB pages before the first write.
void request_huge_pages(Arguments& in) {
  char* const begin = in["address"].address<char>();
  const auto bytes = in["bytes"].integer();
  in.end();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kHuge - 1) / kHuge * kHuge, last = (address + bytes) / kHuge * kHuge;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

// ---- the module

std::string name_of_instruction_set() { return instruction_set().name; }
std::string name_of_product_instructions() { return product_instructions().name; }
bool multiplies_bfloat16() { return product_instructions().multiplies_bfloat16; }
bool has_amx_bfloat16() { return has_bfloat16(BFloat16Units::kAmx); }
bool shares_threads_with_torch() { return openmp_of_process() != nullptr; }

using python::method;

PyMethodDef kMethods[] = {
    method<&name_of_instruction_set>("instruction_set"),
    method<&name_of_product_instructions>("product_instructions"),
    method<&multiplies_bfloat16>("multiplies_bfloat16"),
    method<&has_amx_bfloat16>("has_amx_bfloat16"),
    method<&is_intel>("is_intel"),
    method<&shares_threads_with_torch>("shares_threads_with_torch"),
    method<&request_huge_pages>("request_huge_pages"),
    method<&forward>("forward"),
    method<&backward>("backward"),
    method<&forward_backward>("forward_backward"),
    method<&scale>("scale"),
    method<&multiply>("multiply"),
    method<&kept_logits>("kept_logits"),
    method<&hidden_gradient>("hidden_gradient"),
    method<&weight_gradient>("weight_gradient"),
    method<&add_to_sums>("add_to_sums"),
    method<&round_sums>("round_sums"),
    {},
};

int fill(PyObject* module) {
#if defined(GSPO_CUDA)
  if (PyModule_AddFunctions(module, gpu::kMethods)) return -1;
#endif
  return PyModule_AddFunctions(module, kMethods);
}

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  static python::Module module("_native", "Kernels of gspo_kernels (see csrc/).", &fill);
  return module.start();
}
