// What Hopper's kernels of attention share: tiles of a head in shared memory, the two products that everything is made
// of, rings of slots that the copy engine fills, and the order of the work.
//
// A group of warps has 64 rows of a stationary tile (queries, or keys in the kernel for the keys' gradients) and goes
// through tiles of the others. As in the portable kernels the scores never leave the registers: the accumulators of one
// product, rounded, are the left operand of the next.
#pragma once
#include "attention_problem.cuh"
#include "hopper.cuh"

namespace hopper {

constexpr int STATISTICS_ROWS = 128;  // what rows of statistics are rounded up to

// ---------------------------------------------------------------------------------------------------------
// Tiles
// ---------------------------------------------------------------------------------------------------------

// ROWS positions of a head of SIZE dimensions: 64 columns after 64 columns, each as ROWS swizzled rows of 128 bytes. So
// the copy engine's boxes of 64 x 64 are stacked, and a product can go along rows or columns.
template <int ROWS, int SIZE>
struct HeadTile {
  static constexpr int BYTES = ROWS * SIZE * 2;
  static constexpr int COLUMNS_BYTES = ROWS * BOX * 2;  // of 64 columns

  static __device__ __forceinline__ void copy(uint32_t to, const TensorMap* map, int time, int head, int batch,
                                              uint32_t barrier) {
#pragma unroll
    for (int column = 0; column < SIZE; column += BOX)
#pragma unroll
      for (int row = 0; row < ROWS; row += BOX)
        copy_box_of_head(to + column / BOX * COLUMNS_BYTES + row * BOX * 2, map, column, time + row, head, batch, barrier);
  }
};

// sum (64 x N) = A B^T: 64 rows of a tile of ROWS rows by all N rows of another.
template <typename T, int SIZE, int ROWS, int N>
__device__ __forceinline__ void multiply_rows(float (&sum)[N / 2], uint32_t a, uint32_t b) {
  const uint64_t left = operand<false>(a), right = operand<false>(b);
  wgmma<T, N, false, false, false>(sum, left, right);
#pragma unroll
  for (int k = 1; k < SIZE / 16; ++k) {
    const uint64_t inside = k % 4 * NEXT_K16<false>;
    wgmma<T, N, false, false, true>(sum, left + k / 4 * (HeadTile<ROWS, SIZE>::COLUMNS_BYTES / 16) + inside,
                                    right + k / 4 * (HeadTile<N, SIZE>::COLUMNS_BYTES / 16) + inside);
  }
}

// sum (64 x SIZE) += P B: P (64 x N) in registers by a tile of N rows.
template <typename T, int SIZE, int N>
__device__ __forceinline__ void multiply_columns(float (&sum)[SIZE / 2], const uint32_t (&p)[N / 4], uint32_t b) {
  const uint64_t right = operand<true, HeadTile<N, SIZE>::COLUMNS_BYTES>(b);
#pragma unroll
  for (int k = 0; k < N / 16; ++k) wgmma_registers<T, SIZE, true>(sum, p + 4 * k, right + k * NEXT_K16<true>);
}

// Tells the compiler that a product is done.
template <int N>
__device__ __forceinline__ void settle(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(sum[i])::"memory");
}

template <int N>
__device__ __forceinline__ void clear(float (&sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0.0f;
}

template <typename T, int N>
__device__ __forceinline__ void round_pairs(uint32_t (&to)[N / 2], const float (&from)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) to[i] = pack<T>(from[2 * i], from[2 * i + 1]);
}

// Row and column, in a group's 64 rows, of accumulator 0 of this thread. Accumulator 4 j + 2 half + e is 8 half rows
// below and 8 j + e columns to the right.
__device__ __forceinline__ int thread_row() { return threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4; }
__device__ __forceinline__ int thread_column() { return threadIdx.x % 4 * 2; }

// Writes a group's accumulators, the rows of each half by a factor, to rows `stride` numbers apart, of which `rows` exist,
// and of those `columns` numbers.
template <typename T, int N>
__device__ __forceinline__ void store_rows(const float (&sum)[N], const float (&factor)[2], T* to, int64_t stride, int rows,
                                           int columns) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = thread_row() + 8 * half;
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = sum + 4 * (j + i) + 2 * half;
        word[i] = pack<T>(pair[0] * factor[half], pair[1] * factor[half]);
      }
      const uint4 chunk = collect_chunk(word[0], word[1], word[2], word[3]);
      const int column = 8 * (j + threadIdx.x % 4);
      if (row < rows && column < columns) *reinterpret_cast<uint4*>(to + row * stride + column) = chunk;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------
// Scores
// ---------------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void soften(float (&scores)[N], float factor) {
#pragma unroll
  for (int i = 0; i < N; ++i) scores[i] = fast_tanh(scores[i] * factor);
}

// The keys that a query sees, from `first` to before `end`.
struct Span {
  int first, end;

  __device__ __forceinline__ Span(const Sight& sight, int query) : first(0), end(sight.keys) {
    if (!sight.causal) return;
    const int position = query + sight.offset;
    first = position - (int)(sight.window - 1);
    end = min(end, position + 1);
  }
};

