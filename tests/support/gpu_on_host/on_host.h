// A GPU's threads as fibers of one thread of this process, for kernels that are to be looked at where there is no GPU:
// blocks and clusters of them, barriers, shuffles, shared memory of one's own and of the cluster's blocks, atomics.
//
// A fiber runs until it has to wait, so that a kernel does the same every time. A thread sanitizer is told of fibers as
// of threads, and of what a barrier orders: what would be a race on a GPU is one here. Shared memory is allocated by
// the byte, which address sanitizers know, holds rubbish at first, and is there only while its block is.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))  // what a call returns into memory, no sanitizer sees
#define __grid_constant__
#define __launch_bounds__(...)

struct Dimension {
  unsigned x = 0;
};

inline Dimension threadIdx, blockIdx, blockDim, gridDim;  // of the fiber that runs

inline int min(int x, int y) { return y < x ? y : x; }

namespace on_host {

// ---- what sanitizers are told

// What this file does for the threads of a GPU is nothing that they do.
class Unseen {
 public:
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
};

// A moment: whoever `follow`s it sees what was done by whoever `precede`d it.
struct Moment {
  uint64_t address_of_its_own = 0;
#if defined(__SANITIZE_THREAD__)
  void precede() { __tsan_release(this); }
  void follow() { __tsan_acquire(this); }
#else
  void precede() {}
  void follow() {}
#endif
};

// ---- fibers

struct Block;
struct Cluster;

constexpr size_t kStack = 128 << 10;

struct Fiber {
  ucontext_t context{};  // to begin from; between its first and last step it goes on from `point`
  void* point[5] = {};
  bool begun = false;
  unsigned thread = 0;
  Block* block = nullptr;
  Fiber* behind = nullptr;  // in a queue
  const void* stack = nullptr;
  size_t stack_bytes = kStack;
  std::vector<std::pair<void*, const void*>> copies;  // begun, 16 bytes each, and not waited for
#if defined(__SANITIZE_THREAD__)
  void* in_sanitizer = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

class Queue {
 public:
  void push(Fiber* fiber) {
    fiber->behind = nullptr;
    (last_ ? last_->behind : first_) = fiber;
    last_ = fiber;
  }
  Fiber* pop() {
    Fiber* const fiber = first_;
    if (fiber) first_ = fiber->behind;
    if (!first_) last_ = nullptr;
    return fiber;
  }

 private:
  Fiber *first_ = nullptr, *last_ = nullptr;
};

inline Fiber host;  // whoever launches
inline Fiber *running = &host, *left = nullptr;
inline Queue ready, not_begun;
inline unsigned unfinished = 0;
inline std::string error;
inline const std::function<void()>* kernel_of_launch = nullptr;
inline Moment begin_of_launch, end_of_launch;

inline void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(running->fake_stack, &left->stack, &left->stack_bytes);
#endif
}

inline void set_indices();  // for the fiber that runs

[[noreturn, gnu::noinline, gnu::no_sanitize_thread]] inline void jump(Fiber* to) { __builtin_longjmp(to->point, 1); }

// swapcontext would ask the system for the signal mask each time, half of a program's time.
[[gnu::noinline, gnu::no_sanitize_thread]] inline void swap(Fiber* from, Fiber* to) {
  if (__builtin_setjmp(from->point)) return;
  if (std::exchange(to->begun, true)) jump(to);
  setcontext(&to->context);
}

inline void switch_to(Fiber* next) {
  left = running;
  running = next;
  set_indices();
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(next->in_sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&left->fake_stack, next->stack, next->stack_bytes);
#endif
  swap(left, next);
  arrived();
}

// To a fiber that has nothing to wait for, first to one that has begun, so that blocks are far ahead of others. To the
// host if there is none, or something has gone wrong.
inline void go_on() {
  Fiber* next = error.empty() ? ready.pop() : nullptr;
  if (!next && error.empty()) next = not_begun.pop();
  switch_to(next ? next : &host);
}

class Barrier {
 public:
  // Shuffles wait for each other, too, but order nothing in memory.
  Barrier(std::string name, unsigned threads, bool orders)
      : name_(std::move(name)), threads_(threads), orders_(orders) {}

  void wait() {
    const Unseen unseen;
    Moment& moment = moments_[turn_];
    if (orders_) moment.precede();
    if (++came_ < threads_) {
      waiting_.push(running);
      go_on();
    } else {
      came_ = 0;
      turn_ ^= 1;
      while (Fiber* fiber = waiting_.pop()) ready.push(fiber);
    }
    if (orders_) moment.follow();
  }

  unsigned turn() const { return turn_; }
  std::string stuck() const {
    if (came_ == 0) return "";
    return "\n  " + name_ + ": " + std::to_string(came_) + " of " + std::to_string(threads_) + " threads came";
  }

