// Logits of chosen classes and their gradients: rows of one matrix, gathered, and rows of the other. An "entry" is a
// position and one of its k classes; a class that does not exist is never read.
#include "vectors.cuh"

constexpr int ROW_THREADS = 256;  // at most, of the kernels of gradients
constexpr int AHEAD = 8;          // rows that a thread reads before it adds them up

struct ProductsParams {
  const void *embeddings, *classifier, *bias;  // (rows, hidden), (vocab, hidden), (vocab) or null
  const int64_t *classes;                      // (rows, k)
  float *products;                             // out: (rows, k)
  int64_t rows, hidden, vocab;
  uint32_t k, aligned;
};

constexpr int PRODUCT_THREADS = 256;
constexpr int PRODUCTS = 4;  // of a warp, so that it reads its embedding once for them

// The products and the bias; NaN of a class that does not exist.
template <typename T, int N> __device__ void products(const ProductsParams &p) {
  const int64_t warp = ((int64_t)blockIdx.x * PRODUCT_THREADS + threadIdx.x) / 32;
  const uint32_t lane = threadIdx.x % 32, groups = (p.k + PRODUCTS - 1) / PRODUCTS;
  const int64_t row = warp / groups;
  const uint32_t first = warp % groups * PRODUCTS;
  if (row >= p.rows) return;
  const T *embedding = (const T *)p.embeddings + row * p.hidden, *classes[PRODUCTS];
  int64_t class_[PRODUCTS];
  bool exists[PRODUCTS];
  float sum[PRODUCTS] = {};
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) {
    class_[j] = first + j < p.k ? p.classes[row * p.k + first + j] : -1;
    exists[j] = class_[j] >= 0 && class_[j] < p.vocab;
    // Any row will do in the place of one that there is not.
    classes[j] = exists[j] ? (const T *)p.classifier + class_[j] * p.hidden : embedding;
  }
#pragma unroll 2
  for (int64_t i = lane * N; i < p.hidden; i += 32 * N) {
    const auto e = Numbers<T, N>::load(embedding + i);
    Numbers<T, N> c[PRODUCTS];
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++) c[j] = Numbers<T, N>::load(classes[j] + i);
#pragma unroll
    for (int j = 0; j < PRODUCTS; j++)
#pragma unroll
      for (int n = 0; n < N; n++) sum[j] += e.get(n) * c[j].get(n);
  }
#pragma unroll
  for (int j = 0; j < PRODUCTS; j++) {
    float z = warp_sum(sum[j]);
    if (p.bias && exists[j]) z += to_float(((const T *)p.bias)[class_[j]]);
    if (lane == 0 && first + j < p.k) p.products[row * p.k + first + j] = exists[j] ? z : NAN;
  }
}

// N numbers of a matrix, and what is added to them.
template <typename T, int N> __device__ __forceinline__ void add_to(T *at, const float (&sum)[N]) {
  auto numbers = Numbers<T, N>::load(at);
#pragma unroll
  for (int n = 0; n < N; n++) numbers.set(n, numbers.get(n) + sum[n]);
  numbers.store(at);
}

struct EmbeddingsParams {
  const void *classifier;
  const int64_t *classes;  // (rows, k)
  const float *upstream;   // (rows, k): the gradient of the products
  void *gradient;          // (rows, hidden), in and out
  int64_t hidden, vocab;
  uint32_t k, aligned;
};

// Adds to a row its classes' rows times their gradients. A class without a gradient adds nothing, whatever it holds. One
// block a row and part of the columns.
template <typename T, int N> __device__ void embeddings_gradient(const EmbeddingsParams &p) {
  const int64_t row = blockIdx.x, column = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (column >= p.hidden) return;
  const int64_t *classes = p.classes + row * p.k;
  const float *upstream = p.upstream + row * p.k;
  float sum[N] = {};
  for (uint32_t first = 0; first < p.k; first += AHEAD) {
    Numbers<T, N> c[AHEAD];
    float g[AHEAD];
    bool any = false;
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int64_t class_ = first + j < p.k ? classes[first + j] : -1;
      const bool exists = class_ >= 0 && class_ < p.vocab;
      g[j] = exists ? upstream[first + j] : 0.f;
      any |= g[j] != 0.f;
      // Class 0 in the place of one that there is not: a load without a branch.
      c[j] = Numbers<T, N>::load((const T *)p.classifier + (exists ? class_ : 0) * p.hidden + column);
    }
    if (!any) continue;
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
#pragma unroll
      for (int n = 0; n < N; n++) sum[n] += g[j] != 0.f ? g[j] * c[j].get(n) : 0.f;
  }
  add_to((T *)p.gradient + row * p.hidden + column, sum);
}

struct EntriesParams {
  const int64_t *classes;  // (count)
  const float *upstream;   // (count)
  uint32_t *keys;          // out: the class, `vocab` where it does not exist or has no gradient
  uint32_t *entries;       // out: the numbers from 0 on
  int64_t vocab;
  uint32_t count, unused;
};

extern "C" __global__ void list_entries(const EntriesParams p) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  const int64_t class_ = p.classes[i];
  const bool adds = class_ >= 0 && class_ < p.vocab && p.upstream[i] != 0.f;
  p.keys[i] = adds ? (uint32_t)class_ : (uint32_t)p.vocab;
  p.entries[i] = i;
}

