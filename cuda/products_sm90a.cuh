// The backward's two products on Hopper, over kept tiles only: dE += G C and dC = scale G^T E for a range of
// classes whose gradient tiles G lie in a workspace. Each output tile has one owner that walks its kept tiles in
// order, so results repeat bit for bit and skipped tiles cost nothing. Blocks take the longest outputs first, in
// a serpentine, so that all finish together although nobody but the device knows how many tiles were kept. Of dE, where
// all are kept, several clusters may have consecutive parts of an output, which `add_parts` then adds in order.
#pragma once
#include "product_classes_sm90a.cuh"

// dE: f32, added to what earlier ranges left. Lanes swap halves in pairs to write 16 bytes each.
template <int R>
__device__ __forceinline__ void add_rows(const float (&product)[2][R], float* out, uint32_t stride, bool overwrite,
                                         uint32_t rows, uint32_t first_row, uint32_t first_column,
                                         uint32_t end_column) {
  const bool odd = threadIdx.x & 1;
  const uint32_t lane_column = first_column + 8 * odd + threadIdx.x % 4 / 2 * 4;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_row + s / 2 * 64 + s % 2 * 8;
    float* to = out + static_cast<size_t>(row) * stride + lane_column;
#pragma unroll
    for (int i = 0; i < R / 4; i += 2) {  // two chunks of 8 columns: one for even lanes, one for odd
      const int even_chunk = 4 * i + 2 * (s % 2), odd_chunk = even_chunk + 4;
      const float (&from)[R] = product[s / 2];
      const float x = __shfl_xor_sync(~0u, odd ? from[even_chunk] : from[odd_chunk], 1);
      const float y = __shfl_xor_sync(~0u, odd ? from[even_chunk + 1] : from[odd_chunk + 1], 1);
      const float4 sum = odd ? make_float4(x, y, from[odd_chunk], from[odd_chunk + 1])
                             : make_float4(from[even_chunk], from[even_chunk + 1], x, y);
      const bool inside = row < rows && lane_column + 8 * i < end_column;
      if (inside && overwrite) *reinterpret_cast<float4*>(to + 8 * i) = sum;
      if (inside && !overwrite) add_in_memory(to + 8 * i, sum);
    }
  }
}

// What this block has of an output whose first part is another cluster's.
__device__ __forceinline__ float* part_of(const ProductParams& p, uint32_t block) {
  return p.parts + static_cast<size_t>(block) * KEEP * TILE_N;
}

// An output to which nothing was kept.
template <typename Out, bool RAGGED>
__device__ void write_zeros(const ProductParams& p, uint32_t end_row, uint32_t first_row, uint32_t first_column,
                            uint32_t end_column) {
  if constexpr (RAGGED) {
    end_column = min(end_column, p.grad_columns);
    const uint32_t columns = end_column - min(first_column, end_column);
    for (uint32_t i = threadIdx.x % GROUP; i < KEEP * columns; i += GROUP) {
      const uint32_t row = first_row + i / columns;
      if (row < end_row) static_cast<Out*>(p.out)[static_cast<size_t>(row) * p.grad_columns + first_column + i % columns] = 0.0f;
    }
  } else {
    constexpr uint32_t WIDTH = 16 / sizeof(Out);
    const uint32_t columns = (end_column - min(first_column, end_column)) / WIDTH;
    for (uint32_t i = threadIdx.x % GROUP; i < KEEP * columns; i += GROUP) {
      const uint32_t row = first_row + i / columns, column = first_column + i % columns * WIDTH;
      if (row < end_row)
        *reinterpret_cast<uint4*>(static_cast<Out*>(p.out) + static_cast<size_t>(row) * p.hidden + column) =
            make_uint4(0, 0, 0, 0);
    }
  }
}

