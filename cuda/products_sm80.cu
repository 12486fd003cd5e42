// The two products of the backward over the kept tiles of a range of classes: dE += G C and dC = G^T E.
//
// A block owns one piece of the result and walks the kept tiles that reach it in order, so nothing is added by
// atomics and a run repeats exactly. Which tiles those are, it reads from `keep` and lists in shared memory.
#include "mainloop_sm80.cuh"

constexpr int MAX_LIST = 2048;  // tiles listed at a time

struct ProductParams {
  const void *gradient;           // (rows of this launch, range)
  const void *operand;            // classifier for dE, embeddings for dC
  const uint32_t *row_embedding;
  const uint32_t *count;
  const uint8_t *keep;            // (row tiles, class tiles), or null
  const float *scale;             // one number, on the result of dC
  void *result;                   // dE: (rows of this launch, hidden) f32; dC: (vocab, hidden), inputs' dtype
  int64_t hidden, vocab;
  int64_t first_class, range;
  uint32_t first_row, rows;       // of this launch
  uint32_t class_tiles;
  uint32_t accumulate;            // dE: add to the result
  uint32_t aligned;
};

template <typename T, int BN, Major A_MAJOR> struct ProductShared {
  using Loop = Pipeline<T, BN, A_MAJOR, MN_MAJOR>;
  uint8_t stages[Loop::BYTES];
  uint16_t list[MAX_LIST];
  uint32_t listed[THREADS / 32];
};

// Lists the kept ones of `tiles` tiles from `first` on. `kept(tile)` is asked once for each.
template <class Kept> __device__ __forceinline__ int list_kept(uint16_t *list, uint32_t *listed, int first, int tiles, Kept kept) {
  int total = 0;
  __syncthreads();
  for (int start = 0; start < tiles; start += THREADS) {
    const int tile = start + threadIdx.x;
    const bool mine = tile < tiles && kept(first + tile);
    const uint32_t ballot = __ballot_sync(0xffffffff, mine);
    if ((threadIdx.x & 31) == 0) listed[threadIdx.x / 32] = __popc(ballot);
    __syncthreads();
    int before = total;
    for (int w = 0; w < THREADS / 32; w++) {
      if (w < threadIdx.x / 32) before += listed[w];
      total += listed[w];
    }
    if (mine) list[before + __popc(ballot & ((1u << (threadIdx.x & 31)) - 1))] = (uint16_t)tile;
    __syncthreads();
  }
  return total;
}

// dE[row, column] (+)= sum over kept tiles of G[row, class] C[class, column]
template <typename T, int BN> __device__ __forceinline__ void embeddings_product(const ProductParams &p, ProductShared<T, BN, K_MAJOR> &shared) {
  using Loop = typename ProductShared<T, BN, K_MAJOR>::Loop;
  constexpr int PER_TILE = TILE / BK<T>;
  const uint32_t row_in_launch = blockIdx.y * BM, row0 = p.first_row + row_in_launch, count = *p.count;
  const int64_t column0 = (int64_t)blockIdx.x * BN;
  if (row0 >= count) return;
  const T *g = (const T *)p.gradient, *c = (const T *)p.operand;
  const int64_t classes = min(p.range, p.vocab - p.first_class);
  const int tiles = (int)((classes + TILE - 1) / TILE);

  KMajorLoader<T, BM> a;
#pragma unroll
  for (int i = 0; i < a.PER_THREAD; i++) a.rows[i] = g + (int64_t)(row_in_launch + a.row(i)) * p.range;

  Accumulators<BN> sum;
  sum.clear();
  const Loop loop{shared_address(shared.stages)};
  for (int start = 0; start < tiles; start += MAX_LIST) {
    const uint8_t *keep = p.keep + (p.keep ? (int64_t)(row0 / TILE) * p.class_tiles + p.first_class / TILE + start : 0);
    const int listed = list_kept(shared.list, shared.listed, 0, min(MAX_LIST, tiles - start),
                                 [&](int tile) { return !p.keep || (keep[tile] & KEEP_FOR_EMBEDDINGS); });
    loop.run(
        sum, listed * PER_TILE,
        [&](int block, uint32_t a_tile, uint32_t b_tile) {
          const int64_t k0 = (int64_t)(start + shared.list[block / PER_TILE]) * TILE + block % PER_TILE * BK<T>;
          a.load(a_tile, (int)(k0 / BK<T>), p.range, true, g);
          MNMajorLoader<T, BN>::load(b_tile, column0, p.hidden, p.aligned, c, [&](int k) {
            return k0 + k < classes ? c + (p.first_class + k0 + k) * p.hidden : nullptr;
          });
        },
        [](int) {});
  }

  const Place at;
  float *result = (float *)p.result;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const uint32_t row = row_in_launch + at.row(i >> 1, i & 1);
    if (p.first_row + row >= count) continue;
#pragma unroll
    for (int n = 0; n < Accumulators<BN>::BLOCKS_N; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int64_t column = column0 + at.template column<BN>(n) + j;
        if (column >= p.hidden) continue;
        float &into = result[row * p.hidden + column];
        const float value = sum.acc[i >> 1][n][(i & 1) * 2 + j];
        into = p.accumulate ? into + value : value;
      }
    }
  }
}

