// Runs tasks on torch's own threads. torch ships its OpenMP runtime; linking a second one gives the process two pools
// whose idle threads spin against each other (two threads then run slower than one). So none is linked: the entry that
// compilers emit for a parallel region is looked up in the process, where importing torch has put it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#endif

namespace gspo {

using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

inline OpenMPParallel openmp_of_process() {
#if defined(_WIN32)
  return nullptr;
#else
  static const auto entry = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return entry;
#endif
}

// Calls run(begin, end) over [0, count) in pieces of `grain`, handed out as threads become free. After an exception no
// more pieces are begun, and the caller gets it: on another thread, or in OpenMP's region, it would end the process.
template <class F>
void parallel_for(int64_t count, int64_t grain, int threads, const F& run) {
  struct Work {
    const F& run;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr failure{};

    static void drain(void* self) {
      Work& work = *static_cast<Work*>(self);
      while (!work.failed.load(std::memory_order_relaxed)) {
        const int64_t begin = work.next.fetch_add(work.grain, std::memory_order_relaxed);
        if (begin >= work.count) return;
        try {
          work.run(begin, begin + work.grain < work.count ? begin + work.grain : work.count);
        } catch (...) {
          if (!work.failed.exchange(true)) work.failure = std::current_exception();
        }
      }
    }
  } work{run, count, grain};

  const int64_t pieces = (count + grain - 1) / grain;
  if (threads > pieces) threads = static_cast<int>(pieces);
  if (threads <= 1) {
    Work::drain(&work);
  } else if (const OpenMPParallel openmp = openmp_of_process()) {
    openmp(Work::drain, &work, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int i = 1; i < threads; ++i) helpers.emplace_back(Work::drain, &work);
    Work::drain(&work);
    for (std::thread& helper : helpers) helper.join();
  }
  if (work.failure) std::rethrow_exception(work.failure);
}

// Memory that a thread keeps for its next task.
inline void* thread_buffer(size_t bytes) {
  static thread_local std::vector<char> buffer;
  if (buffer.size() < bytes) buffer.resize(bytes);
  return buffer.data();
}

}  // namespace gspo