 private:
  std::string name_;
  unsigned threads_, came_ = 0, turn_ = 0;  // by turns, for who is slow to leave
  bool orders_;
  Queue waiting_;
  Moment moments_[2];
};

// ---- memory, blocks and clusters

class Memory {  // aligned as a GPU's, and not a byte longer than asked for
 public:
  explicit Memory(size_t bytes) : bytes_(bytes), all_((bytes + 127) / 128 * 128), data_(std::aligned_alloc(128, all_)) {
    std::memset(data_, 0xa5, bytes_);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(static_cast<char*>(data_) + bytes_, all_ - bytes_);
#endif
  }
  ~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(static_cast<char*>(data_) + bytes_, all_ - bytes_);
#endif
    std::free(data_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, all_;
  void* data_;
};

constexpr unsigned kLanes = 32;

struct Warp {
  Barrier barrier, ordering;
  uint64_t slots[2][kLanes];
  explicit Warp(const std::string& of) : barrier("a shuffle" + of, kLanes, false), ordering("__syncwarp" + of, kLanes, true) {}
};

struct Block {
  Cluster& cluster;
  const unsigned index, rank, threads;
  Barrier barrier;
  Memory dynamic;
  std::unique_ptr<Memory> fixed;  // from its first thread's first step to its last thread's last one
  unsigned ended = 0;
  std::vector<std::unique_ptr<Warp>> warps;

  Block(Cluster& in, unsigned index_, unsigned rank_, unsigned threads_, size_t dynamic_bytes)
      : cluster(in), index(index_), rank(rank_), threads(threads_), barrier("__syncthreads" + name(), threads_, true),
        dynamic(dynamic_bytes) {
    for (unsigned w = 0; w < threads / kLanes; ++w)
      warps.push_back(std::make_unique<Warp>(" of warp " + std::to_string(w) + name()));
  }
  std::string name() const { return " of block " + std::to_string(index); }
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;

