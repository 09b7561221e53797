// The GPU's instructions that the kernels use, one function each, with an equivalent for the host. So tests can run the
// same source as threads of a process and look for races (GSPO_ON_HOST).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(GSPO_ON_HOST)
#include "on_host.h"  // of the tests: __global__, threadIdx, __syncthreads, shuffles, clusters
#endif

namespace gspo::gpu {

#if defined(__CUDA_ARCH__)
#define GSPO_PTX 1
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define GSPO_CLUSTERS 1
#endif

// ---- numbers

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// 16 bytes of a row: one access.
struct alignas(16) Vector {
  uint32_t words[4];
};

__device__ __forceinline__ float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

__device__ __forceinline__ uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// 2^x; what would be subnormal is 0.
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(GSPO_PTX)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
}

// Factors that are subnormal, and a product that would be, are 0.
__device__ __forceinline__ float multiply_flushed(float x, float y) {
#if defined(GSPO_PTX)
  float z;
  asm("mul.ftz.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  const auto flushed = [](float one) { return std::fabs(one) < 0x1p-126f ? 0.0f * one : one; };
  return flushed(flushed(x) * flushed(y));
#endif
}

// 1 / x, off by at most a unit in the last place; 0 where it would be subnormal.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(GSPO_PTX)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// From -bound to bound; NaN stays.
__device__ __forceinline__ float bounded_number(float x, float bound) {
#if defined(GSPO_PTX)
  float y;
  asm("{ .reg .f32 t; max.NaN.f32 t, %1, %2; min.NaN.f32 %0, t, %3; }" : "=f"(y) : "f"(x), "f"(-bound), "f"(bound));
  return y;
#else
  return x < -bound ? -bound : x > bound ? bound : x;
#endif
}

// The same of two bfloat16, by a bound that is one twice.
__device__ __forceinline__ uint32_t bounded_pair(uint32_t x, uint32_t bound) {
#if defined(GSPO_PTX)
  uint32_t y;
  asm("{ .reg .b32 t; max.NaN.bf16x2 t, %1, %2; min.NaN.bf16x2 %0, t, %3; }"
      : "=r"(y) : "r"(x), "r"(bound | 0x80008000u), "r"(bound));
  return y;
#else
  const float most = as_float(bound & 0xffff0000u);
  const auto bounded = [&](uint32_t one) { return as_bits(bounded_number(as_float(one), most)); };
  return bounded(x << 16) >> 16 | (bounded(x & 0xffff0000u) & 0xffff0000u);
#endif
}

__device__ __forceinline__ float widen(BFloat16 x) { return as_float(uint32_t{x.bits} << 16); }

__device__ __forceinline__ float widen(Float16 x) {
#if defined(GSPO_PTX)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return half;
#endif
}

__device__ __forceinline__ float widen(float x) { return x; }

// Two numbers of 16 bits in a word, the first one in the low half; rounded to nearest even.
__device__ __forceinline__ uint32_t pack(float low, float high, BFloat16) {
#if defined(GSPO_PTX)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto narrow = [](float x) {
    const uint32_t bits = as_bits(x);
    return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

__device__ __forceinline__ uint32_t pack(float low, float high, Float16) {
#if defined(GSPO_PTX)
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  const auto narrow = [](float x) {
    const _Float16 half = static_cast<_Float16>(x);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return uint32_t{bits};
  };
  return narrow(high) << 16 | narrow(low);
#endif
}

// The larger number in each half of two words; a NaN is ignored.
__device__ __forceinline__ uint32_t larger_of_pairs(uint32_t x, uint32_t y, BFloat16) {
#if defined(GSPO_PTX)
  uint32_t z;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#else
  const auto larger = [](uint32_t a, uint32_t b) { return as_bits(std::fmax(as_float(a), as_float(b))); };
  return larger(x << 16, y << 16) >> 16 | (larger(x & 0xffff0000u, y & 0xffff0000u) & 0xffff0000u);
#endif
}

__device__ __forceinline__ uint32_t larger_of_pairs(uint32_t x, uint32_t y, Float16) {
#if defined(GSPO_PTX)
  uint32_t z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
#else
  const auto larger = [](uint32_t a, uint32_t b) {
    return widen(Float16{static_cast<uint16_t>(a)}) >= widen(Float16{static_cast<uint16_t>(b)}) ? a : b;
  };
  const auto number = [](uint32_t a) { return widen(Float16{static_cast<uint16_t>(a)}) == widen(Float16{static_cast<uint16_t>(a)}); };
  const auto of_half = [&](uint32_t a, uint32_t b) { return (!number(a) ? b : !number(b) ? a : larger(a, b)) & 0xffffu; };
  return of_half(x >> 16, y >> 16) << 16 | of_half(x, y);
#endif
}

// ---- memory

// Tells the compiler that an address is of global memory, not of shared or local memory: fewer instructions an access.
template <class T>
__device__ __forceinline__ T* global(T* address) {
#if defined(GSPO_PTX)
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

__device__ __forceinline__ Vector load(const void* address) { return *static_cast<const Vector*>(global(address)); }
__device__ __forceinline__ void store(void* address, const Vector& x) { *static_cast<Vector*>(global(address)) = x; }

// Begins to copy 16 bytes to shared memory, without the L1 cache; the thread goes on. After `wait_for_copies` a thread
// sees all copies that it has begun; other threads see them only after a barrier. A thread may begin a copy to an
// address that it has read, once it has used what it read.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(GSPO_PTX)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(address), "l"(global) : "memory");
#elif defined(GSPO_ON_HOST)
  on_host::copy_async(shared, global);
#endif
}

// The same if `needed`, without a branch.
__device__ __forceinline__ void copy_async_if(bool needed, void* shared, const void* global) {
#if defined(GSPO_PTX)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile(
      "{\n\t.reg .pred p;\n\t"
      "setp.ne.u32 p, %2, 0;\n\t"
      "@p cp.async.cg.shared.global [%0], [%1], 16;\n\t}"
      : : "r"(address), "l"(global), "r"(static_cast<uint32_t>(needed)) : "memory");
#elif defined(GSPO_ON_HOST)
  if (needed) on_host::copy_async(shared, global);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(GSPO_PTX)
  asm volatile("cp.async.wait_all;" : : : "memory");
#elif defined(GSPO_ON_HOST)
  on_host::wait_for_copies();
#endif
}

// Flags (mbarriers) say when what other blocks send has landed in shared memory. A flag has phases, one after the other:
// a phase ends when one thread has said how many bytes to expect, and as many have landed.
__device__ __forceinline__ void initialize_flag(uint64_t* flag) {
#if defined(GSPO_CLUSTERS)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(flag));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" : : "r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#else
  *flag = 0;
#endif
}

__device__ __forceinline__ void expect_bytes(uint64_t* flag, uint32_t bytes) {
#if defined(GSPO_CLUSTERS)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(flag));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(address), "r"(bytes) : "memory");
#elif defined(GSPO_ON_HOST)
  on_host::expect_bytes(flag, bytes);
#endif
}

// Until the phase of this parity, 0 for the first one, has ended. Then this thread sees what landed in it.
__device__ __forceinline__ void wait_for_phase(uint64_t* flag, unsigned parity) {
#if defined(GSPO_CLUSTERS)
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(flag));
  uint32_t ended = 0;
  while (!ended) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended) : "r"(address), "r"(parity) : "memory");
  }
