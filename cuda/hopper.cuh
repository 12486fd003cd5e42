// The pieces that every Hopper kernel of this crate is made of: the ring of shared-memory stages that the copy engine
// fills, the product that drains it, and the turns two groups of warps take at the tensor cores so that one works off its
// results while the other multiplies.
#pragma once
#include "hopper_instructions.cuh"

namespace hopper {

// ---------------------------------------------------------------------------------------------------------
// The ring of stages
// ---------------------------------------------------------------------------------------------------------

// Which operand the two blocks of a cluster have in common, if they are one: each copies half of it to both.
enum class Share { NOTHING, A, B };

// M rows of A and N rows of B, a depth of BLOCK_K each, as 8 KiB boxes.
template <int M, int N, int COUNT, Share SHARED = Share::NOTHING>
struct Ring {
  static constexpr int STAGES = COUNT;
  static constexpr int BLOCKS = SHARED == Share::NOTHING ? 1 : 2;  // of a cluster
  struct alignas(1024) Stage {
    uint8_t a[M / BOX * BOX_BYTES];
    uint8_t b[N / BOX * BOX_BYTES];
  };
  Stage stage[COUNT];
  uint64_t full[COUNT];   // the copies of a stage have landed
  uint64_t empty[COUNT];  // everyone who reads it, in both blocks, has multiplied it

  // One thread. Each stage is read by one group of each block: one arrival a warp.
  __device__ void init() {
    for (int i = 0; i < COUNT; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), BLOCKS * GROUP / WARP);
    }
    barrier_init_fence();
  }
  // All threads: after init, before use, and again before leaving: nobody copies to, or arrives at, a block that
  // is gone.
  __device__ static void sync() {
    if constexpr (BLOCKS == 2)
      cluster_sync();
    else
      __syncthreads();
  }
};

// A place in the ring: the stage, and the parity of the round.
template <int COUNT>
struct Cursor {
  uint32_t stage = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++stage == COUNT) stage = 0, round ^= 1;
  }
  __device__ __forceinline__ void skip(uint32_t blocks) {
    uint32_t to = stage + blocks;
    stage = to % COUNT;
    round ^= to / COUNT & 1;
  }
};

// The producer's end: one thread fills stage after stage.
template <typename R>
struct Filler {
  uint32_t base, rank;
  Cursor<R::STAGES> at;

  __device__ explicit Filler(const R& ring) : base(shared_address(&ring)), rank(R::BLOCKS == 2 ? cluster_rank() : 0) {}
};

// A matrix whose columns from `from` on, a multiple of 64, are those of another.
struct JoinedMaps {
  const TensorMap *own, *rest;
  uint32_t from;
};
__device__ __forceinline__ void copy_box(uint32_t to, const JoinedMaps& maps, int column, int row, uint32_t barrier) {
  const bool own = column < maps.from;
  copy_box(to, own ? maps.own : maps.rest, own ? column : column - maps.from, row, barrier);
}
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const JoinedMaps& maps, int column, int row,
                                                 uint32_t barrier) {
  const bool own = column < maps.from;
  copy_box_to_both(to, own ? maps.own : maps.rest, own ? column : column - maps.from, row, barrier);
}

// A tile of an operand: `mn` along rows or columns of the product, `k` along its depth. The matrix is [mn, k] (K
// contiguous) or [k, mn] (MN contiguous). If both blocks need it, each copies its half to both.
template <bool MN_MAJOR, bool BOTH, int EXTENT, typename Map>
__device__ __forceinline__ void copy_operand(uint32_t to, const Map& map, int mn, int k, uint32_t barrier,
                                             uint32_t rank) {
  if constexpr (BOTH) {
    constexpr int HALF = EXTENT / 2;  // as high as the map's boxes
    const int along = mn + rank * HALF;
    copy_box_to_both(to + rank * HALF * BLOCK_K * 2, map, MN_MAJOR ? along : k, MN_MAJOR ? k : along, barrier);
  } else {
#pragma unroll
    for (int box = 0; box < EXTENT / BOX; ++box) {
      const int along = mn + box * BOX;
      copy_box(to + box * BOX_BYTES, map, MN_MAJOR ? along : k, MN_MAJOR ? k : along, barrier);
    }
  }
}