template <typename T, bool CLASSIFIER, bool AVERAGED, bool MIXED, bool RAGGED>
__device__ void consume(ProductPlan& plan, uint32_t group, const ProductParams& p) {
  ProductTiles<CLASSIFIER, MIXED> tiles(p);
  tiles.take_parts(plan, p);
  Drainer ring(plan.ring);
  const uint32_t thread = threadIdx.x % GROUP;
  const uint32_t thread_row = thread / WARP * 16 + thread % WARP / 4;

  for (uint32_t n = 0; n < tiles.share; ++n) {
    uint32_t tile, column, first_tile, end_tile;
    bool narrow;
    tiles.decode(plan, p, n, tile, column, narrow, first_tile, end_tile);
    const bool sharing = !CLASSIFIER && p.parts, first_part = !sharing || first_tile == 0;
    const uint32_t blocks = uniform(BLOCKS * (sharing ? end_tile - first_tile : plan.kept[tile]));
    if (n % CONSUMERS != group) {
      ring.at.skip(blocks);
      continue;
    }
    const uint32_t end_column = min(column + (narrow ? NARROW : TILE_N), p.hidden);
    auto hand_over = [&] {
      if (n + 1 < tiles.share) give_turn(1 - group);
    };
    if (n > 0) take_turn(group);
    // Numbers that earlier chunks left wait for the last one, which rounds them.
    const bool waiting = CLASSIFIER && !p.overwrite && p.last;
    if (blocks == 0 && !AVERAGED && !(CLASSIFIER && p.slots) && !waiting) {
      hand_over();
      if constexpr (CLASSIFIER) {
        if (p.overwrite) write_zeros<T, RAGGED>(p, p.vocab, p.first_class + tile * KEEP, column, end_column);
        if (p.overwrite && !p.last) clear_exponents<MIXED>(p, p.first_class + tile * KEEP, column);
      } else if (p.overwrite) {
        write_zeros<float, false>(p, tiles.rows, tile * KEEP, column, end_column);
      }
      continue;
    }
    auto write = [&](auto& product, bool first) {
      const uint32_t row = tile * KEEP + thread_row;
      if constexpr (CLASSIFIER) {
        if constexpr (AVERAGED) stage_masses<T>(plan.masses[group], p, group, p.first_class / KEEP + tile, column, end_column);
        write_classes<T, AVERAGED, MIXED, RAGGED>(product, p, plan.masses[group], p.first_class + row, column, end_column);
      } else if (first_part) {
        float* sums = static_cast<float*>(p.out);
        add_rows(product, sums, p.hidden, first && p.overwrite, tiles.rows, row, column, end_column);
      } else {
        add_rows(product, part_of(p, blockIdx.x), TILE_N, first, KEEP, thread_row, 0, end_column - min(column, end_column));
      }
    };
    auto compute = [&](auto& product) {
      constexpr int WIDTH = sizeof(product) / sizeof(float);
      // Nothing kept is no product, but classes may get averages or targets all the same.
      if (blocks == 0) {
        hand_over();
        for (auto& half : product)
#pragma unroll
          for (float& x : half) x = 0.0f;
        write(product, true);
        return;
      }
      for (uint32_t begin = 0; begin < blocks; begin += PIECE) {
        const bool first = begin == 0, last = blocks - begin <= PIECE;
        multiply<T, CLASSIFIER, true, WIDTH>(product, ring, min(blocks - begin, PIECE), [&] {
          if (last) hand_over();
        });
        if (CLASSIFIER && blocks > PIECE) add_piece(product, p.partials, group, first, last);
        if (!CLASSIFIER || last) write(product, first);
      }
    };
    if (narrow) {
      float product[2][NARROW / 2];
      compute(product);
    } else {
      float product[2][TILE_N / 2];
      compute(product);
    }
  }
}

template <typename T, bool CLASSIFIER, bool AVERAGED, bool MIXED, bool RAGGED, typename Other>
__device__ __forceinline__ void product(const TensorMap* gradient, const Other& other, const ProductParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<ProductPlan*>(shared);
  if (threadIdx.x == 0) {
    prefetch_map(gradient);
    plan.ring.init();
  }
  list_outputs(plan, ProductTiles<CLASSIFIER, MIXED>(p), p);
  plan.ring.sync();
  if (threadIdx.x < GROUP) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<CLASSIFIER, MIXED>(plan, gradient, other, p);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    consume<T, CLASSIFIER, AVERAGED, MIXED, RAGGED>(plan, uniform(threadIdx.x / GROUP - 1), p);
  }
  __syncwarp();
  plan.ring.sync();
}

