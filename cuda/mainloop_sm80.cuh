// Matrix products for compute capability 8.0 and later: cp.async pipelines into swizzled shared memory,
// ldmatrix, mma.sync. A block of 8 warps (2 by 4) computes 128 x BN; a warp 64 x BN/4.
//
// An operand tile is either K-major (each row of the operand holds consecutive k) or MN-major (each k holds
// consecutive rows of the operand); which, is a template argument. Half types multiply as they are; f32 is
// split into two tf32 numbers and multiplied in three parts, which keeps about 21 bits of its 24.
#pragma once
#include "classifier.cuh"

constexpr int BM = 128;
constexpr int THREADS = 256;
constexpr int STAGES = 4;
constexpr int CHUNK = 16;     // bytes that one cp.async moves
constexpr int BK_BYTES = 64;  // of one K-major row in a stage: 32 half-precision or 16 single-precision numbers

template <typename T> constexpr int BK = BK_BYTES / (int)sizeof(T);
template <typename T> constexpr int PER_CHUNK = CHUNK / (int)sizeof(T);

enum Major { K_MAJOR, MN_MAJOR };

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void cp_async_16(uint32_t dst, const void *src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Byte offset of a 16-byte chunk within a tile. Swizzled so that the 8 rows one ldmatrix reads lie in
// different banks.
__device__ __forceinline__ uint32_t k_major_offset(int row, int chunk) {
  return row * BK_BYTES + ((chunk ^ ((row >> 1) & 3)) * CHUNK);
}
// `swizzle` is k & 7 for half types. For f32, four k are read at once, two chunks wide each: see Fragments<float>.
template <typename T, int EXTENT> __device__ __forceinline__ uint32_t mn_major_offset(int k, int chunk) {
  const int swizzle = sizeof(T) == 4 ? (k & 3) << 1 : k & 7;
  return k * (EXTENT * (int)sizeof(T)) + ((chunk ^ swizzle) * CHUNK);
}

// Stores one chunk whose first `numbers` numbers are at `src`, which need not be aligned; zeros after them.
template <typename T> __device__ __noinline__ void store_chunk(uint32_t dst, const T *src, int numbers) {
  union { T value[PER_CHUNK<T>]; uint4 bits; } chunk;
  chunk.bits = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < PER_CHUNK<T>; i++)
    if (i < numbers) chunk.value[i] = src[i];
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(chunk.bits.x), "r"(chunk.bits.y),
               "r"(chunk.bits.z), "r"(chunk.bits.w) : "memory");
}

// Copies a chunk of each of COUNT rows, which lie `step` numbers apart in memory. `left` is how many numbers the rows
// have from `row(i)` on, at most 0 for none; bit i of `valid` says whether row i exists. What does not exist becomes 0.
// ALIGNED: rows begin on 16 bytes.
template <typename T, int COUNT, uint32_t DST_STEP, bool ALIGNED, class Row>
__device__ __forceinline__ void load_chunks(uint32_t dst, Row row, int left, uint32_t valid) {
  if (ALIGNED) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) cp_async_16(dst + i * DST_STEP, row(i), left > 0 && (valid >> i & 1));
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) store_chunk<T>(dst + i * DST_STEP, row(i), valid >> i & 1 ? left : 0);
  }
}

// Which of COUNT rows, APART apart, are among the first `rows`, as bits.
template <int COUNT, int APART> __device__ __forceinline__ uint32_t existing(int64_t rows) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < COUNT; i++) bits |= (i * APART < rows) << i;
  return bits;
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address));
  return r;
}