// Fills the next stage with A[m.., ka..] and the first WIDTH rows of B[n.., kb..].
template <bool MN_A, bool MN_B, int WIDTH, typename MapB, int M, int N, int COUNT, Share SHARED>
__device__ __forceinline__ void copy_block(Filler<Ring<M, N, COUNT, SHARED>>& to, const TensorMap* a, int m, int ka,
                                           const MapB& b, int n, int kb) {
  using R = Ring<M, N, COUNT, SHARED>;
  const uint32_t stage = to.base + to.at.stage * sizeof(typename R::Stage);
  const uint32_t full = to.base + offsetof(R, full) + to.at.stage * 8;
  barrier_wait(to.base + offsetof(R, empty) + to.at.stage * 8, to.at.round ^ 1);
  barrier_expect(full, (M + WIDTH) / BOX * BOX_BYTES);
  copy_operand<MN_A, SHARED == Share::A, M>(stage, a, m, ka, full, to.rank);
  copy_operand<MN_B, SHARED == Share::B, WIDTH>(stage + M / BOX * BOX_BYTES, b, n, kb, full, to.rank);
  to.at.next();
}

// A consumer group's end.
template <typename R>
struct Drainer {
  uint32_t base;     // of the ring
  uint32_t release;  // of the empty barriers lane i of a warp arrives at: those of the cluster's block i
  bool releases;
  Cursor<R::STAGES> at;

  __device__ explicit Drainer(const R& ring) : base(uniform(shared_address(&ring))) {
    const uint32_t lane = threadIdx.x % WARP;
    release = base + offsetof(R, empty);
    if constexpr (R::BLOCKS == 2) release = map_to_rank(release, lane % 2);
    releases = lane < R::BLOCKS;
  }
};

// Waits for the next stage and issues its products into acc (128 x WIDTH); the first of them starts the sum.
template <typename T, bool MN_A, bool MN_B, int WIDTH, bool FIRST, int M, int N, int COUNT, Share SHARED>
__device__ __forceinline__ void multiply_stage(float (&acc)[2][WIDTH / 2],
                                               Drainer<Ring<M, N, COUNT, SHARED>>& from) {
  using R = Ring<M, N, COUNT, SHARED>;
  static_assert(M == TILE_M && WIDTH <= N, "a stage holds a tile");
  barrier_wait(from.base + offsetof(R, full) + from.at.stage * 8, from.at.round);
  const uint32_t stage = from.base + from.at.stage * sizeof(typename R::Stage);
  const uint64_t a = operand<MN_A>(stage), b = operand<MN_B>(stage + M / BOX * BOX_BYTES);
  wgmma_fence();
#pragma unroll
  for (int half = 0; half < 2; ++half) wgmma<T, WIDTH, MN_A, MN_B, !FIRST>(acc[half], a + half * NEXT_M64, b);
#pragma unroll
  for (int k = 1; k < BLOCK_K / 16; ++k) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      wgmma<T, WIDTH, MN_A, MN_B, true>(acc[half], a + half * NEXT_M64 + k * NEXT_K16<MN_A>, b + k * NEXT_K16<MN_B>);
  }
  wgmma_commit();
  from.at.next();
}

// acc (128 x WIDTH) = the product of the next `blocks` stages, at least one. `issued` runs once the last product
// is under way, before it is done.
template <typename T, bool MN_A, bool MN_B, int WIDTH, int M, int N, int COUNT, Share SHARED, typename Issued>
__device__ __forceinline__ void multiply(float (&acc)[2][WIDTH / 2], Drainer<Ring<M, N, COUNT, SHARED>>& from,
                                         uint32_t blocks, Issued issued) {
  uint32_t previous = from.at.stage;
  multiply_stage<T, MN_A, MN_B, WIDTH, true>(acc, from);
  for (uint32_t block = 1; block < blocks; ++block) {
    const uint32_t current = from.at.stage;
    multiply_stage<T, MN_A, MN_B, WIDTH, false>(acc, from);
    // One block stays in flight; the stage before it is read to the end and can be filled again.
    wgmma_wait<1>();
    if (from.releases) barrier_arrive(from.release + previous * 8);
    previous = current;
  }
  issued();
  wgmma_wait<0>();
  // Tells the compiler what the hardware does: only now are these the product.
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) asm volatile("" : "+f"(acc[i / (WIDTH / 2)][i % (WIDTH / 2)])::"memory");
  if (from.releases) barrier_arrive(from.release + previous * 8);
}

// ---------------------------------------------------------------------------------------------------------
// Turns at the tensor cores
// ---------------------------------------------------------------------------------------------------------

enum NamedBarrier : uint32_t { TURN = 1, BIAS = 3 };  // one a group each; 0 is __syncthreads