// dC[class, column] = scale * sum over kept tiles of G[row, class] E[row, column]
template <typename T, int BN> __device__ __forceinline__ void classifier_product(const ProductParams &p, ProductShared<T, BN, MN_MAJOR> &shared) {
  using Loop = typename ProductShared<T, BN, MN_MAJOR>::Loop;
  constexpr int PER_TILE = TILE / BK<T>;
  const int64_t class_in_range = (int64_t)blockIdx.y * BM, class0 = p.first_class + class_in_range;
  const int64_t column0 = (int64_t)blockIdx.x * BN;
  if (class0 >= p.vocab) return;
  const uint32_t count = min(*p.count, p.rows);
  const T *g = (const T *)p.gradient, *e = (const T *)p.operand;
  const int tiles = (count + TILE - 1) / TILE;

  Accumulators<BN> sum;
  sum.clear();
  const Loop loop{shared_address(shared.stages)};
  for (int start = 0; start < tiles; start += MAX_LIST) {
    const int listed = list_kept(shared.list, shared.listed, start, min(MAX_LIST, tiles - start), [&](int tile) {
      return !p.keep || (p.keep[(int64_t)tile * p.class_tiles + class0 / TILE] & KEEP_FOR_CLASSIFIER);
    });
    loop.run(
        sum, listed * PER_TILE,
        [&](int block, uint32_t a_tile, uint32_t b_tile) {
          const uint32_t k0 = (start + shared.list[block / PER_TILE]) * TILE + block % PER_TILE * BK<T>;
          MNMajorLoader<T, BM>::load(a_tile, class_in_range, p.range, true, g,
                                     [&](int k) { return g + (int64_t)(k0 + k) * p.range; });
          MNMajorLoader<T, BN>::load(b_tile, column0, p.hidden, p.aligned, e, [&](int k) {
            return k0 + k < count ? e + p.row_embedding[k0 + k] * p.hidden : nullptr;
          });
        },
        [](int) {});
  }

  const Place at;
  T *result = (T *)p.result;
  const float scale = *p.scale;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t row = class0 + at.row(i >> 1, i & 1);
    if (row >= p.vocab) continue;
#pragma unroll
    for (int n = 0; n < Accumulators<BN>::BLOCKS_N; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int64_t column = column0 + at.template column<BN>(n) + j;
        if (column < p.hidden) result[row * p.hidden + column] = from_float<T>(scale * sum.acc[i >> 1][n][(i & 1) * 2 + j]);
      }
    }
  }
}

#define PRODUCTS(SUFFIX, T, BN)                                                                                       \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) embeddings_product_sm80_##SUFFIX(const ProductParams p) {  \
    extern __shared__ __align__(128) uint8_t memory[];                                                                \
    embeddings_product<T, BN>(p, *reinterpret_cast<ProductShared<T, BN, K_MAJOR> *>(memory));                         \
  }                                                                                                                   \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) classifier_product_sm80_##SUFFIX(const ProductParams p) {  \
    extern __shared__ __align__(128) uint8_t memory[];                                                                \
    classifier_product<T, BN>(p, *reinterpret_cast<ProductShared<T, BN, MN_MAJOR> *>(memory));                        \
  }

PRODUCTS(bf16, __nv_bfloat16, 256)
PRODUCTS(f16, __half, 256)
PRODUCTS(f32, float, 128)
