// Launches of the row kernels. The only file that needs CUDA's runtime, which is linked into the module: it meets torch's
// own in the driver, by way of the device's primary context.
#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "rows.cuh"

namespace gspo::gpu {

namespace {

// A cluster gets more blocks, from kFewestBlocks to kMostBlocks, until a slice has at most kSlice bytes.
#if defined(GSPO_ON_HOST)  // so that small vocabularies have clusters; an odd number of warps stays odd
constexpr int threads(int of_block) { return of_block / kWarp % 2 == 0 ? 64 : 96; }
constexpr size_t kSlice = 256;
#else
constexpr int threads(int of_block) { return of_block; }
constexpr size_t kSlice = 40 << 10;  // five such blocks fit a multiprocessor
#endif
// Where a block has a whole row, and a multiprocessor one block: so few rows are in progress that the second read of a
// row finds it in the L2 cache.
constexpr int kThreadsAgain = threads(512);

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it once more
  throw std::runtime_error("gspo_kernels: " + what + ": " + cudaGetErrorString(error));
}

void make_current(int device) { check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")"); }

std::string words(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

using Kernel = void (*)(OneRead);

// The kernel whose slices stay in shared memory, compiled for one number of threads.
struct Variant {
  const char* name;
  unsigned threads;  // of a block
  struct Instance {
    Kernel kernel;
    size_t static_bytes;  // of shared memory
  };
  struct Instances {
    Instance uncapped, capped;
  } of_float32, of_bfloat16, of_float16;

  const Instances& instances(float) const { return of_float32; }
  const Instances& instances(BFloat16) const { return of_bfloat16; }
  const Instances& instances(Float16) const { return of_float16; }

  template <class T>
  const Instance& instance(bool capped) const {
    return capped ? instances(T{}).capped : instances(T{}).uncapped;
  }
};

template <class T, class Cap, int kThreads, int kBlocks>
constexpr Variant::Instance instance_of() {
  using Source = Resident<T, kThreads>;
  return {&one_read<T, Source, Cap, kBlocks>, sizeof(Shared<T, Source, Cap>)};
}

template <class T, int kThreads, int kBlocks>
constexpr Variant::Instances instances_of() {
  return {instance_of<T, NoCap, kThreads, kBlocks>(), instance_of<T, TanhCap, kThreads, kBlocks>()};
}

template <int kThreads, int kBlocks>
constexpr Variant variant(const char* name) {
  return {name, kThreads, instances_of<float, kThreads, kBlocks>(), instances_of<BFloat16, kThreads, kBlocks>(),
          instances_of<Float16, kThreads, kBlocks>()};
}

// The first one is the default; the other is compiled only to be measured, and `cuda_use_variant` chooses it. The whole
// loss on an H200, 2026-11-26, 8192 rows: on-policy in place, on-policy, GRPO
// The next row copied only after the gradient (four blocks of 256: 1.300, 1.277, 1.305 ms), five blocks of 192 (in
// place 1.346 ms) and clusters of 16 blocks (of 128: 1.353 ms, of 96: 1.343 ms) were slower.
constexpr Variant kVariants[] = {  // threads of a block, blocks on a multiprocessor
    variant<threads(160), 5>("default"),
#if defined(GSPO_VARIANTS)
    variant<threads(256), 4>("four blocks of 256"),
#endif
};

std::atomic<const Variant*> variant_in_use{&kVariants[0]};

template <class T>
Kernel kernel_of(const Layout& layout, const Variant& variant, bool capped) {
  using Source = Again<T, kThreadsAgain>;
  if (layout.resident) return variant.instance<T>(capped).kernel;
  return capped ? &one_read<T, Source, TanhCap, 1> : &one_read<T, Source, NoCap, 1>;
}

template <class T>
size_t buffer_bytes(int64_t vocab, unsigned ranks) {
  return static_cast<size_t>(vectors_of_buffer<T>(vocab, ranks)) * sizeof(Vector);
}

class Configuration {
 public:
  Configuration(const Layout& layout, cudaStream_t stream) {
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim = {layout.blocks, 1, 1};
    value.gridDim = dim3(layout.clusters * layout.blocks);
    value.blockDim = dim3(layout.threads);
    value.dynamicSmemBytes = layout.shared_bytes;
    value.stream = stream;
    value.attrs = &cluster_;
    value.numAttrs = layout.resident ? 1 : 0;
  }
  Configuration(const Configuration&) = delete;
  Configuration& operator=(const Configuration&) = delete;
  cudaLaunchConfig_t value{};

 private:
  cudaLaunchAttribute cluster_{};
};

template <class T>
Layout choose(int64_t vocab, bool capped, int device, const Variant& variant, const std::string& name) {
  const unsigned multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const Layout again{false, 1, multiprocessors, kThreadsAgain, 0};
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9 || !attribute(cudaDevAttrClusterLaunch, device))
    return again;
  const size_t most =
      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - variant.instance<T>(capped).static_bytes;
  unsigned blocks = kFewestBlocks;
  while (blocks < kMostBlocks && buffer_bytes<T>(vocab, blocks) > kSlice) blocks *= 2;
  const size_t bytes = buffer_bytes<T>(vocab, blocks);
  if (bytes > most) return again;
  Layout layout{true, blocks, 1, variant.threads, bytes};
  const Kernel kernel = kernel_of<T>(layout, variant, capped);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)), name);
  // So that several blocks fit a multiprocessor. The L1 cache gets what is left, and has little to do.
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
        name);
  int clusters = 0;
  const Configuration configuration(layout, nullptr);
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.value), name);
  if (clusters < 1) return again;  // such as a part of a GPU that is too small for a cluster
  layout.clusters = clusters;
  return layout;
}