// Adds to the outputs of dE that clusters share their parts but the first, in order. A cluster does so for that of which it
// has the first part: its last, if any.
template <bool MIXED>
__device__ __forceinline__ void add_parts(const ProductParams& p) {
  __shared__ Parts parts;
  const ProductTiles<false, MIXED> tiles(p);
  auto list_parts = [&](uint32_t of_cluster) {
    __syncthreads();
    if (threadIdx.x < WARP) tiles.list_parts(p, of_cluster, parts);
    __syncthreads();
  };
  list_parts(tiles.cluster);
  if (parts.count == 0) return;
  const Part part = parts.list[parts.count - 1];
  if (part.first > 0) return;
  uint32_t tile, column, done = part.end;
  bool narrow;
  tiles.place(p, part.output, tile, column, narrow);
  const uint32_t end_column = min(column + (narrow ? NARROW : TILE_N), p.hidden);
  const uint32_t columns = end_column - min(column, end_column), end_row = min(KEEP, tiles.rows - tile * KEEP);
  for (uint32_t other = tiles.cluster + 1; done < tiles.inner && other < tiles.clusters; ++other) {
    list_parts(other);
    if (parts.count == 0) continue;
    done = parts.list[0].end;
    const float* from = part_of(p, other * CLUSTER + cluster_rank());
    float* to = static_cast<float*>(p.out) + static_cast<size_t>(tile) * KEEP * p.hidden + column;
    for (uint32_t i = threadIdx.x; i < end_row * (columns / 4); i += blockDim.x) {
      const uint32_t row = i / (columns / 4), at = i % (columns / 4) * 4;
      const float4 more = *reinterpret_cast<const float4*>(from + row * TILE_N + at);
      auto& sum = *reinterpret_cast<float4*>(to + static_cast<size_t>(row) * p.hidden + at);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
  }
}

// Rows of embeddings past the count, up to the next multiple of 128, must be finite: they meet zeros of G.
#define EMBEDDINGS_PRODUCT(NAME, T, MIXED)                                                            \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)            \
      NAME(const __grid_constant__ TensorMap gradient, const __grid_constant__ TensorMap classifier,  \
           const __grid_constant__ TensorMap adapter, const __grid_constant__ ProductParams params) { \
    const JoinedMaps classes{&classifier, &adapter, params.adapter_column};                           \
    product<T, false, false, MIXED, false>(&gradient, classes, params);                               \
  }
#define EMBEDDINGS_PARTS(NAME, MIXED)                                                                 \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(512)                   \
      NAME(const __grid_constant__ ProductParams params) {                                            \
    add_parts<MIXED>(params);                                                                         \
  }
#define CLASSIFIER_PRODUCT(NAME, T, AVERAGED, MIXED, RAGGED)                                         \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)           \
      NAME(const __grid_constant__ TensorMap gradient, const __grid_constant__ TensorMap embeddings, \
           const __grid_constant__ ProductParams params) {                                           \
    product<T, true, AVERAGED, MIXED, RAGGED>(&gradient, &embeddings, params);                       \
  }

static_assert(sizeof(ProductPlan) == 232448, "the host asks for as much shared memory");
static_assert(PIECE * BLOCK_K == 128 * 128 && CONSUMERS * TILE_N * GROUP * sizeof(float) == 2 * 192 * 128 * 4,
              "the host mirrors the rows of a piece and the bytes of a block's partials");
static_assert(KEEP * TILE_N * sizeof(float) == 128 * 192 * 4, "the host mirrors the bytes of a block's part");
static_assert(STRIP == 384 && CLUSTER * NARROW == STRIP / 3 * 2, "the host mirrors the widths of strips");
