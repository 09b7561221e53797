// Launches of the row kernels. The only file that needs CUDA's runtime, which is linked into the module: it meets torch's
// own in the driver, by way of the device's primary context.
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <tuple>

#include "rows.cuh"

namespace gspo::gpu {

namespace {

#if defined(GSPO_ON_HOST)  // so that small vocabularies have clusters
constexpr int kThreads = 64, kThreadsAgain = 64;
constexpr size_t kSlice = 256;
#else
constexpr int kThreads = 256;        // of a block with a slice of a row: three to a multiprocessor, so that one's loads,
constexpr size_t kSlice = 40 << 10;  // another's sums and a third one's stores overlap
constexpr int kThreadsAgain = 512;  // of a block with a row of its own, alone on its multiprocessor: there the L2 cache
                                    // still has the row when it is read again
#endif

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

template <class T>
size_t room_bytes(int64_t vocab, unsigned ranks) {  // for a slice that begins anywhere
  constexpr int kWidth = Columns<T>::kWidth;
  const int64_t each = ((vocab + ranks - 1) / ranks + kWidth - 1) / kWidth;  // vectors, and one more where it begins late
  return static_cast<size_t>(each + 1) * sizeof(Vector);
}

using Kernel = void (*)(OneRead);

template <class T>
Kernel kernel_of(const Layout& layout) {
  return layout.resident ? &one_read<T, Resident, kThreads> : &one_read<T, Again, kThreadsAgain>;
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
Layout choose(int64_t vocab, int device, const std::string& name) {
  const unsigned multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  const Layout again{false, 1, multiprocessors, kThreadsAgain, 0};
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 9 || !attribute(cudaDevAttrClusterLaunch, device))
    return again;
  const size_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - sizeof(Shared<T, kThreads>);
  unsigned blocks = 1;
  while (blocks < kMostBlocks && room_bytes<T>(vocab, blocks) > kSlice) blocks *= 2;
  const size_t bytes = room_bytes<T>(vocab, blocks);
  if (bytes > most) return again;
  Layout layout{true, blocks, 1, kThreads, bytes};
  const Kernel kernel = kernel_of<T>(layout);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most)), name);
  int clusters = 0;
  const Configuration configuration(layout, nullptr);
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &configuration.value), name);
  if (clusters < 1) return again;  // a part of a GPU, say, that has no room for a cluster
  layout.clusters = clusters;
  return layout;
}

template <class T>
Layout layout_of(int64_t vocab, int64_t rows, int device, const std::string& name) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, int>, Layout> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(vocab, device);
  auto found = known.find(key);
  if (found == known.end()) found = known.emplace(key, choose<T>(vocab, device, name)).first;
  Layout layout = found->second;
  if (rows < layout.clusters) layout.clusters = static_cast<unsigned>(rows);
  return layout;
}

template <class T>
void run(const OneRead& arguments, int device, cudaStream_t stream, const std::string& name) {
  const Layout layout = layout_of<T>(arguments.shape.vocab, arguments.shape.rows, device, name);
  const Configuration configuration(layout, stream);
  check(cudaLaunchKernelEx(&configuration.value, kernel_of<T>(layout), arguments), name);
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

std::string missing(int device) {
  int driver = 0, built = 0;
  check(cudaRuntimeGetVersion(&built), "cudaRuntimeGetVersion");
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver";
  if (driver / 1000 < built / 1000)
    return "the driver is for CUDA " + words(driver) + " and the kernels were built with " + words(built) +
           "; reinstall with a CUDA toolkit that is no newer than the driver";
  cudaFuncAttributes attributes;  // whose question loads the kernel, or says why it cannot be
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&one_read<BFloat16, Again, kThreadsAgain>));
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();
  return std::string("CUDA cannot load them: ") + cudaGetErrorString(error);
}

Layout layout(const std::string& dtype, int64_t vocab, int64_t rows, int device) {
  make_current(device);
  return for_dtype(dtype, [&](auto t) { return layout_of<decltype(t)>(vocab, rows, device, "one_read, " + dtype); });
}

void one_read(const std::string& dtype, const OneRead& arguments, int device, uintptr_t stream) {
  if (arguments.shape.rows == 0) return;
  make_current(device);
  for_dtype(dtype, [&](auto t) {
    run<decltype(t)>(arguments, device, reinterpret_cast<cudaStream_t>(stream), "one_read, " + dtype);
  });
}

}  // namespace gspo::gpu