struct ByClassParams {
  const void *embeddings;
  const float *upstream;             // (rows, k)
  const uint32_t *classes, *entries;  // (count), sorted by class
  float *partials;                   // (2, pieces, hidden): of the first run of a piece, if it began before, and of the last, if it goes on
  void *gradient;                    // (vocab, hidden) or (vocab), in and out
  int64_t hidden, vocab;
  uint32_t count, pieces, k, aligned;
};

// Entries that a block adds up. A "run" is all entries of one class.
constexpr uint32_t PIECE = 512;

// Adds to the row of each class the embeddings of its entries, in their order, times their gradients. A run that is not
// all in one piece is left for `sum_runs`. What is not to be added comes last and is a run too, of no row.
template <typename T, int N> __device__ void classifier_gradient(const ByClassParams &p) {
  __shared__ uint32_t classes[PIECE], rows[PIECE];
  __shared__ float upstream[PIECE];
  const uint32_t first = blockIdx.x * PIECE;
  for (uint32_t i = threadIdx.x; i < PIECE; i += blockDim.x) {
    const bool exists = first + i < p.count;
    const uint32_t entry = exists ? p.entries[first + i] : 0;
    classes[i] = exists ? p.classes[first + i] : p.vocab, rows[i] = entry / p.k, upstream[i] = p.upstream[entry];
  }
  __syncthreads();
  const int64_t column = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (column >= p.hidden) return;
  uint32_t run = classes[0];
  bool began_before = first > 0 && p.classes[first - 1] == run;
  float sum[N] = {};
  const auto finish = [&](bool goes_on) {
    if (run == p.vocab) return;
    if (began_before || goes_on) {
      Numbers<float, N> partial;
#pragma unroll
      for (int n = 0; n < N; n++) partial.set(n, sum[n]);
      partial.store(p.partials + ((began_before ? 0 : (int64_t)p.pieces) + blockIdx.x) * p.hidden + column);
    } else {
      add_to((T *)p.gradient + run * p.hidden + column, sum);
    }
  };
  for (uint32_t i = 0; i < PIECE && classes[i] != p.vocab; i += AHEAD) {
    Numbers<T, N> e[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      e[j] = Numbers<T, N>::load((const T *)p.embeddings + rows[i + j] * p.hidden + column);
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      if (classes[i + j] != run) {
        finish(false);
        run = classes[i + j], began_before = false;
#pragma unroll
        for (int n = 0; n < N; n++) sum[n] = 0.f;
      }
#pragma unroll
      for (int n = 0; n < N; n++) sum[n] += upstream[i + j] * e[j].get(n);
    }
  }
  finish(first + PIECE < p.count && p.classes[first + PIECE] == run);
}

// The runs that are in several pieces. The block of the piece where one begins adds its parts up, in their order.
template <typename T, int N> __device__ void sum_runs(const ByClassParams &p) {
  const uint32_t first = blockIdx.x * PIECE, next = first + PIECE;
  const int64_t column = ((int64_t)blockIdx.y * blockDim.x + threadIdx.x) * N;
  if (next >= p.count || column >= p.hidden) return;
  const uint32_t run = p.classes[next - 1];
  const bool began_before = first > 0 && p.classes[first - 1] == run;
  if (run == p.vocab || began_before || p.classes[next] != run) return;
  const auto partial = [&](uint32_t slot) { return Numbers<float, N>::load(p.partials + slot * p.hidden + column); };
  float sum[N];
  const auto begin = partial(p.pieces + blockIdx.x);
#pragma unroll
  for (int n = 0; n < N; n++) sum[n] = begin.get(n);
#pragma unroll 4
  for (uint32_t piece = blockIdx.x + 1; piece < p.pieces && p.classes[piece * PIECE] == run; piece++) {
    const auto part = partial(piece);
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] += part.get(n);
  }
  add_to((T *)p.gradient + run * p.hidden + column, sum);
}

// One warp an entry: that of the first of a class adds the gradients of all.
template <typename T> __device__ void bias_gradient(const ByClassParams &p) {
  const int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (warp >= p.count) return;
  const uint32_t first = (uint32_t)warp, lane = threadIdx.x % 32;
  const uint32_t class_ = p.classes[first];
  if (class_ == p.vocab || (first > 0 && p.classes[first - 1] == class_)) return;
  float sum = 0.f;
  for (uint32_t i = first + lane; i < p.count && p.classes[i] == class_; i += 32) sum += p.upstream[p.entries[i]];
  sum = warp_sum(sum);
  T &gradient = ((T *)p.gradient)[class_];
  if (lane == 0) gradient = from_float<T>(to_float(gradient) + sum);
}

FOR_DTYPES(class_products, products, ProductsParams, PRODUCT_THREADS)
FOR_DTYPES(class_embeddings_gradient, embeddings_gradient, EmbeddingsParams, ROW_THREADS)
FOR_DTYPES(class_classifier_gradient, classifier_gradient, ByClassParams, ROW_THREADS)
FOR_DTYPES(class_sum_runs, sum_runs, ByClassParams, ROW_THREADS)

#define OF_BIAS(SUFFIX, T) \
  extern "C" __global__ void class_bias_gradient_##SUFFIX(const ByClassParams p) { bias_gradient<T>(p); }
OF_BIAS(bf16, __nv_bfloat16)
OF_BIAS(f16, __half)
OF_BIAS(f32, float)

static_assert(PRODUCT_THREADS == 256 && ROW_THREADS == 256 && PRODUCTS == 4 && PIECE == 512, "the host mirrors these");