// Waits until the other group hands over the tensor cores to `group`.
__device__ __forceinline__ void take_turn(uint32_t group) { named_wait(TURN + group, 2 * GROUP); }
__device__ __forceinline__ void give_turn(uint32_t to_group) { named_arrive(TURN + to_group, 2 * GROUP); }

// ---------------------------------------------------------------------------------------------------------
// Keeping blocks together
// ---------------------------------------------------------------------------------------------------------

// Blocks that share operands drift apart, and what they share falls out of L2 before the last one asks for it.
// So a producer waits at each step until every block has come to the one before. Only a hint: whoever waits too
// long (blocks that do not run at the same time) goes on and never waits again.
struct Pace {
  static constexpr uint32_t PATIENCE = 1024;  // reads of the counter, about a microsecond each
  uint32_t* arrived;                          // [1] zero at the launch, or null
  uint32_t step = 0;

  __device__ explicit Pace(uint32_t* arrived) : arrived(arrived) {}

  __device__ void next() {
    ++step;
    if (!arrived) return;
    atomicAdd(arrived, 1);
    const uint32_t wanted = (step - 1) * gridDim.x;
    for (uint32_t tries = 0; *static_cast<volatile uint32_t*>(arrived) < wanted; ++tries)
      if (tries == PATIENCE) {
        arrived = nullptr;
        break;
      }
  }
  // Counts steps that this block has none of, up to `last`.
  __device__ void skip_to(uint32_t last) {
    if (arrived && last > step) atomicAdd(arrived, last - step);
    step = last;
  }
};

// ---------------------------------------------------------------------------------------------------------
// Arithmetic
// ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Two floats as two half floats, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (__is_same(T, __half))
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The other way round.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
  if constexpr (__is_same(T, __half))
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  else
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u));
}

// Four lanes share a row, and each holds two columns (one word) of four chunks of 8 columns: afterwards lane l of
// the four holds all of chunk l, 16 bytes to write at once. All lanes of the warp take part.
__device__ __forceinline__ uint4 collect_chunk(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  const uint32_t r0 = __shfl_xor_sync(~0u, odd ? c0 : c1, 1), r1 = __shfl_xor_sync(~0u, odd ? c2 : c3, 1);
  const uint32_t a0 = odd ? r0 : c0, a1 = odd ? c1 : r0;  // of chunk 0 or 1
  const uint32_t b0 = odd ? r1 : c2, b1 = odd ? c3 : r1;  // of chunk 2 or 3
  const uint32_t s0 = __shfl_xor_sync(~0u, high ? a0 : b0, 2), s1 = __shfl_xor_sync(~0u, high ? a1 : b1, 2);
  return high ? make_uint4(s0, s1, b0, b1) : make_uint4(a0, a1, s0, s1);
}

// The other way round: lane l of four holds chunk l, 16 bytes; afterwards each holds its word of all four.
__device__ __forceinline__ uint4 deal_chunk(uint4 chunk) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
  // Lanes 0 and 1 keep the low words (for themselves), and swap their high ones with lanes 2 and 3.
  const uint32_t s0 = __shfl_xor_sync(~0u, high ? chunk.x : chunk.z, 2);
  const uint32_t s1 = __shfl_xor_sync(~0u, high ? chunk.y : chunk.w, 2);
  // Of chunk l % 2 and chunk l % 2 + 2: the words of lanes l / 2 * 2 and that plus 1.
  const uint32_t a0 = high ? s0 : chunk.x, a1 = high ? s1 : chunk.y;
  const uint32_t b0 = high ? chunk.z : s0, b1 = high ? chunk.w : s1;
  const uint32_t r0 = __shfl_xor_sync(~0u, odd ? a0 : a1, 1), r1 = __shfl_xor_sync(~0u, odd ? b0 : b1, 1);
  return odd ? make_uint4(r0, a1, r1, b1) : make_uint4(a0, r0, b0, r1);
}

// Memory += value, without waiting for it (a load would, and the old values would crowd out what L1 holds). Each
// element has one adder a launch, so no order is left to chance: results repeat bit for bit.
__device__ __forceinline__ void add_in_memory(float* to, float4 value) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
}

// The smallest bf16 that is not below x.
__device__ __forceinline__ uint16_t bf16_up(float x) {
  uint32_t bits = __float_as_uint(x);
  return static_cast<uint16_t>((static_cast<int>(bits) < 0 ? bits : bits + 0xFFFF) >> 16);
}

}  // namespace hopper
