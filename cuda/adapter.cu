// The gradient of a classifier's low-rank adapter, dB = G^T U: a product of few columns, so that reading G is what takes
// time. U are the last columns of the embeddings.
//
// A block owns 128 classes and 16 or 64 columns, and walks the rows in order: a run repeats exactly. A warp has 16 classes and
// all of the columns, so that each number of G is read from shared memory once.
#include "mainloop_sm80.cuh"

struct AdapterParams {
  const void *gradient;           // (rows of this launch, gradient_stride), column 0 of which is first_class
  const void *embeddings;         // the adapter's columns, of rows embeddings_stride apart
  const uint32_t *row_embedding;  // of a row, or null: they lie in order from first_row on
  const uint32_t *count;
  const float *scale;             // one number, on the result, or null: 1
  const uint32_t *slots;          // (vocab) 1 + the row of target_rows to add, 0 for none; or null: none at all
  const float *target_rows;       // (slots, rank)
  void *result;                   // (vocab, rank)
  float *sums;                    // (vocab, rank) what several chunks of rows leave for the next, or null
  int64_t gradient_stride, embeddings_stride;
  int64_t vocab, first_class;
  uint32_t first_row, rows;       // of this launch
  uint32_t rank;                  // a multiple of 8
  uint32_t overwrite;             // 1 for the first chunk of rows, 0: add to `sums`
  uint32_t last;                  // 1 for the last chunk of rows, which rounds to T
};

constexpr int EXTENT = 64;  // columns of U in a stage
// Stages that the tensor cores sum before f32 does: they cut off a sum's last digits.
constexpr int PIECE = 32;

template <typename T> struct AdapterShared {
  alignas(128) uint8_t gradient[STAGES][BM * BK_BYTES];
  alignas(128) uint8_t inner[STAGES][EXTENT * BK_BYTES];
};

template <typename T, int N> __device__ __forceinline__ void adapter_product(const AdapterParams &p) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto &shared = *reinterpret_cast<AdapterShared<T> *>(memory);
  using Classes = MNMajorShare<T, BM>;
  using Columns = MNMajorShare<T, EXTENT>;
  constexpr int BLOCKS = N / 8;
  const int64_t class_in_range = (int64_t)blockIdx.x * BM, class0 = p.first_class + class_in_range;
  if (class0 >= p.vocab) return;
  const int column0 = blockIdx.y * EXTENT, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t all = *p.count, rows = all > p.first_row ? min(all - p.first_row, p.rows) : 0;
  const int blocks = (rows + BK<T> - 1) / BK<T>;

  // Tiles of G are written to their end: classes past the last are zeros, and so are rows.
  const T *g = (const T *)p.gradient + class_in_range + Classes::column();
  const T *u = (const T *)p.embeddings + column0 + Columns::column();
  const int64_t left = (int64_t)p.rank - column0 - Columns::column();
  const auto load = [&](int block) {
    const int stage = block % STAGES;
    const uint32_t row0 = block * BK<T>;
    Classes::template load<true>(
        shared_address(shared.gradient[stage]),
        [&](int i) { return g + (int64_t)(row0 + Classes::k(i)) * p.gradient_stride; }, PER_CHUNK<T>, ~0u);
    Columns::template load<true>(
        shared_address(shared.inner[stage]),
        [&](int i) {
          const uint32_t row = min(row0 + Columns::k(i), rows - 1);
          return u + (p.row_embedding ? p.row_embedding[p.first_row + row] : row) * p.embeddings_stride;
        },
        left, existing<Columns::COUNT, Columns::APART>((int64_t)rows - row0 - Columns::k(0)));
  };

  float sum[BLOCKS][4] = {}, part[BLOCKS][4] = {};
  const auto add_part = [&] {
#pragma unroll
    for (int n = 0; n < BLOCKS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum[n][i] += part[n][i], part[n][i] = 0.f;
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (i < blocks) load(i);
    cp_async_commit();
  }
  for (int block = 0; block < blocks; block++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    // Everyone has multiplied the stage before this one, which is filled again.
    if (block + STAGES - 1 < blocks) load(block + STAGES - 1);
    cp_async_commit();
    const uint32_t classes = shared_address(shared.gradient[block % STAGES]);
    const uint32_t columns = shared_address(shared.inner[block % STAGES]);
#pragma unroll
    for (int step = 0; step < 2; step++) {
      uint32_t a[4];
      Fragments<T>::template load_a<MN_MAJOR, BM>(a, classes, warp * 16, step, lane);
      Mma<T> mma;
      mma.set_a(a);
#pragma unroll
      for (int n = 0; n < BLOCKS; n += 2) {
        uint32_t b[4];
        Fragments<T>::template load_b<MN_MAJOR, EXTENT>(b, columns, n * 8, step, lane);
        mma.add(part[n], b[0], b[1]);
        mma.add(part[n + 1], b[2], b[3]);
      }
    }
    if (block % PIECE == PIECE - 1) add_part();
  }
  add_part();

  T *result = (T *)p.result;
  const float scale = p.scale ? *p.scale : 1.f;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = class0 + warp * 16 + half * 8 + lane / 4;
    if (at >= p.vocab) continue;
    const uint32_t slot = p.slots ? p.slots[at] : 0;
    const float *of_target = slot ? p.target_rows + (int64_t)(slot - 1) * p.rank : nullptr;
#pragma unroll
    for (int n = 0; n < BLOCKS; n++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const int column = column0 + n * 8 + lane % 4 * 2 + j;
        if (column >= (int)p.rank) continue;
        const int64_t to = at * p.rank + column;
        const float was = (p.overwrite ? 0.f : p.sums[to]) + (of_target ? of_target[column] : 0.f);
        const float now = fmaf(scale, sum[n][half * 2 + j], was);
        if (p.last)
          result[to] = from_float<T>(now);
        else
          p.sums[to] = now;
      }
    }
  }
}

#define ADAPTER(SUFFIX, T)                                                                                 \
  extern "C" __global__ void __launch_bounds__(THREADS) adapter_product_16_##SUFFIX(const AdapterParams p) { \
    adapter_product<T, 16>(p);                                                                             \
  }                                                                                                        \
  extern "C" __global__ void __launch_bounds__(THREADS) adapter_product_64_##SUFFIX(const AdapterParams p) { \
    adapter_product<T, 64>(p);                                                                             \
  }

ADAPTER(bf16, __nv_bfloat16)
ADAPTER(f16, __half)
ADAPTER(f32, float)

static_assert(sizeof(AdapterShared<float>) == 48 << 10, "the host asks for as much shared memory");
