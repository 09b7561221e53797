// A GPU's threads as threads of this process, for kernels that are to be looked at where there is no GPU: blocks and
// clusters of them, barriers, shuffles, shared memory of one's own and of other blocks of the cluster, atomics.
//
// Every barrier is one of the system's, which thread sanitizers know: what would be a race on a GPU is one here. Shared
// memory is allocated by the byte, which address sanitizers know, and holds rubbish at first.
#pragma once

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline)) inline
#define __launch_bounds__(...)

struct Dimension {
  unsigned x = 0;
};

inline thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

class Barrier {
 public:
  explicit Barrier(unsigned threads) {
    if (pthread_barrier_init(&barrier_, nullptr, threads)) throw std::runtime_error("pthread_barrier_init");
  }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

constexpr unsigned kLanes = 32;

struct Warp {
  Barrier barrier{kLanes};
  uint64_t slots[kLanes];
};

class Memory {  // aligned as a GPU's, and not a byte longer than asked for
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), data_(std::aligned_alloc(128, (bytes + 127) / 128 * 128)) {
    std::memset(data_, 0xa5, bytes_);
    poison(true);
  }
  ~Memory() {
    poison(false);
    std::free(data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  void poison(bool on);
  size_t bytes_;
  void* data_;
};

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
inline void Memory::poison(bool on) {
  const size_t end = (bytes_ + 127) / 128 * 128;
  auto* behind = static_cast<char*>(data_) + bytes_;
  (on ? __asan_poison_memory_region : __asan_unpoison_memory_region)(behind, end - bytes_);
}
#else
inline void Memory::poison(bool) {}
#endif

struct Block {
  Barrier barrier;
  Memory fixed, dynamic;
  std::vector<std::unique_ptr<Warp>> warps;

  Block(unsigned threads, size_t fixed_bytes, size_t dynamic_bytes)
      : barrier(threads), fixed(fixed_bytes), dynamic(dynamic_bytes) {
    for (unsigned w = 0; w < threads / kLanes; ++w) warps.push_back(std::make_unique<Warp>());
  }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;

  Cluster(unsigned ranks, unsigned threads, size_t fixed_bytes, size_t dynamic_bytes) : barrier(ranks * threads) {
    for (unsigned r = 0; r < ranks; ++r) blocks.push_back(std::make_unique<Block>(threads, fixed_bytes, dynamic_bytes));
  }
};

inline thread_local Cluster* cluster;
inline thread_local unsigned rank;

inline Block& block() { return *cluster->blocks[rank]; }
inline void* dynamic_shared() { return block().dynamic.get(); }
inline void* static_shared(size_t) { return block().fixed.get(); }
inline unsigned rank_in_cluster() { return rank; }
inline unsigned blocks_in_cluster() { return static_cast<unsigned>(cluster->blocks.size()); }
inline void sync_cluster() { cluster->barrier.wait(); }

template <class T>
T* in_block(T* address, unsigned other) {
  const char* here = static_cast<const char*>(block().fixed.get());
  char* there = static_cast<char*>(cluster->blocks[other]->fixed.get());
  return reinterpret_cast<T*>(there + (reinterpret_cast<const char*>(address) - here));
}

template <class T>
T of_lane_xor(T x, unsigned lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = *block().warps[threadIdx.x / kLanes];
  const unsigned lane = threadIdx.x % kLanes;
  std::memcpy(&warp.slots[lane], &x, sizeof(T));
  warp.barrier.wait();
  T found;
  std::memcpy(&found, &warp.slots[lane ^ lanes], sizeof(T));
  warp.barrier.wait();
  return found;
}

// Runs `kernel` on every thread of every cluster, all at once.
inline void launch(unsigned clusters, unsigned ranks, unsigned threads, size_t fixed_bytes, size_t dynamic_bytes,
                   const std::function<void()>& kernel) {
  if (threads == 0 || threads % kLanes) throw std::invalid_argument("threads: expected whole warps");
  std::vector<std::unique_ptr<Cluster>> all;
  std::vector<std::thread> running;
  for (unsigned c = 0; c < clusters; ++c) {
    all.push_back(std::make_unique<Cluster>(ranks, threads, fixed_bytes, dynamic_bytes));
    for (unsigned r = 0; r < ranks; ++r)
      for (unsigned t = 0; t < threads; ++t)
        running.emplace_back([=, &kernel, here = all.back().get()] {
          threadIdx.x = t;
          blockIdx.x = c * ranks + r;
          blockDim.x = threads;
          gridDim.x = clusters * ranks;
          cluster = here;
          rank = r;
          kernel();
        });
  }
  for (std::thread& thread : running) thread.join();
}

}  // namespace on_host

inline void __syncthreads() { on_host::block().barrier.wait(); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
