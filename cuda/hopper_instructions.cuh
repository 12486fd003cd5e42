// Hopper's own instructions (PTX for sm_90a), each wrapped once, and the sizes that all Hopper kernels share.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stddef.h>
#include <stdint.h>

namespace hopper {

// ---------------------------------------------------------------------------------------------------------
// Sizes
// ---------------------------------------------------------------------------------------------------------

constexpr int WARP = 32;
constexpr int GROUP = 128;             // a warpgroup: what issues one wgmma
constexpr int CONSUMERS = 2;           // groups that multiply, besides the one that copies
constexpr int THREADS = GROUP * (1 + CONSUMERS);
constexpr int TILE_M = 128;            // rows of a consumer group's tile: two wgmmas of 64
constexpr int BLOCK_K = 64;            // depth of a stage: 64 half floats are one 128-byte swizzle row
constexpr int BOX = 64;                // operands lie in shared memory as boxes of 64 x 64 elements ...
constexpr int BOX_BYTES = BOX * BOX * 2;  // ... 8 KiB, swizzled by 128 bytes
constexpr int PRODUCER_REGISTERS = 24;
constexpr int CONSUMER_REGISTERS = 240;  // 128 * 24 + 256 * 240 registers fit the file of 65,536
constexpr float LOG2E = 1.4426950408889634f;

// ---------------------------------------------------------------------------------------------------------
// Barriers
// ---------------------------------------------------------------------------------------------------------

// Barriers and stages are named by their 32-bit addresses in shared memory.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// The same value in all lanes, in a form the compiler keeps in the registers all lanes share.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(~0u, x, 0); }

__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes initialised barriers visible to the copy engine and to the other block of a cluster.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives at a barrier of this block or, by a mapped address, of the other one. (The spelled-out form with
// .release.cluster costs a full memory barrier; nothing written here needs it.)
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives and announces the bytes the copy engine is going to deliver in this phase.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint32_t barrier, uint32_t phase) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(phase)
      : "memory");
  return done;
}

// Waits until the phase of the given parity is over.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t phase) {
  while (!barrier_try_wait(barrier, phase)) {
  }
}

// Clusters: this block's rank, an address of the block of another rank, and a barrier of all their threads.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Named barriers of a CTA: `threads` counts those that wait and those that only arrive.
__device__ __forceinline__ void named_wait(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(uint32_t id, uint32_t threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int REGISTERS>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---------------------------------------------------------------------------------------------------------
// Copy engine
// ---------------------------------------------------------------------------------------------------------

// What cuTensorMapEncodeTiled fills on the host: here always a row-major matrix of half floats, boxes 64
// columns wide and 64 rows high (96: half a tile of classes), 128-byte swizzle, zeros outside; or, of four dimensions, the
// heads of such matrices.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box whose first element is (row, column); completes on `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const TensorMap* map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}
// The same of one head of a (batch, time, heads, head_dim).
__device__ __forceinline__ void copy_box_of_head(uint32_t to, const TensorMap* map, int column, int time, int head,
                                                 int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          to),
      "l"(map), "r"(barrier), "r"(column), "r"(time), "r"(head), "r"(batch)
      : "memory");
}
// Copies contiguous bytes, a multiple of 16 from a multiple of 16.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// The same to both blocks of a cluster, at the same place, completing on the same barrier of each.
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const TensorMap* map, int column, int row,
                                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(column), "r"(row), "h"(uint16_t(3))
      : "memory");
}

// ---------------------------------------------------------------------------------------------------------
// Tensor cores
// ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Shared-memory descriptor of a wgmma operand made of swizzled 8 KiB boxes:
//   bits  0-13  address / 16
//   bits 16-29  leading offset / 16: from one set of 64 columns to the next along M or N if that is the contiguous
//               dimension ("MN-major"), which is one box unless boxes are stacked; ignored, by convention 1, if K is
//   bits 32-45  stride offset / 16: between groups of eight 128-byte rows
//   bits 62-63  1: 128-byte swizzle
template <bool MN_MAJOR, int COLUMNS = BOX_BYTES>
__device__ __forceinline__ uint64_t operand(uint32_t address) {
  constexpr uint64_t LEADING = MN_MAJOR ? COLUMNS / 16 : 1;
  constexpr uint64_t STRIDE = 1024 / 16;
  return uint64_t(1) << 62 | STRIDE << 32 | LEADING << 16 | (address & 0x3FFFF) >> 4;
}

// From one depth of 16 to the next, in a descriptor's units of 16 bytes: 32 bytes within the swizzled row if K
// is contiguous, 16 rows of 128 bytes if not.
template <bool MN_MAJOR>
constexpr uint64_t NEXT_K16 = MN_MAJOR ? 16 * 128 / 16 : 32 / 16;
// From one set of 64 rows to the next: one box.
constexpr uint64_t NEXT_M64 = BOX_BYTES / 16;

#define ACC4(io, a, i) io(a[i]), io(a[i + 1]), io(a[i + 2]), io(a[i + 3])
#define ACC8(io, a, i) ACC4(io, a, i), ACC4(io, a, i + 4)

