// What the portable kernels of attention share: tiles in shared memory, and the two products that everything is made of.
//
// A warp has M blocks of 16 rows of a stationary tile (queries, or keys in the kernel for the keys' gradients) and goes
// through the columns (keys, or queries) in tiles of N. The scores never leave the registers: the accumulators of one
// product are the left operand of the next.
#pragma once
#include "attention_problem.cuh"
#include "mainloop_sm80.cuh"

// 2^x: 2 ulp, 0 for -inf.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---------------------------------------------------------------- tiles

// Rows of SIZE numbers, each a multiple of 128 bytes long, in 16-byte chunks that are swizzled so that 8 rows of one
// column of chunks lie in different banks.
template <typename T, int SIZE> struct Tile {
  static constexpr int ROW_BYTES = (SIZE * (int)sizeof(T) + 127) / 128 * 128;

  static __device__ __forceinline__ uint32_t offset(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (row & 7)) * CHUNK);
  }

  // Starts to copy ROWS rows, `stride` numbers apart, of which `rows` exist and have `columns` numbers. Zeros elsewhere.
  template <int ROWS, int THREADS_>
  static __device__ __forceinline__ void load(uint32_t tile, const T *from, int64_t stride, int rows, int columns) {
    constexpr int CHUNKS = SIZE / PER_CHUNK<T>;
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS_) {
      const int row = i / CHUNKS, chunk = i % CHUNKS;
      const bool exists = row < rows && chunk * PER_CHUNK<T> < columns;
      cp_async_16(tile + offset(row, chunk), exists ? from + row * stride + chunk * PER_CHUNK<T> : from, exists);
    }
  }
};

// ---------------------------------------------------------------- products

template <int M, int BLOCKS> __device__ __forceinline__ void clear(float (&sum)[M][BLOCKS][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[m][n][i] = 0.f;
}

// sum = A B^T: 16 M rows of A from `row` on by all 8 BLOCKS rows of B.
template <typename T, int SIZE, int M, int BLOCKS>
__device__ __forceinline__ void multiply_rows(float (&sum)[M][BLOCKS][4], uint32_t a, int row, uint32_t b) {
  const int lane = threadIdx.x & 31;
  clear(sum);
// The three products of an f32 number take registers that more steps at once would spill.
#pragma unroll(sizeof(T) == 4 ? 2 : 16)
  for (int step = 0; step < SIZE * (int)sizeof(T) / 32; step++) {
    Mma<T> left[M];
#pragma unroll
    for (int m = 0; m < M; m++) {
      uint32_t x[4];
      ldmatrix_x4(x, a + Tile<T, SIZE>::offset(row + m * 16 + (lane & 15), step * 2 + (lane >> 4)));
      left[m].set_a(x);
    }
#pragma unroll
    for (int n = 0; n < BLOCKS / 2; n++) {
      uint32_t y[4];
      ldmatrix_x4(y, b + Tile<T, SIZE>::offset(n * 16 + (lane & 7) + (lane >> 4) * 8, step * 2 + ((lane >> 3) & 1)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        left[m].add(sum[m][2 * n], y[0], y[1]);
        left[m].add(sum[m][2 * n + 1], y[2], y[3]);
      }
    }
  }
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t *>(&pair);
}

// sum += P B: P as accumulators hold it, rounded to T, by the columns of B from `column` on, of which there are 8 WIDE.
template <typename T, int SIZE, int M, int BLOCKS, int WIDE>
__device__ __forceinline__ void multiply_columns(float (&sum)[M][WIDE][4], const float (&p)[M][BLOCKS][4], uint32_t b, int column) {
  const int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int step = 0; step < BLOCKS / 2; step++) {
      Mma<T> left[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        const auto &low = p[m][2 * step], &high = p[m][2 * step + 1];
        const uint32_t x[4] = {pack(low[0], low[1], T()), pack(low[2], low[3], T()), pack(high[0], high[1], T()),
                               pack(high[2], high[3], T())};
        left[m].set_a(x);
      }
#pragma unroll
      for (int n = 0; n < WIDE / 2; n++) {
        uint32_t y[4];
        ldmatrix_x4_trans(y, b + Tile<T, SIZE>::offset(step * 16 + (lane & 15), column / 8 + n * 2 + (lane >> 4)));
#pragma unroll
        for (int m = 0; m < M; m++) {
          left[m].add(sum[m][2 * n], y[0], y[1]);
          left[m].add(sum[m][2 * n + 1], y[2], y[3]);
        }
      }
    }
  } else {
    // An accumulator holds columns 2t and 2t + 1 where the left operand wants t and t + 4. The order along k is free:
    // the right operand is read in the order of the left one.
    const int k = (lane & 3) * 2, n0 = lane >> 2;
#pragma unroll
    for (int step = 0; step < BLOCKS; step++) {
      Mma<T> left[M];
#pragma unroll
      for (int m = 0; m < M; m++) {
        const auto &block = p[m][step];
        const uint32_t x[4] = {__float_as_uint(block[0]), __float_as_uint(block[2]), __float_as_uint(block[1]),
                               __float_as_uint(block[3])};
        left[m].set_a(x);
      }
#pragma unroll
      for (int n = 0; n < WIDE; n++) {
        const int at = column + n * 8 + n0;
        const uint32_t y0 = load_shared(b + Tile<T, SIZE>::offset(step * 8 + k, at / 4) + at % 4 * 4);
        const uint32_t y1 = load_shared(b + Tile<T, SIZE>::offset(step * 8 + k + 1, at / 4) + at % 4 * 4);
#pragma unroll
        for (int m = 0; m < M; m++) left[m].add(sum[m][n], y0, y1);
      }
    }
  }
}

