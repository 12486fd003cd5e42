// The two products of the backward over the kept tiles of a range of classes: dE += G C and dC = G^T E.
//
// A block owns one piece of the result and walks the kept tiles that reach it in order, so nothing is added by
// atomics and a run repeats exactly. Which tiles those are, it reads from `keep` and lists in shared memory.
#include "mainloop_sm80.cuh"

constexpr int MAX_LIST = 1024;  // tiles listed at a time: with the stages, within the 99 KB of consumer GPUs

struct ProductParams {
  const void *gradient;           // (rows of this launch, range)
  ClassifierParams classifier;    // for dE
  const void *embeddings;         // for dC
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
  // dC, what tiles that are not kept leave in each class (see filter.cu), before `scale`; or null: nothing.
  const float *shares;            // (vocab)
  const void *mass_rows;          // (class tiles, hidden): shared out among the tile's classes
  const uint2 *list;              // (vocab) TargetRow of filter.cu, or null: no targets
  const void *combined;           // (rows / 2, hidden): sums of rows with the same target
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
template <typename T, int BN, bool ALIGNED> __device__ __forceinline__ void embeddings_product(const ProductParams &p, ProductShared<T, BN, K_MAJOR> &shared) {
  using Loop = typename ProductShared<T, BN, K_MAJOR>::Loop;
  constexpr int PER_TILE = TILE / BK<T>;
  const uint32_t row_in_launch = blockIdx.y * BM, row0 = p.first_row + row_in_launch, count = *p.count;
  const int64_t column0 = (int64_t)blockIdx.x * BN;
  if (row0 >= count) return;
  const T *g = (const T *)p.gradient;
  const int64_t classes = min(p.range, p.vocab - p.first_class);
  const int tiles = (int)((classes + TILE - 1) / TILE);

  using Rows = KMajorShare<T, BM>;
  using Classes = MNMajorShare<T, BN>;
  const T *rows = g + (int64_t)(row_in_launch + Rows::row(0)) * p.range + Rows::column();
  const ClassColumns<T> columns(p.classifier, p.first_class + Classes::k(0), column0 + Classes::column());

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
          const int k0 = (start + shared.list[block / PER_TILE]) * TILE + block % PER_TILE * BK<T>;
          Rows::template load<true>(a_tile, [&](int i) { return rows + (int64_t)i * Rows::APART * p.range; }, k0, (int)p.range, ~0u);
          const T *here = columns.first + k0 * columns.apart;
          Classes::template load<ALIGNED>(b_tile, [&](int i) { return here + i * Classes::APART * columns.apart; }, columns.left,
                        existing<Classes::COUNT, Classes::APART>(classes - k0 - Classes::k(0)));
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

// dC of tiles that are not kept: the classes' shares of the masses, and the entries of targets.
template <typename T, int BN> __device__ __forceinline__ void add_averages(Accumulators<BN> &sum, const ProductParams &p, const Place &at, int64_t class0, int64_t column0) {
  const T *masses = (const T *)p.mass_rows + class0 / TILE * p.hidden, *e = (const T *)p.embeddings;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int64_t row = class0 + at.row(i >> 1, i & 1);
    if (row >= p.vocab) continue;
    const auto add = [&](float factor, const T *from) {
#pragma unroll
      for (int n = 0; n < Accumulators<BN>::BLOCKS_N; n++) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int64_t column = column0 + at.template column<BN>(n) + j;
          if (column < p.hidden) sum.acc[i >> 1][n][(i & 1) * 2 + j] += factor * to_float(from[column]);
        }
      }
    };
    add(p.shares[row], masses);
    const uint2 listed = p.list ? p.list[row] : make_uint2(0, 0);
    if (!listed.x) continue;
    const uint32_t of = (listed.x & 0x7fffffff) - 1;
    const T *combined = (const T *)p.combined;
    add(__uint_as_float(listed.y), listed.x >> 31 ? combined + (int64_t)of * p.hidden : e + p.row_embedding[of] * p.hidden);
  }
}