// The operands of one step along k (32 bytes of it: 16 half-precision or 8 single-precision numbers):
// `a` for 16 rows, `b` for 16 columns (two mma wide: b[0..2] and b[2..4]).
template <typename T> struct Fragments {
  template <Major MAJOR, int EXTENT>
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int step, int lane) {
    if (MAJOR == K_MAJOR)
      ldmatrix_x4(a, tile + k_major_offset(row + (lane & 15), step * 2 + (lane >> 4)));
    else
      ldmatrix_x4_trans(a, tile + mn_major_offset<T, EXTENT>(step * 16 + (lane & 7) + (lane >> 4) * 8,
                                                             row / 8 + ((lane >> 3) & 1)));
  }
  template <Major MAJOR, int EXTENT>
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int column, int step, int lane) {
    if (MAJOR == K_MAJOR)
      ldmatrix_x4(b, tile + k_major_offset(column + (lane & 7) + (lane >> 4) * 8, step * 2 + ((lane >> 3) & 1)));
    else
      ldmatrix_x4_trans(b, tile + mn_major_offset<T, EXTENT>(step * 16 + (lane & 15), column / 8 + (lane >> 4)));
  }
};

// ldmatrix moves 16-bit numbers in pairs. K-major f32 rides along, a number in the place of a pair; MN-major f32
// is read one number at a time.
template <> struct Fragments<float> {
  template <int EXTENT> static __device__ __forceinline__ uint32_t number(uint32_t tile, int k, int mn) {
    return load_shared(tile + mn_major_offset<float, EXTENT>(k, mn / 4) + (mn & 3) * 4);
  }
  template <Major MAJOR, int EXTENT>
  static __device__ __forceinline__ void load_a(uint32_t (&a)[4], uint32_t tile, int row, int step, int lane) {
    if (MAJOR == K_MAJOR) {
      ldmatrix_x4(a, tile + k_major_offset(row + (lane & 15), step * 2 + (lane >> 4)));
    } else {
      const int k = step * 8 + (lane & 3), m = row + (lane >> 2);
      a[0] = number<EXTENT>(tile, k, m), a[1] = number<EXTENT>(tile, k, m + 8);
      a[2] = number<EXTENT>(tile, k + 4, m), a[3] = number<EXTENT>(tile, k + 4, m + 8);
    }
  }
  template <Major MAJOR, int EXTENT>
  static __device__ __forceinline__ void load_b(uint32_t (&b)[4], uint32_t tile, int column, int step, int lane) {
    if (MAJOR == K_MAJOR) {
      ldmatrix_x4(b, tile + k_major_offset(column + (lane & 7) + (lane >> 4) * 8, step * 2 + ((lane >> 3) & 1)));
    } else {
      const int k = step * 8 + (lane & 3), n = column + (lane >> 2);
      b[0] = number<EXTENT>(tile, k, n), b[1] = number<EXTENT>(tile, k + 4, n);
      b[2] = number<EXTENT>(tile, k, n + 8), b[3] = number<EXTENT>(tile, k + 4, n + 8);
    }
  }
};

#define MMA(SHAPE, TYPE)                                                                                            \
  asm volatile("mma.sync.aligned." SHAPE ".row.col.f32." TYPE "." TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "   \
               "{%8, %9}, {%0, %1, %2, %3};"                                                                         \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MMA("m16n8k8", "tf32");
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// What tf32 leaves of x. An infinite x is all in the first part: inf - inf would turn it into NaN.
__device__ __forceinline__ uint32_t tf32_rest(uint32_t x, uint32_t part) {
  const float value = __uint_as_float(x);
  return isinf(value) ? 0 : to_tf32(value - __uint_as_float(part));
}

// c += a * b for one 16 x 8 block.
template <typename T> struct Mma;
template <> struct Mma<__nv_bfloat16> {
  uint32_t a[4];
  __device__ __forceinline__ void set_a(const uint32_t (&x)[4]) {
    for (int i = 0; i < 4; i++) a[i] = x[i];
  }
  __device__ __forceinline__ void add(float (&c)[4], uint32_t b0, uint32_t b1) const { MMA("m16n8k16", "bf16"); }
};
template <> struct Mma<__half> {
  uint32_t a[4];
  __device__ __forceinline__ void set_a(const uint32_t (&x)[4]) {
    for (int i = 0; i < 4; i++) a[i] = x[i];
  }
  __device__ __forceinline__ void add(float (&c)[4], uint32_t b0, uint32_t b1) const { MMA("m16n8k16", "f16"); }
};
template <> struct Mma<float> {
  uint32_t large[4], rest[4];
  __device__ __forceinline__ void set_a(const uint32_t (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) large[i] = to_tf32(__uint_as_float(x[i])), rest[i] = tf32_rest(x[i], large[i]);
  }
  __device__ __forceinline__ void add(float (&c)[4], uint32_t x0, uint32_t x1) const {
    const uint32_t b0 = to_tf32(__uint_as_float(x0)), b1 = to_tf32(__uint_as_float(x1));
    const uint32_t r0 = tf32_rest(x0, b0), r1 = tf32_rest(x1, b1);
    // Tensor cores add with truncation, which over a long k is an error of its own: add to the sum outside.
    float part[4] = {0.f, 0.f, 0.f, 0.f};
    mma_tf32(part, rest, b0, b1);
    mma_tf32(part, large, r0, r1);
    mma_tf32(part, large, b0, b1);
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] += part[i];
  }
};
#undef MMA

