// The part of CUDA's runtime that csrc/cuda/rows.cu calls, on a machine that tests make up: so many GPUs of a kind, a
// driver, calls that fail. A launch runs its kernel at once, as fibers (on_host.h), and can be looked at afterwards.
#pragma once

#include <map>
#include <tuple>

#include "on_host.h"

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9,
                      cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorInvalidDevice = 101,
                      cudaErrorNoKernelImageForDevice = 209, cudaErrorNotSupported = 801,
                      cudaErrorInvalidClusterSize = 912;

using cudaStream_t = struct CUstream_st*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrClusterLaunch = 120,
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

struct cudaFuncAttributes {
  int binaryVersion, maxDynamicSharedSizeBytes;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace on_host {

struct Launch {
  int count = 0;  // of launches so far
  int device = 0;
  uintptr_t stream = 0;
  unsigned blocks = 0, cluster = 0, threads = 0;  // cluster: blocks of one; 0: launched without
  size_t shared_bytes = 0, static_bytes = 0;
  int carveout = -1;  // percent of a multiprocessor's memory that the kernel prefers to be shared; -1: the driver's choice
};

// An H100 with few multiprocessors, as long as nobody says otherwise; all GPUs are alike.
struct Machine {
  int devices = 1;
  int driver = 13000, runtime = 13000;  // 1000 major + 10 minor
  int major = 9, minor = 0;
  int multiprocessors = 3;
  int shared_bytes = 227 << 10;  // that a block can have
  int cluster_launch = 1;
  int active_clusters = 3;  // on a GPU at a time
  int has_code = 1;         // kernels are there for this kind
  std::map<std::string, cudaError_t> fails;  // the next call of a function
  std::map<std::pair<int, const void*>, size_t> most_dynamic;  // of a kernel on a device; else 48 KiB
  std::map<std::pair<int, const void*>, int> carveout;
  Launch latest;
};

inline Machine machine;
inline thread_local int device = 0;
inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t remembered(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// What every call begins with.
inline cudaError_t begin(const std::string& function) {
  const auto found = machine.fails.find(function);
  if (found != machine.fails.end()) {
    const cudaError_t error = found->second;
    machine.fails.erase(found);
    return remembered(error);
  }
  if (machine.driver / 1000 < machine.runtime / 1000) return remembered(cudaErrorInsufficientDriver);
  return remembered(machine.devices == 0 ? cudaErrorNoDevice : cudaSuccess);
}

inline cudaError_t begin_with_kernel(const std::string& function) {
  const cudaError_t error = begin(function);
  return error != cudaSuccess ? error : remembered(machine.has_code ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}

inline size_t most_dynamic(const void* kernel) {
  const auto found = machine.most_dynamic.find({device, kernel});
  return found == machine.most_dynamic.end() ? 48 << 10 : found->second;
}

// Blocks of a cluster, 0 for a launch without.
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs > 0 ? config.attrs[0].val.clusterDim.x : 0;
}

inline cudaError_t wrong_with(const cudaLaunchConfig_t& config, const void* kernel) {
  const unsigned cluster = cluster_of(config);
  if (config.gridDim.x == 0 || config.blockDim.x == 0 || config.blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (config.numAttrs > 0 && !machine.cluster_launch) return cudaErrorNotSupported;
  if (cluster > 8) return cudaErrorInvalidClusterSize;
  if (cluster > 0 && config.gridDim.x % cluster) return cudaErrorInvalidConfiguration;
  return config.dynamicSmemBytes > most_dynamic(kernel) ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace on_host

inline cudaError_t cudaGetLastError() { return std::exchange(on_host::last_error, cudaSuccess); }

inline const char* cudaGetErrorString(cudaError_t error) {
  static const std::map<cudaError_t, const char*> words = {
      {cudaSuccess, "no error"},
      {cudaErrorInvalidValue, "invalid argument"},
      {2, "out of memory"},
      {3, "initialization error"},
      {cudaErrorInvalidConfiguration, "invalid configuration argument"},
      {cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"},
      {98, "invalid device function"},
      {cudaErrorNoDevice, "no CUDA-capable device is detected"},
      {cudaErrorInvalidDevice, "invalid device ordinal"},
      {cudaErrorNoKernelImageForDevice, "no kernel image is available for execution on the device"},
      {222, "the provided PTX was compiled with an unsupported toolchain."},
      {700, "an illegal memory access was encountered"},
      {701, "too many resources requested for launch"},
      {719, "unspecified launch failure"},
      {cudaErrorNotSupported, "operation not supported"},
      {cudaErrorInvalidClusterSize, "cluster misconfiguration"},
  };
  const auto found = words.find(error);
  return found == words.end() ? "unrecognized error code" : found->second;
}

inline cudaError_t cudaDriverGetVersion(int* version) {  // 0 where there is no driver
  *version = on_host::machine.driver;
  const auto error = on_host::begin("cudaDriverGetVersion");
  return error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ? cudaSuccess : error;
}

inline cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = on_host::machine.runtime;
  const auto error = on_host::begin("cudaRuntimeGetVersion");
  return error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice ? cudaSuccess : error;
}

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = on_host::machine.devices;
  return on_host::begin("cudaGetDeviceCount");
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = on_host::device;
  return on_host::begin("cudaGetDevice");
}

inline cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = on_host::begin("cudaSetDevice")) return error;
  if (device < 0 || device >= on_host::machine.devices) return on_host::remembered(cudaErrorInvalidDevice);
  on_host::device = device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
  const on_host::Machine& machine = on_host::machine;
  if (const cudaError_t error = on_host::begin("cudaDeviceGetAttribute")) return error;
  if (device < 0 || device >= machine.devices) return on_host::remembered(cudaErrorInvalidDevice);
  *value = name == cudaDevAttrMultiProcessorCount            ? machine.multiprocessors
           : name == cudaDevAttrComputeCapabilityMajor       ? machine.major
           : name == cudaDevAttrComputeCapabilityMinor       ? machine.minor
           : name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? machine.shared_bytes
                                                             : machine.cluster_launch;
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  if (const cudaError_t error = on_host::begin_with_kernel("cudaFuncGetAttributes")) return error;
  *attributes = {10 * on_host::machine.major + on_host::machine.minor, static_cast<int>(on_host::most_dynamic(kernel))};
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute name, int value) {
  if (const cudaError_t error = on_host::begin_with_kernel("cudaFuncSetAttribute")) return error;
  const bool carveout = name == cudaFuncAttributePreferredSharedMemoryCarveout;
  if (value < 0 || value > (carveout ? 100 : on_host::machine.shared_bytes))
    return on_host::remembered(cudaErrorInvalidValue);
  const std::pair<int, const void*> key{on_host::device, reinterpret_cast<const void*>(kernel)};
  if (carveout)
    on_host::machine.carveout[key] = value;
  else
    on_host::machine.most_dynamic[key] = value;
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  if (const cudaError_t error = on_host::begin_with_kernel("cudaOccupancyMaxActiveClusters")) return error;
  *clusters = on_host::machine.active_clusters;
  return on_host::remembered(on_host::wrong_with(*config, reinterpret_cast<const void*>(kernel)));
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = on_host::begin_with_kernel("cudaLaunchKernelEx")) return error;
  if (const cudaError_t error = on_host::wrong_with(*config, reinterpret_cast<const void*>(kernel)))
    return on_host::remembered(error);
  const unsigned blocks = config->gridDim.x, cluster = on_host::cluster_of(*config), ranks = cluster ? cluster : 1;
  const size_t static_bytes = on_host::launch(blocks / ranks, ranks, config->blockDim.x, config->dynamicSmemBytes,
                                              [&] { kernel(arguments...); });
  on_host::Launch& latest = on_host::machine.latest;
  latest = {latest.count + 1, on_host::device, reinterpret_cast<uintptr_t>(config->stream), blocks, cluster,
            config->blockDim.x, config->dynamicSmemBytes, static_bytes, -1};
  const auto preferred = on_host::machine.carveout.find({on_host::device, reinterpret_cast<const void*>(kernel)});
  if (preferred != on_host::machine.carveout.end()) latest.carveout = preferred->second;
  const bool fits = config->dynamicSmemBytes + static_bytes <= static_cast<size_t>(on_host::machine.shared_bytes);
  return on_host::remembered(fits ? cudaSuccess : cudaErrorInvalidValue);
}