#elif defined(GSPO_ON_HOST)
  on_host::wait_for_phase(flag, parity);
#endif
}

// ---- threads

constexpr unsigned kWarp = 32;

template <class T>
__device__ __forceinline__ T of_lane_xor(T x, unsigned lanes) {
#if defined(GSPO_ON_HOST)
  return on_host::of_lane_xor(x, lanes);
#else
  return __shfl_xor_sync(0xffffffffu, x, lanes);
#endif
}

// The threads of a warp see what the others wrote before.
__device__ __forceinline__ void sync_warp() {
#if defined(GSPO_ON_HOST)
  on_host::sync_warp();
#else
  __syncwarp();
#endif
}

// This block's number in its cluster, and how many blocks that has. Before sm_90 a block is alone.
__device__ __forceinline__ unsigned rank_in_cluster() {
#if defined(GSPO_CLUSTERS)
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#elif defined(GSPO_ON_HOST)
  return on_host::rank_in_cluster();
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned blocks_in_cluster() {
#if defined(GSPO_CLUSTERS)
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
#elif defined(GSPO_ON_HOST)
  return on_host::blocks_in_cluster();
#else
  return 1;
#endif
}

// A barrier for all threads of the cluster: each sees what the others wrote before. For a block that is alone, of its
// threads. Not `.aligned`: threads of a warp may arrive one by one, when one of them has had something to do by itself.
__device__ __forceinline__ void sync_cluster() {
#if defined(GSPO_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" : : : "memory");
#elif defined(GSPO_ON_HOST)
  on_host::sync_cluster();
#else
  __syncthreads();
#endif
}

// Writes a value to shared memory of block `rank`, at the offset that `address` has in this block's. There the flag at
// the offset of `flag` counts its bytes when they have landed.
__device__ __forceinline__ void store_async(uint64_t* address, unsigned rank, uint64_t value, uint64_t* flag) {
#if defined(GSPO_CLUSTERS)
  const uint32_t here = static_cast<uint32_t>(__cvta_generic_to_shared(address));
  const uint32_t flag_here = static_cast<uint32_t>(__cvta_generic_to_shared(flag));
  uint32_t there, flag_there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(flag_there) : "r"(flag_here), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];"
               : : "r"(there), "l"(value), "r"(flag_there) : "memory");
#elif defined(GSPO_ON_HOST)
  *on_host::in_block(address, rank) = value;
  on_host::land(on_host::in_block(flag, rank), sizeof(value));
#endif
}

__device__ __forceinline__ unsigned take_ticket(unsigned* counter) { return atomicAdd(counter, 1u); }

}  // namespace gspo::gpu