// The accumulators of one thread. Block (m, n) of the warp's tile is acc[m][n]; within it the thread holds
// rows lane/4 and lane/4 + 8 (elements 0, 1 and 2, 3), columns 2 * (lane % 4) and the next.
template <int BN> struct Accumulators {
  static constexpr int BLOCKS_N = BN / 4 / 8;
  float acc[4][BLOCKS_N][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
      for (int n = 0; n < BLOCKS_N; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) acc[m][n][i] = 0.f;
  }
};

// Which part of the block's tile a thread's accumulators are.
struct Place {
  int lane, warp_m, warp_n;

  __device__ __forceinline__ Place() : lane(threadIdx.x & 31), warp_m((threadIdx.x >> 5) & 1), warp_n(threadIdx.x >> 6) {}
  __device__ __forceinline__ int row(int m, int half) const { return warp_m * 64 + m * 16 + half * 8 + (lane >> 2); }
  template <int BN> __device__ __forceinline__ int column(int n) const { return warp_n * (BN / 4) + n * 8 + (lane & 3) * 2; }
};

// A ring of stages in shared memory, filled STAGES - 1 steps ahead of the products.
template <typename T, int BN, Major A_MAJOR, Major B_MAJOR> struct Pipeline {
  static constexpr int A_BYTES = BM * BK_BYTES;
  static constexpr int STAGE_BYTES = A_BYTES + BN * BK_BYTES;
  static constexpr int BYTES = STAGES * STAGE_BYTES;

  uint32_t base;

  __device__ __forceinline__ uint32_t a_tile(int stage) const { return base + stage * STAGE_BYTES; }
  __device__ __forceinline__ uint32_t b_tile(int stage) const { return a_tile(stage) + A_BYTES; }

  // The operands of one step for the warp's tile.
  struct Operands {
    uint32_t rows[4][4], columns[BN / 4 / 16][4];

    __device__ __forceinline__ void load(uint32_t a, uint32_t b, int step, const Place &at) {
#pragma unroll
      for (int n = 0; n < BN / 4 / 16; n++)
        Fragments<T>::template load_b<B_MAJOR, BN>(columns[n], b, at.warp_n * (BN / 4) + n * 16, step, at.lane);
#pragma unroll
      for (int m = 0; m < 4; m++)
        Fragments<T>::template load_a<A_MAJOR, BM>(rows[m], a, at.warp_m * 64 + m * 16, step, at.lane);
    }

    __device__ __forceinline__ void multiply(Accumulators<BN> &sum) const {
#pragma unroll
      for (int m = 0; m < 4; m++) {
        Mma<T> mma;
        mma.set_a(rows[m]);
#pragma unroll
        for (int n = 0; n < BN / 4 / 16; n++) {
          mma.add(sum.acc[m][2 * n], columns[n][0], columns[n][1]);
          mma.add(sum.acc[m][2 * n + 1], columns[n][2], columns[n][3]);
        }
      }
    }
  };

  // Runs `blocks` steps of k. `load(block, a_tile, b_tile)` fills a stage; `after(block)` runs when the products of a
  // block are issued, and may read and clear the accumulators.
  //
  // The operands of a step are in registers before the step ahead of it multiplies. So that no barrier lies between
  // (the compiler moves products across it, and then they wait for their operands), a barrier vouches for two stages:
  // the one to multiply and the one after.
  template <class Load, class After>
  __device__ __forceinline__ void run(Accumulators<BN> &sum, int blocks, Load load, After after) const {
    if (blocks == 0) return;
    const Place at;
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) {
      if (i < blocks) load(i, a_tile(i), b_tile(i));
      cp_async_commit();
    }
    cp_async_wait<STAGES - 3>();
    __syncthreads();
    Operands first, second;
    first.load(a_tile(0), b_tile(0), 0, at);
    int stage = 0;
    for (int block = 0; block < blocks; block++) {
      const int before = stage == 0 ? STAGES - 1 : stage - 1, after_this = stage == STAGES - 1 ? 0 : stage + 1;
      second.load(a_tile(stage), b_tile(stage), 1, at);
      first.multiply(sum);
      // Past the last block this reads a stage that is never used.
      first.load(a_tile(after_this), b_tile(after_this), 0, at);
      second.multiply(sum);
      // The last reads of the stage before this one came before the last barrier.
      const int next = block + STAGES - 1;
      if (next < blocks) load(next, a_tile(before), b_tile(before));
      cp_async_commit();
      after(block);
      stage = after_this;
      cp_async_wait<STAGES - 3>();
      __syncthreads();
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

// A thread's share of a K-major operand: one chunk of each of COUNT rows.
template <typename T, int EXTENT> struct KMajorShare {
  static constexpr int APART = THREADS / (BK_BYTES / CHUNK);
  static constexpr int COUNT = EXTENT / APART;

  static __device__ __forceinline__ int row(int i) { return (threadIdx.x >> 2) + i * APART; }
  static __device__ __forceinline__ int column() { return (threadIdx.x & 3) * PER_CHUNK<T>; }

  // `row(i)` points at this thread's column in row i of the operand, at k = 0. The rows are `columns` long.
  template <bool ALIGNED, class Row>
  static __device__ __forceinline__ void load(uint32_t tile, Row row, int k, int columns, uint32_t valid) {
    // Rows 64 apart share a swizzle.
    load_chunks<T, COUNT, APART * BK_BYTES, ALIGNED>(
        tile + k_major_offset(threadIdx.x >> 2, threadIdx.x & 3), [&](int i) { return row(i) + k; },
        columns - k - column(), valid);
  }
};

// A thread's share of an MN-major operand: one chunk, at each of COUNT values of k.
template <typename T, int EXTENT> struct MNMajorShare {
  static constexpr int CHUNKS = EXTENT / PER_CHUNK<T>;
  static constexpr int APART = THREADS / CHUNKS;
  static constexpr int COUNT = BK<T> / APART;

  static __device__ __forceinline__ int k(int i) { return threadIdx.x / CHUNKS + i * APART; }
  static __device__ __forceinline__ int column() { return threadIdx.x % CHUNKS * PER_CHUNK<T>; }

  // `row(i)` points at this thread's column in the row of k(i); `left` is how many numbers follow there.
  template <bool ALIGNED, class Row>
  static __device__ __forceinline__ void load(uint32_t tile, Row row, int64_t left, uint32_t valid) {
    // k that are 8 apart or more share a swizzle.
    load_chunks<T, COUNT, APART * EXTENT * sizeof(T), ALIGNED>(
        tile + mn_major_offset<T, EXTENT>(k(0), threadIdx.x % CHUNKS), row, (int)min(left, (int64_t)PER_CHUNK<T>), valid);
  }
};

// This thread's share of the classes of a block, from the class `mine` on, at a step that begins at column k.
template <typename T, int BN, bool ALIGNED>
__device__ __forceinline__ void load_classes(uint32_t tile, const ClassifierParams &classifier, int64_t mine, int k, uint32_t valid) {
  using Share = KMajorShare<T, BN>;
  const ClassColumns<T> at(classifier, mine, k);
  const T *first = at.first + Share::column();
  const int64_t apart = Share::APART * at.apart;
  Share::template load<ALIGNED>(tile, [&](int i) { return first + i * apart; }, 0, (int)at.left, valid);
}