  Cluster(unsigned index, unsigned ranks, unsigned threads, size_t dynamic_bytes)
      : barrier("sync_cluster of cluster " + std::to_string(index), ranks * threads, true) {
    for (unsigned r = 0; r < ranks; ++r)
      blocks.push_back(std::make_unique<Block>(*this, index * ranks + r, r, threads, dynamic_bytes));
  }
};

inline void set_indices() {
  if (running == &host) return;
  threadIdx.x = running->thread;
  blockIdx.x = running->block->index;
}

// ---- what kernels call

inline void* dynamic_shared() {
  const Unseen unseen;
  return running->block->dynamic.get();
}

inline void* static_shared(size_t bytes) {
  const Unseen unseen;
  std::unique_ptr<Memory>& fixed = running->block->fixed;
  if (!fixed) fixed = std::make_unique<Memory>(bytes);
  return fixed->get();
}

inline unsigned rank_in_cluster() {
  const Unseen unseen;
  return running->block->rank;
}

inline unsigned blocks_in_cluster() {
  const Unseen unseen;
  return static_cast<unsigned>(running->block->cluster.blocks.size());
}

inline void sync_cluster() { running->block->cluster.barrier.wait(); }
inline void sync_warp() { running->block->warps[threadIdx.x / kLanes]->ordering.wait(); }

template <class T>
T* in_block(T* address, unsigned other) {
  const Unseen unseen;
  const Block& here = *running->block;
  const auto fail = [&](const char* why) {
    throw std::runtime_error("block " + std::to_string(here.index) + " reaches for block " + std::to_string(other) +
                             " of its cluster, which " + why);
  };
  if (here.cluster.blocks.size() < 2) fail("must have two or more");  // st.async, by memcheck's words
  if (other >= here.cluster.blocks.size()) fail("there is not");
  const Block& there = *here.cluster.blocks[other];
  if (!there.fixed) fail("has not begun");
  if (there.ended == there.threads) fail("is gone");
  const auto offset = reinterpret_cast<const char*>(address) - static_cast<const char*>(here.fixed->get());
  return reinterpret_cast<T*>(static_cast<char*>(there.fixed->get()) + offset);
}

// Until it is waited for, a copy leaves rubbish behind.
inline void copy_async(void* shared, const void* global) {
  std::memset(shared, 0xff, 16);
  const Unseen unseen;
  running->copies.emplace_back(shared, global);
}

inline void wait_for_copies() {
  for (const auto& [shared, global] : running->copies) std::memcpy(shared, global, 16);
  const Unseen unseen;
  running->copies.clear();
}

template <class T>
T of_lane_xor(T x, unsigned lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const Unseen unseen;
  Warp& warp = *running->block->warps[threadIdx.x / kLanes];
  const unsigned lane = threadIdx.x % kLanes;
  uint64_t* const slots = warp.slots[warp.barrier.turn()];
  std::memcpy(&slots[lane], &x, sizeof(T));
  warp.barrier.wait();
  std::memcpy(&x, &slots[lane ^ lanes], sizeof(T));
  return x;
}

// An mbarrier for one arriving thread.
struct Flag {
  int32_t bytes;  // expected, less those that have landed
  uint16_t expected, phase;
};

template <class F>
void change(uint64_t* flag, const F& how) {
  const Unseen unseen;
#if defined(__SANITIZE_THREAD__)
  __tsan_release(flag);
#endif
  Flag found;
  std::memcpy(&found, flag, sizeof(found));
  how(found);
  if (found.expected && found.bytes == 0) found = {0, 0, static_cast<uint16_t>(found.phase + 1)};
  std::memcpy(flag, &found, sizeof(found));
}

inline void expect_bytes(uint64_t* flag, uint32_t bytes) {
  change(flag, [&](Flag& found) {
    if (found.expected) throw std::runtime_error("bytes are expected twice in a phase of block " + std::to_string(blockIdx.x));
    found.expected = 1;
    found.bytes += bytes;
  });
}

inline void land(uint64_t* flag, uint32_t bytes) {
  change(flag, [&](Flag& found) { found.bytes -= bytes; });
}

inline void wait_for_phase(uint64_t* flag, unsigned parity) {
  const Unseen unseen;
  Flag found;
  for (int turns = 0;; ++turns) {
    std::memcpy(&found, flag, sizeof(found));
    if ((found.phase & 1) != parity) break;
    if (turns == 10000) throw std::runtime_error("a phase that does not end, of block " + std::to_string(blockIdx.x));
    ready.push(running);
    if (Fiber* fiber = not_begun.pop()) ready.push(fiber);
    go_on();
  }
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(flag);
#endif
}

// ---- launches

inline void live() {  // from launch to launch
  arrived();
  for (;;) {
    begin_of_launch.follow();
    std::string wrong;
    try {
      (*kernel_of_launch)();
    } catch (const std::exception& e) {
      wrong = e.what();
    }
    end_of_launch.precede();
    const Unseen unseen;
    if (!wrong.empty()) error = std::move(wrong);
    ++running->block->ended;
    --unfinished;
    go_on();
  }
}

inline std::unique_ptr<Fiber> new_fiber() {
  auto fiber = std::make_unique<Fiber>();
  void* const stack =
      mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) throw std::bad_alloc();
  fiber->stack = stack;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStack;
  makecontext(&fiber->context, live, 0);
#if defined(__SANITIZE_THREAD__)
  fiber->in_sanitizer = __tsan_create_fiber(0);
#endif
  return fiber;
}

// Runs `kernel` in every thread of every cluster, all at once. Returns the bytes of a block's static shared memory.
inline size_t launch(unsigned clusters, unsigned ranks, unsigned threads, size_t dynamic_bytes,
                     const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  static std::vector<std::unique_ptr<Fiber>> fibers, lost;
  if (threads == 0 || threads % kLanes) throw std::invalid_argument("threads: expected whole warps");
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const Unseen unseen;
#if defined(__SANITIZE_THREAD__)
  host.in_sanitizer = __tsan_get_current_fiber();
#endif
  host.begun = true;
  blockDim.x = threads;
  gridDim.x = clusters * ranks;
  kernel_of_launch = &kernel;
  unfinished = clusters * ranks * threads;
  while (fibers.size() < unfinished) fibers.push_back(new_fiber());
  std::vector<std::unique_ptr<Cluster>> all;
  auto fiber = fibers.begin();
  for (unsigned c = 0; c < clusters; ++c) {
    all.push_back(std::make_unique<Cluster>(c, ranks, threads, dynamic_bytes));
    for (const auto& block : all.back()->blocks)
      for (unsigned t = 0; t < threads; ++t, ++fiber) {
        (*fiber)->thread = t;
        (*fiber)->block = block.get();
        not_begun.push(fiber->get());
      }
  }
  begin_of_launch.precede();
  go_on();
  end_of_launch.follow();
  if (error.empty() && unfinished > 0) {
    error = "a barrier that cannot be passed:";
    for (const auto& cluster : all) {
      error += cluster->barrier.stuck();
      for (const auto& block : cluster->blocks) {
        error += block->barrier.stuck();
        for (const auto& warp : block->warps) error += warp->barrier.stuck() + warp->ordering.stuck();
      }
    }
  }
  if (!error.empty()) {  // fibers stand where they are, for ever
    std::move(fibers.begin(), fibers.end(), std::back_inserter(lost));
    fibers.clear();
    ready = not_begun = Queue();
    throw std::runtime_error(std::exchange(error, std::string()));
  }
  return all[0]->blocks[0]->fixed ? all[0]->blocks[0]->fixed->bytes() : 0;
}

}  // namespace on_host

inline void __syncthreads() { on_host::running->block->barrier.wait(); }

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