// Takes away what a group does not see: queries are rows from `query` on and keys columns from `key` on.
template <int N>
__device__ __forceinline__ void mask_keys(float (&scores)[N], const Sight& sight, int query, int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Span span(sight, query + thread_row() + 8 * half);
    const int first = span.first - key - thread_column(), end = span.end - key - thread_column();
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int column = 8 * j + e;
        if (column < first || column >= end) scores[4 * j + 2 * half + e] = MASKED;
      }
  }
}

// The same where keys are rows and queries columns.
template <int N>
__device__ __forceinline__ void mask_queries(float (&scores)[N], const Sight& sight, int key, int query) {
  if (!sight.causal) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Column c is as far behind the key as `behind` says of column 0, and c more.
    const int behind = query + thread_column() + sight.offset - (key + thread_row() + 8 * half);
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (static_cast<uint32_t>(behind + 8 * j + e) >= sight.window) scores[4 * j + 2 * half + e] = MASKED;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Rings
// ---------------------------------------------------------------------------------------------------------

// What the copy engine brings, slot after slot, and every group reads.
template <int BYTES, int SLOTS>
struct Slots {
  static constexpr int COUNT = SLOTS;
  struct alignas(1024) Slot {
    uint8_t bytes[BYTES];
  };
  Slot slot[SLOTS];
  uint64_t full[SLOTS], empty[SLOTS];

  __device__ void init(int groups) {
    for (int i = 0; i < SLOTS; ++i) {
      barrier_init(shared_address(&full[i]), 1);
      barrier_init(shared_address(&empty[i]), groups * GROUP);
    }
  }
};

// The slot that one side, the copying thread or a group, comes to next.
template <class S>
struct Place {
  uint32_t base;
  Cursor<S::COUNT> at;

  __device__ __forceinline__ explicit Place(const S& slots) : base(uniform(shared_address(&slots))) {}
  __device__ __forceinline__ uint32_t slot() const { return base + at.stage * sizeof(typename S::Slot); }
  __device__ __forceinline__ uint32_t full() const { return base + offsetof(S, full) + at.stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return base + offsetof(S, empty) + at.stage * 8; }

  // The copying thread's: once the groups are done with the slot, `bytes` come.
  __device__ __forceinline__ void claim(uint32_t bytes) const {
    barrier_wait(empty(), at.round ^ 1);
    barrier_expect(full(), bytes);
  }
  // A group's: the slot is full; the slot is read.
  __device__ __forceinline__ void wait() const { barrier_wait(full(), at.round); }
  __device__ __forceinline__ void release() const { release(empty()); }
  static __device__ __forceinline__ void release(uint32_t empty) {
    // Every thread for itself: threads read parts of a slot without the tensor cores.
    __syncwarp();
    barrier_arrive(empty);
  }
};

// ---------------------------------------------------------------------------------------------------------
// The order of the work
// ---------------------------------------------------------------------------------------------------------

// Items in order of falling size are dealt to the blocks there and back, so that all get about the same.
__device__ __forceinline__ uint32_t dealt(uint32_t n) {
  return n * gridDim.x + (n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

// A tile of queries of a head. The last queries see the most keys: they come first.
struct QueryItem {
  Head head;
  int query, queries;

  static __device__ __forceinline__ uint32_t count(const AttentionParams& p, int rows) {
    return (p.queries + rows - 1) / rows * p.batch * p.heads;
  }
  __device__ __forceinline__ QueryItem(const AttentionParams& p, int rows, uint32_t index) {
    const uint32_t heads = p.batch * p.heads, of_heads = index % heads;
    head = {of_heads / p.heads, of_heads % p.heads};
    query = ((p.queries + rows - 1) / rows - 1 - index / heads) * rows;
    queries = min(rows, (int)p.queries - query);
  }
};

// A tile of keys of a head of keys. With a mask the first keys are seen by the most queries.
struct KeyItem {
  Head head;
  int key, keys;

  static __device__ __forceinline__ uint32_t count(const AttentionParams& p, int rows) {
    return (p.keys + rows - 1) / rows * p.batch * (p.heads / p.group);
  }
  __device__ __forceinline__ KeyItem(const AttentionParams& p, int rows, uint32_t index) {
    const uint32_t key_heads = p.heads / p.group, heads = p.batch * key_heads, of_heads = index % heads;
    head = {of_heads / key_heads, of_heads % key_heads};
    key = index / heads * rows;
    keys = min(rows, (int)p.keys - key);
  }
};

// Offset of a head in the padded statistics.
__device__ __forceinline__ int64_t statistics_rows(const AttentionParams& p) {
  return (p.queries + STATISTICS_ROWS - 1) / STATISTICS_ROWS * STATISTICS_ROWS;
}
__device__ __forceinline__ int64_t statistics_of(const AttentionParams& p, const Head& head) {
  return ((int64_t)head.batch * p.heads + head.head) * statistics_rows(p);
}

}  // namespace hopper