// acc (64 x N, f32) = [ADD: acc +] A (64 x 16) B (16 x N). Thread t of the group holds, in acc[4 j + 2 q + e], row
// t / 32 * 16 + t % 32 / 4 + 8 q and column 8 j + t % 4 * 2 + e. That the first of a product only writes acc must
// show in the operands (IO "=f", not "+f"), or acc would occupy its registers for good.
#define WGMMA_N64(TYPE, ADD, IO) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE "\n{" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 " \
      "}, %32, %33, add, 1, 1, %34, %35;\n}\n" \
      : ACC8(IO, acc, 0), ACC8(IO, acc, 8), ACC8(IO, acc, 16), ACC8(IO, acc, 24) \
      : "l"(a), "l"(b), "n"(int(MN_A)), "n"(int(MN_B)))

#define WGMMA_N128(TYPE, ADD, IO) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE "\n{" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 " \
      "}, %64, %65, add, 1, 1, %66, %67;\n}\n" \
      : ACC8(IO, acc, 0), ACC8(IO, acc, 8), ACC8(IO, acc, 16), ACC8(IO, acc, 24), \
        ACC8(IO, acc, 32), ACC8(IO, acc, 40), ACC8(IO, acc, 48), ACC8(IO, acc, 56) \
      : "l"(a), "l"(b), "n"(int(MN_A)), "n"(int(MN_B)))

#define WGMMA_N192(TYPE, ADD, IO) \
  asm volatile( \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." TYPE "." TYPE "\n{" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95 " \
      "}, %96, %97, add, 1, 1, %98, %99;\n}\n" \
      : ACC8(IO, acc, 0), ACC8(IO, acc, 8), ACC8(IO, acc, 16), ACC8(IO, acc, 24), \
        ACC8(IO, acc, 32), ACC8(IO, acc, 40), ACC8(IO, acc, 48), ACC8(IO, acc, 56), \
        ACC8(IO, acc, 64), ACC8(IO, acc, 72), ACC8(IO, acc, 80), ACC8(IO, acc, 88) \
      : "l"(a), "l"(b), "n"(int(MN_A)), "n"(int(MN_B)))

template <typename T, int N, bool MN_A, bool MN_B, bool ADD>
__device__ __forceinline__ void wgmma(float* acc, uint64_t a, uint64_t b) {
  static_assert(N == 64 || N == 128 || N == 192, "no wrapper for this width");
  constexpr bool BF16 = !__is_same(T, __half);
  if constexpr (N == 64 && BF16 && ADD) WGMMA_N64("bf16", "1", "+f");
  if constexpr (N == 64 && BF16 && !ADD) WGMMA_N64("bf16", "0", "=f");
  if constexpr (N == 64 && !BF16 && ADD) WGMMA_N64("f16", "1", "+f");
  if constexpr (N == 64 && !BF16 && !ADD) WGMMA_N64("f16", "0", "=f");
  if constexpr (N == 128 && BF16 && ADD) WGMMA_N128("bf16", "1", "+f");
  if constexpr (N == 128 && BF16 && !ADD) WGMMA_N128("bf16", "0", "=f");
  if constexpr (N == 128 && !BF16 && ADD) WGMMA_N128("f16", "1", "+f");
  if constexpr (N == 128 && !BF16 && !ADD) WGMMA_N128("f16", "0", "=f");
  if constexpr (N == 192 && BF16 && ADD) WGMMA_N192("bf16", "1", "+f");
  if constexpr (N == 192 && BF16 && !ADD) WGMMA_N192("bf16", "0", "=f");
  if constexpr (N == 192 && !BF16 && ADD) WGMMA_N192("f16", "1", "+f");
  if constexpr (N == 192 && !BF16 && !ADD) WGMMA_N192("f16", "0", "=f");
}

// acc += A B with A in registers: words 0 to 3 hold rows r, r + 8, r, r + 8 of columns c, c, c + 8, c + 8, two columns
// each, where r and c are the row and column of acc[0]. So pairs of an accumulator, rounded, are a left operand.
#define WGMMA_REGISTERS_N64(TYPE) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE "\n{" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31 " \
      "}, {%32, %33, %34, %35}, %36, 1, 1, 1, %37;\n" \
      : ACC8("+f", acc, 0), ACC8("+f", acc, 8), ACC8("+f", acc, 16), ACC8("+f", acc, 24) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(MN_B)))

#define WGMMA_REGISTERS_N128(TYPE) \
  asm volatile( \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE "\n{" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63 " \
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, %69;\n" \
      : ACC8("+f", acc, 0), ACC8("+f", acc, 8), ACC8("+f", acc, 16), ACC8("+f", acc, 24), \
        ACC8("+f", acc, 32), ACC8("+f", acc, 40), ACC8("+f", acc, 48), ACC8("+f", acc, 56) \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(MN_B)))

template <typename T, int N, bool MN_B>
__device__ __forceinline__ void wgmma_registers(float* acc, const uint32_t* a, uint64_t b) {
  static_assert(N == 64 || N == 128, "no wrapper for this width");
  constexpr bool BF16 = !__is_same(T, __half);
  if constexpr (N == 64 && BF16) WGMMA_REGISTERS_N64("bf16");
  if constexpr (N == 64 && !BF16) WGMMA_REGISTERS_N64("f16");
  if constexpr (N == 128 && BF16) WGMMA_REGISTERS_N128("bf16");
  if constexpr (N == 128 && !BF16) WGMMA_REGISTERS_N128("f16");
}

}  // namespace hopper