// dC[class, column] = scale * sum over kept tiles of G[row, class] E[row, column]
template <typename T, int BN, bool ALIGNED> __device__ __forceinline__ void classifier_product(const ProductParams &p, ProductShared<T, BN, MN_MAJOR> &shared) {
  using Loop = typename ProductShared<T, BN, MN_MAJOR>::Loop;
  constexpr int PER_TILE = TILE / BK<T>;
  const int64_t class_in_range = (int64_t)blockIdx.y * BM, class0 = p.first_class + class_in_range;
  const int64_t column0 = (int64_t)blockIdx.x * BN;
  if (class0 >= p.vocab) return;
  const uint32_t count = min(*p.count, p.rows);
  const T *g = (const T *)p.gradient, *e = (const T *)p.embeddings;
  const int tiles = (count + TILE - 1) / TILE;

  using Rows = MNMajorShare<T, BM>;
  using Columns = MNMajorShare<T, BN>;
  const T *rows = g + Rows::k(0) * p.range + class_in_range + Rows::column();
  const T *columns = e + column0 + Columns::column();
  const int64_t left = p.hidden - column0 - Columns::column();

  Accumulators<BN> sum;
  sum.clear();
  const Loop loop{shared_address(shared.stages)};
  for (int start = 0; start < tiles; start += MAX_LIST) {
    const int listed = list_kept(shared.list, shared.listed, start, min(MAX_LIST, tiles - start), [&](int tile) {
      return !p.keep || (p.keep[(int64_t)tile * p.class_tiles + class0 / TILE] & KEEP_FOR_CLASSIFIER);
    });
    // Where the rows of a step lie is looked up a step ahead, so that its loads need not wait for it.
    const int blocks = listed * PER_TILE;
    const auto first_k = [&](int block) { return (start + shared.list[block / PER_TILE]) * TILE + block % PER_TILE * BK<T>; };
    uint32_t index[Columns::COUNT];
    const auto look_up = [&](int block) {
#pragma unroll
      for (int i = 0; i < Columns::COUNT; i++) index[i] = p.row_embedding[min(first_k(block) + Columns::k(i), count - 1)];
    };
    if (blocks > 0) look_up(0);
    loop.run(
        sum, blocks,
        [&](int block, uint32_t a_tile, uint32_t b_tile) {
          const int k0 = first_k(block);
          const T *here = rows + k0 * p.range;
          Rows::template load<true>(a_tile, [&](int i) { return here + i * Rows::APART * p.range; }, TILE, ~0u);
          Columns::template load<ALIGNED>(b_tile, [&](int i) { return columns + index[i] * p.hidden; }, left,
                                          existing<Columns::COUNT, Columns::APART>((int64_t)count - k0 - Columns::k(0)));
          if (block + 1 < blocks) look_up(block + 1);
        },
        [](int) {});
  }

  const Place at;
  if (p.shares) add_averages<T, BN>(sum, p, at, class0, column0);
  T *result = (T *)p.result;
  const float scale = p.scale ? *p.scale : 1.f;
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

#define PRODUCT(NAME, FUNCTION, T, BN, A_MAJOR)                                             \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(const ProductParams p) {   \
    extern __shared__ __align__(128) uint8_t memory[];                                     \
    auto &shared = *reinterpret_cast<ProductShared<T, BN, A_MAJOR> *>(memory);             \
    if (p.aligned)                                                                         \
      FUNCTION<T, BN, true>(p, shared);                                                    \
    else                                                                                   \
      FUNCTION<T, BN, false>(p, shared);                                                   \
  }
#define PRODUCTS(SUFFIX, T, BN)                                                             \
  PRODUCT(embeddings_product_sm80_##SUFFIX, embeddings_product, T, BN, K_MAJOR)            \
  PRODUCT(classifier_product_sm80_##SUFFIX, classifier_product, T, BN, MN_MAJOR)

PRODUCTS(bf16, __nv_bfloat16, 256)
PRODUCTS(f16, __half, 256)
PRODUCTS(f32, float, 128)