template <class T>
Layout layout_of(int64_t vocab, int64_t rows, bool capped, int device, const Variant& variant,
                 const std::string& name) {
  static std::mutex mutex;
  static std::map<std::tuple<int64_t, bool, int, const Variant*>, Layout> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(vocab, capped, device, &variant);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, choose<T>(vocab, capped, device, variant, name)).first;
  Layout layout = found->second;
  if (rows < layout.clusters) layout.clusters = static_cast<unsigned>(rows);
  return layout;
}

template <class T>
void run(const OneRead& arguments, int device, cudaStream_t stream, const std::string& name) {
  const Variant& variant = *variant_in_use;
  const bool capped = arguments.in.tanh_scale != 0.0;
  const Layout layout = layout_of<T>(arguments.shape.vocab, arguments.shape.rows, capped, device, variant, name);
  const Configuration configuration(layout, stream);
  check(cudaLaunchKernelEx(&configuration.value, kernel_of<T>(layout, variant, capped), arguments), name);
}

template <class F>
auto for_dtype(const std::string& dtype, const F& f) {
  if (dtype == "float32") return f(float{});
  if (dtype == "bfloat16") return f(BFloat16{});
  if (dtype == "float16") return f(Float16{});
  throw std::invalid_argument("dtype: expected float32, bfloat16 or float16, got '" + dtype + "'");
}

}  // namespace

std::string release() {
  int built = 0;
  check(cudaRuntimeGetVersion(&built), "cudaRuntimeGetVersion");
  return words(built);
}

std::string unavailable_reason(int device) {
  int driver = 0, built = 0;
  check(cudaRuntimeGetVersion(&built), "cudaRuntimeGetVersion");
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < built / 1000)
    return "the driver is for CUDA " + words(driver) + " and the kernels were built with " + words(built) +
           "; reinstall with a CUDA toolkit that is no newer than the driver";
  cudaFuncAttributes attributes;  // to read them CUDA loads the kernel, or says why it cannot
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(
        &attributes, reinterpret_cast<const void*>(&one_read<BFloat16, Again<BFloat16, kThreadsAgain>, NoCap, 1>));
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();
  return std::string("CUDA cannot load them: ") + cudaGetErrorString(error);
}

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const Variant& each : kVariants) names.emplace_back(each.name);
  return names;
}

void use_variant(const std::string& name) {
  std::string names;
  for (const Variant& each : kVariants) {
    if (name == each.name) {
      variant_in_use = &each;
      return;
    }
    names += std::string(names.empty() ? "'" : ", '") + each.name + "'";
  }
  throw std::invalid_argument("name: expected a variant of this build, " + names + "; got '" + name + "'");
}

Layout layout(const std::string& dtype, int64_t vocab, int64_t rows, int device) {
  make_current(device);
  return for_dtype(dtype, [&](auto t) {
    return layout_of<decltype(t)>(vocab, rows, false, device, *variant_in_use, "one_read, " + dtype);
  });
}

void one_read(const std::string& dtype, const OneRead& arguments, int device, uintptr_t stream) {
  if (arguments.shape.rows == 0) return;
  make_current(device);
  for_dtype(dtype, [&](auto t) {
    run<decltype(t)>(arguments, device, reinterpret_cast<cudaStream_t>(stream), "one_read, " + dtype);
  });
}

}  // namespace gspo::gpu