// Shared memory of a kernel at each head size.
template <template <typename, int> class Sizes, typename T> constexpr bool bytes_are(int a, int b, int c, int d) {
  return Sizes<T, 64>::BYTES == a && Sizes<T, 96>::BYTES == b && Sizes<T, 128>::BYTES == c && Sizes<T, 256>::BYTES == d;
}

// Number i of an accumulator block: its row and column within the block.
__device__ __forceinline__ int row_of(int i) { return ((threadIdx.x & 31) >> 2) + (i >> 1) * 8; }
__device__ __forceinline__ int column_of(int i) { return (threadIdx.x & 3) * 2 + (i & 1); }

// The tanh of each product, `factor` times.
template <int M, int BLOCKS> __device__ __forceinline__ void soften(float (&scores)[M][BLOCKS][4], float factor) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) scores[m][n][i] = fast_tanh(scores[m][n][i] * factor);
}

// Takes away what is not seen.
template <int M, int BLOCKS, class Seen> __device__ __forceinline__ void mask(float (&scores)[M][BLOCKS][4], Seen seen) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (!seen(m, n, i)) scores[m][n][i] = MASKED;
}

// Writes 16 M rows of accumulators, `factor` times, to rows `stride` numbers apart, of which `rows` exist, and of those
// the columns before `columns`; the first column of the accumulators is `column`.
template <typename T, int M, int WIDE>
__device__ __forceinline__ void store(const float (&sum)[M][WIDE][4], float factor, T *to, int64_t stride, int rows, int column,
                                      int columns) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const int row = m * 16 + row_of(i);
      if (row >= rows) continue;
#pragma unroll
      for (int n = 0; n < WIDE; n++) {
        const int at = column + n * 8 + column_of(0);
        if (at >= columns) continue;
        // head_dim is even.
        struct alignas(2 * sizeof(T)) Pair { T first, second; };
        *reinterpret_cast<Pair *>(to + row * stride + at) = {from_float<T>(sum[m][n][i] * factor), from_float<T>(sum[m][n][i + 1] * factor)};
      }
    }
}
