// The backward's two products on Hopper, over kept tiles only: dE += G C and dC = scale G^T E for a range of
// classes whose gradient tiles G lie in a workspace. Each output tile has one owner that walks its kept tiles in
// order, so results repeat bit for bit and skipped tiles cost nothing. Blocks take the longest outputs first, in
// a serpentine, so that all finish together although nobody but the device knows how many tiles were kept.
#include "hopper.cuh"

using namespace hopper;

constexpr int TILE_N = 192;       // columns of an output tile, along the depth of E and C ...
constexpr int NARROW = 128;       // ... or of one in the last strip, if that is enough
constexpr int KEEP = 128;         // rows and classes of a tile of the keep table
constexpr int OUTER_MAX = 2048;   // row tiles (dE) or class tiles (dC) of a launch at most ...
constexpr int WORDS_MAX = 4096;   // ... times the words of 32 tiles each of them is summed over
constexpr int CLUSTER = 2;        // blocks with the same gradient tiles and neighbouring columns: a strip
constexpr uint32_t STRIP = CLUSTER * TILE_N;
constexpr int STAGES = 5;
constexpr uint32_t BLOCKS = KEEP / BLOCK_K;  // stages a kept tile is deep
// Stages that the tensor cores sum before f32 does: they cut off a sum's last digits at every step, so that the error of
// a long sum grows with its length.
constexpr uint32_t PIECE = 128 * BLOCKS;
static_assert(TILE_M == KEEP, "an output tile is as tall as a kept tile");

constexpr uint32_t COMBINED = 1u << 31;  // of a TargetRow

enum Keep : uint8_t { FOR_EMBEDDINGS = 1, FOR_CLASSIFIER = 2 };

// Everything but the two matrices; mirrored on the host. The boxes of both maps are 64 high.
struct ProductParams {
  const uint32_t* count;     // [1] compacted rows
  const uint8_t* keep;       // [row tiles][class_tiles] bits of Keep; null: all kept
  const float* scale;        // [1] factor of dC, or null: 1 (dE: not read)
  void* out;                 // dE: [rows][depth] f32. dC: [vocab][depth] T, all classes of C
  const uint32_t* slots;     // dC: [vocab] 1 + the row of target_rows to add, 0 for none; or null: none at all
  const float* target_rows;  // [slots][depth]
  // dC, what tiles that are not kept leave in each class (see filter.cu), before `scale`; or null: nothing.
  const float* shares;           // [vocab]
  const void* mass_rows;         // [class tiles][depth] T: shared out among the tile's classes
  const uint2* list;             // [vocab] TargetRow of filter.cu, or null: no targets
  const void* embeddings;        // [rows][depth] T
  const void* combined;          // [rows / 2][depth] T: means of rows with the same target
  float* partials;               // dC, of more rows than a piece has: [blocks][CONSUMERS][TILE_N][GROUP] sums of pieces
  uint32_t first_row;        // compacted row that row 0 of the gradient is
  uint32_t rows;             // at most
  uint32_t vocab;          // all classes
  uint32_t hidden;
  uint32_t adapter_column;   // dE: from which on columns of C are its adapter's, a multiple of 64; or beyond all
  uint32_t first_class;      // of the range, a multiple of 128
  uint32_t range;            // classes of the range
  uint32_t class_tiles;      // ceil(vocab / 128)
  uint32_t overwrite;        // 1 for the first that writes the output; 0: add to what is there
  uint8_t* exponents;        // dC of several chunks of rows: [strips][CLUSTER][vocab] of Between, else null
  uint32_t last;             // dC: 1 for the last chunk of rows, which rounds to T
  uint32_t band;             // at least 1: strips of 384 columns that go through the output tiles together, so
                             // many that their part of C or E stays in L2
};

struct ProductPlan {
  Ring<TILE_M, TILE_N, STAGES, Share::A> ring;
  uint16_t kept[OUTER_MAX];   // kept tiles of each outer tile
  uint16_t order[OUTER_MAX];  // outer tiles, most kept first
  uint32_t bits[WORDS_MAX];   // [outer tile][words] which inner tiles are kept
  alignas(16) float masses[CONSUMERS][TILE_N];  // the averages' part of each group's tile
};

// "Outer" tiles are those of the output (rows for dE, classes for dC), "inner" ones are summed over.
template <bool CLASSIFIER>
struct ProductTiles {
  uint32_t rows, outer, inner, words, strips, share, cluster, clusters;

  __device__ explicit ProductTiles(const ProductParams& p) {
    const uint32_t all_rows = *p.count;
    rows = all_rows > p.first_row ? min(all_rows - p.first_row, p.rows) : 0;
    uint32_t row_tiles = (rows + KEEP - 1) / KEEP, class_tiles = (p.range + KEEP - 1) / KEEP;
    outer = CLASSIFIER ? class_tiles : row_tiles;
    inner = CLASSIFIER ? row_tiles : class_tiles;
    words = (inner + WARP - 1) / WARP;
    if (outer > OUTER_MAX || outer * words > WORDS_MAX) __trap();  // the host promised not to
    strips = (p.hidden + STRIP - 1) / STRIP;
    cluster = blockIdx.x / CLUSTER, clusters = gridDim.x / CLUSTER;
    // Round n hands out outputs [n G, (n + 1) G) to the G clusters, forwards and backwards in turn.
    const uint32_t all = outer * strips, rounds = all / clusters, rest = all % clusters;
    share = rounds + ((rounds % 2 ? clusters - 1 - cluster : cluster) < rest);
  }
  // The n-th output of this block: its tile and its first column. A band of strips goes through all tiles before
  // the next one does: what it reads of C or E comes from L2 however the kept tiles are strewn.
  __device__ void decode(const ProductPlan& plan, const ProductParams& p, uint32_t n, uint32_t& tile,
                         uint32_t& column, bool& narrow) const {
    const uint32_t output = n * clusters + (n % 2 ? clusters - 1 - cluster : cluster);
    const uint32_t band = output / (p.band * outer), inside = output - band * p.band * outer;
    const uint32_t width = min(p.band, strips - band * p.band);
    tile = plan.order[inside / width];
    column = (band * p.band + inside % width) * STRIP;
    narrow = p.hidden - column <= CLUSTER * NARROW;
    column += cluster_rank() * (narrow ? NARROW : TILE_N);
  }
  __device__ bool kept(const ProductParams& p, uint32_t outer_tile, uint32_t inner_tile) const {
    if (inner_tile >= inner) return false;
    if (!p.keep) return true;
    uint32_t row_tile = CLASSIFIER ? inner_tile : outer_tile, class_tile = CLASSIFIER ? outer_tile : inner_tile;
    uint8_t bits = p.keep[static_cast<size_t>(row_tile) * p.class_tiles + p.first_class / KEEP + class_tile];
    return bits & (CLASSIFIER ? FOR_CLASSIFIER : FOR_EMBEDDINGS);
  }
};

// All threads of the block: which tiles each output sums, how many, and the order to take the outputs in.
template <bool CLASSIFIER>
__device__ void list_outputs(ProductPlan& plan, const ProductTiles<CLASSIFIER>& tiles, const ProductParams& p) {
  const uint32_t lane = threadIdx.x % WARP;
  for (uint32_t tile = threadIdx.x / WARP; tile < tiles.outer; tile += THREADS / WARP) {
    uint32_t kept = 0;
#pragma unroll 4
    for (uint32_t word = 0; word < tiles.words; ++word) {
      const uint32_t bits = __ballot_sync(~0u, tiles.kept(p, tile, word * WARP + lane));
      kept += __popc(bits);
      if (lane == 0) plan.bits[tile * tiles.words + word] = bits;
    }
    if (lane == 0) plan.kept[tile] = kept;
  }
  __syncthreads();
  for (uint32_t tile = threadIdx.x; tile < tiles.outer; tile += THREADS) {
    uint32_t kept = plan.kept[tile], before = p.keep ? 0 : tile;
    if (p.keep)
      for (uint32_t other = 0; other < tiles.outer; ++other)
        before += plan.kept[other] > kept || (plan.kept[other] == kept && other < tile);
    plan.order[before] = tile;
  }
}

// One thread: the kept tiles of each output, in order.
template <bool CLASSIFIER, typename Other>
__device__ void produce(ProductPlan& plan, const TensorMap* gradient, const Other& other, const ProductParams& p) {
  ProductTiles<CLASSIFIER> tiles(p);
  Filler ring(plan.ring);
  for (uint32_t n = 0; n < tiles.share; ++n) {
    uint32_t tile, column;
    bool narrow;
    tiles.decode(plan, p, n, tile, column, narrow);
    for (uint32_t word = 0; word < tiles.words; ++word) {
      for (uint32_t todo = plan.bits[tile * tiles.words + word]; todo; todo &= todo - 1) {
        const uint32_t inner = (word * WARP + __ffs(todo) - 1) * KEEP;
        for (uint32_t k = inner; k < inner + KEEP; k += BLOCK_K) {
          const uint32_t other_k = CLASSIFIER ? k : p.first_class + k;
          if (narrow)
            copy_block<CLASSIFIER, true, NARROW>(ring, gradient, tile * KEEP, k, other, column, other_k);
          else
            copy_block<CLASSIFIER, true, TILE_N>(ring, gradient, tile * KEEP, k, other, column, other_k);
        }
      }
    }
  }
}

// dE: f32, added to what earlier ranges left. Lanes swap halves in pairs to write 16 bytes each.
template <int R>
__device__ __forceinline__ void add_rows(const float (&product)[2][R], const ProductParams& p, bool overwrite,
                                         uint32_t rows, uint32_t first_row, uint32_t first_column,
                                         uint32_t end_column) {
  const bool odd = threadIdx.x & 1;
  const uint32_t lane_column = first_column + 8 * odd + threadIdx.x % 4 / 2 * 4;
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_row + s / 2 * 64 + s % 2 * 8;
    float* to = static_cast<float*>(p.out) + static_cast<size_t>(row) * p.hidden + lane_column;
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

// Adds what the same thread left of earlier pieces of a product of dC and, but for the last piece, leaves the sum.
template <int R>
__device__ __forceinline__ void add_piece(float (&product)[2][R], float* partials, uint32_t group, bool first, bool last) {
  float* mine = partials + static_cast<size_t>(blockIdx.x * CONSUMERS + group) * TILE_N * GROUP + threadIdx.x % GROUP;
#pragma unroll
  for (int i = 0; i < 2 * R; ++i) {
    float& sum = product[i / R][i % R];
    if (!first) sum += mine[i * GROUP];
    if (!last) mine[i * GROUP] = sum;
  }
}

// Where what is added to a class of dC in f32 lies: 1 + its row, or 0.
__device__ __forceinline__ uint32_t target_slot(const ProductParams& p, uint32_t row) {
  return p.slots && row < p.vocab ? p.slots[row] : 0;
}
__device__ __forceinline__ const float* target_row(const ProductParams& p, uint32_t slot) {
  return slot ? p.target_rows + static_cast<size_t>(slot - 1) * p.hidden : nullptr;
}

// The averages' row of a tile, for a group's columns, as f32 into shared memory.
template <typename T>
__device__ __forceinline__ void stage_masses(float (&to)[TILE_N], const ProductParams& p, uint32_t group, uint32_t tile,
                                             uint32_t first_column, uint32_t end_column) {
  const T* from = static_cast<const T*>(p.mass_rows) + static_cast<size_t>(tile) * p.hidden;
  named_wait(BIAS + group, GROUP);  // the last tile's have been read
  for (uint32_t i = threadIdx.x % GROUP * 2; i < TILE_N; i += GROUP * 2) {
    const float2 masses =
        first_column + i < end_column ? unpack<T>(*reinterpret_cast<const uint32_t*>(from + first_column + i))
                                      : make_float2(0.0f, 0.0f);
    to[i] = masses.x, to[i + 1] = masses.y;
  }
  named_wait(BIAS + group, GROUP);
}

// dC between two chunks of rows: floats of 16 bits in the place of T, with 3 bits of exponent and 12 of mantissa, in units
// of a power of two that a class has in the columns of a block. So the largest numbers, down to a 64th of the largest of
// all, have 13 digits where bf16 has 8, and what is smaller has their last digit: a sum over many chunks is as good as
// rounded once. Of the power, the biased exponent of the largest number is kept; what is not finite makes all of them NaN.
struct Between {
  static constexpr uint32_t LEAST = 30;     // so that the unit is a normal number,
  static constexpr uint32_t GREATEST = 253;  // and what it is divided by
  static constexpr uint32_t NOT_FINITE = 255;
  static constexpr uint32_t ROUND = 1u << 10;  // half of the last digit that is kept of a float's mantissa
  // A number of exponent 127, that of the largest once it is divided by the unit, times this has exponent 7, the largest of
  // 3 bits; smaller ones become subnormal as they are to be.
  static constexpr float DOWN = 0x1p-120f, UP = 0x1p120f;

  // Of the largest absolute value, as bits: NaN is above all. It is rounded as it will be.
  static __device__ __forceinline__ uint32_t exponent(uint32_t largest) {
    const uint32_t rounded = max((largest + ROUND) >> 23, LEAST);
    return rounded > GREATEST ? NOT_FINITE : rounded;
  }
  static __device__ __forceinline__ float unit(uint32_t exponent) {
    return __uint_as_float(exponent == NOT_FINITE ? 0x7FFFFFFF : exponent << 23);
  }
  static __device__ __forceinline__ float per_unit(uint32_t exponent) {
    return __uint_as_float((254 - min(exponent, GREATEST)) << 23);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word, float unit) {
    const float low = __uint_as_float((word << 11 & 0x03FFF800) | (word << 16 & 0x80000000));
    const float high = __uint_as_float((word >> 5 & 0x03FFF800) | (word & 0x80000000));
    return make_float2(UP * low * unit, UP * high * unit);
  }
  static __device__ __forceinline__ uint32_t pack(float low, float high, float per_unit) {
    const uint32_t l = __float_as_uint(per_unit * low * DOWN) + ROUND, h = __float_as_uint(per_unit * high * DOWN) + ROUND;
    return (l >> 11 & 0x7FFF) | (l >> 16 & 0x8000) | (h << 5 & 0x7FFF0000) | (h & 0x80000000);
  }
};

// The exponents of a block's columns, which begin at `first_column`.
__device__ __forceinline__ uint8_t* exponents_of(const ProductParams& p, uint32_t first_column) {
  return p.exponents + static_cast<size_t>(first_column / STRIP * CLUSTER + cluster_rank()) * p.vocab;
}

// dC: scaled; what earlier chunks of rows left is added; rounded by the last chunk, which may be the only one.
template <typename T, bool AVERAGED, int R>
__device__ __forceinline__ void write_classes(float (&product)[2][R], const ProductParams& p, const float* masses,
                                              uint32_t first_class, uint32_t first_column, uint32_t end_column) {
  const float scale = p.scale ? *p.scale : 1.0f;
  const uint32_t lane_column = first_column + 8 * (threadIdx.x % 4);
  uint8_t* exponents = exponents_of(p, first_column);
  uint32_t slot[4];
  float share[4];
  uint2 listed[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_class + s / 2 * 64 + s % 2 * 8;
    slot[s] = target_slot(p, row);
    if constexpr (AVERAGED) {
      share[s] = row < p.vocab ? __ldg(p.shares + row) : 0.0f;
      listed[s] = p.list && row < p.vocab ? __ldg(p.list + row) : make_uint2(0, 0);
    }
  }
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const uint32_t row = first_class + s / 2 * 64 + s % 2 * 8;
    T* to = static_cast<T*>(p.out) + static_cast<size_t>(row) * p.hidden + lane_column;
    const float* more = target_row(p, slot[s]);
    const bool any_listed = AVERAGED && __any_sync(~0u, listed[s].x != 0);
    const T* target = nullptr;
    if (AVERAGED && listed[s].x) {
      const void* rows = listed[s].x & COMBINED ? p.combined : p.embeddings;
      target = static_cast<const T*>(rows) + static_cast<size_t>((listed[s].x & ~COMBINED) - 1) * p.hidden;
    }
    const float unit = !p.overwrite && row < p.vocab ? Between::unit(exponents[row]) : 0.0f;
    // Each lane loads the 16 bytes that it will write, all before the first is needed; then they are dealt out as the
    // product lies.
    uint4 old[R / 16];
#pragma unroll
    for (int first = 0; first < R / 4; first += 4) {
      old[first / 4] = make_uint4(0, 0, 0, 0);
      if (!p.overwrite && row < p.vocab && lane_column + 8 * first < end_column)
        old[first / 4] = *reinterpret_cast<const uint4*>(to + 8 * first);
    }
    uint32_t largest = 0;  // of the absolute values, as bits
#pragma unroll
    for (int first = 0; first < R / 4; first += 4) {
      const uint4 dealt = p.overwrite ? old[first / 4] : deal_chunk(old[first / 4]);
      const uint32_t before[4] = {dealt.x, dealt.y, dealt.z, dealt.w};
      uint32_t of_target[4] = {};
      if (AVERAGED && any_listed) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t column = first_column + 8 * (first + i) + threadIdx.x % 4 * 2;
          // That nothing writes them meanwhile lets the compiler load them early.
          if (target && column < end_column) of_target[i] = __ldg(reinterpret_cast<const uint32_t*>(target + column));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = 4 * (first + i) + 2 * (s % 2);
        float& x = product[s / 2][j];
        float& y = product[s / 2][j + 1];
        float2 was = Between::unpack(before[i], unit);
        const uint32_t column = first_column + 8 * (first + i) + threadIdx.x % 4 * 2;
        if (more && column < end_column) {
          const float2 target = *reinterpret_cast<const float2*>(more + column);
          was.x += target.x, was.y += target.y;
        }
        if (AVERAGED && column < end_column) {
          const float2 mass = *reinterpret_cast<const float2*>(masses + 8 * (first + i) + threadIdx.x % 4 * 2);
          x = fmaf(share[s], mass.x, x), y = fmaf(share[s], mass.y, y);
          const float2 e = unpack<T>(of_target[i]);
          const float entry = __uint_as_float(listed[s].y);
          x = fmaf(entry, e.x, x), y = fmaf(entry, e.y, y);
        }
        x = fmaf(scale, x, was.x), y = fmaf(scale, y, was.y);
        largest = max(largest, max(__float_as_uint(x) & 0x7FFFFFFF, __float_as_uint(y) & 0x7FFFFFFF));
      }
    }
    const auto store = [&](auto word_of) {
#pragma unroll
      for (int first = 0; first < R / 4; first += 4) {
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int j = 4 * (first + i) + 2 * (s % 2);
          word[i] = word_of(product[s / 2][j], product[s / 2][j + 1]);
        }
        const uint4 chunk = collect_chunk(word[0], word[1], word[2], word[3]);
        if (row < p.vocab && lane_column + 8 * first < end_column) *reinterpret_cast<uint4*>(to + 8 * first) = chunk;
      }
    };
    if (p.last) {
      store([](float x, float y) { return pack<T>(x, y); });
    } else {
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const uint32_t exponent = Between::exponent(largest);
      if (row < p.vocab && threadIdx.x % 4 == 0) exponents[row] = exponent;
      const float per_unit = Between::per_unit(exponent);
      store([=](float x, float y) { return Between::pack(x, y, per_unit); });
    }
  }
}

// An output to which nothing was kept.
template <typename Out>
__device__ void write_zeros(const ProductParams& p, uint32_t end_row, uint32_t first_row, uint32_t first_column,
                            uint32_t end_column) {
  constexpr uint32_t WIDTH = 16 / sizeof(Out);
  const uint32_t columns = (end_column - min(first_column, end_column)) / WIDTH;
  for (uint32_t i = threadIdx.x % GROUP; i < KEEP * columns; i += GROUP) {
    const uint32_t row = first_row + i / columns, column = first_column + i % columns * WIDTH;
    if (row < end_row)
      *reinterpret_cast<uint4*>(static_cast<Out*>(p.out) + static_cast<size_t>(row) * p.hidden + column) =
          make_uint4(0, 0, 0, 0);
  }
}

__device__ void clear_exponents(const ProductParams& p, uint32_t first_class, uint32_t first_column) {
  const uint32_t row = first_class + threadIdx.x % GROUP;
  if (row < p.vocab) exponents_of(p, first_column)[row] = Between::LEAST;
}

template <typename T, bool CLASSIFIER, bool AVERAGED>
__device__ void consume(ProductPlan& plan, uint32_t group, const ProductParams& p) {
  ProductTiles<CLASSIFIER> tiles(p);
  Drainer ring(plan.ring);
  const uint32_t thread = threadIdx.x % GROUP;
  const uint32_t thread_row = thread / WARP * 16 + thread % WARP / 4;

  for (uint32_t n = 0; n < tiles.share; ++n) {
    uint32_t tile, column;
    bool narrow;
    tiles.decode(plan, p, n, tile, column, narrow);
    const uint32_t blocks = uniform(BLOCKS * plan.kept[tile]);
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
        if (p.overwrite) write_zeros<T>(p, p.vocab, p.first_class + tile * KEEP, column, end_column);
        if (p.overwrite && !p.last) clear_exponents(p, p.first_class + tile * KEEP, column);
      } else if (p.overwrite) {
        write_zeros<float>(p, tiles.rows, tile * KEEP, column, end_column);
      }
      continue;
    }
    auto write = [&](auto& product, bool first) {
      const uint32_t row = tile * KEEP + thread_row;
      if constexpr (CLASSIFIER) {
        if constexpr (AVERAGED) stage_masses<T>(plan.masses[group], p, group, p.first_class / KEEP + tile, column, end_column);
        write_classes<T, AVERAGED>(product, p, plan.masses[group], p.first_class + row, column, end_column);
      } else {
        add_rows(product, p, first && p.overwrite, tiles.rows, row, column, end_column);
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

template <typename T, bool CLASSIFIER, bool AVERAGED, typename Other>
__device__ __forceinline__ void product(const TensorMap* gradient, const Other& other, const ProductParams& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& plan = *reinterpret_cast<ProductPlan*>(shared);
  if (threadIdx.x == 0) {
    prefetch_map(gradient);
    plan.ring.init();
  }
  list_outputs(plan, ProductTiles<CLASSIFIER>(p), p);
  plan.ring.sync();
  if (threadIdx.x < GROUP) {
    shrink_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<CLASSIFIER>(plan, gradient, other, p);
  } else {
    grow_registers<CONSUMER_REGISTERS>();
    consume<T, CLASSIFIER, AVERAGED>(plan, uniform(threadIdx.x / GROUP - 1), p);
  }
  __syncwarp();
  plan.ring.sync();
}

// Rows of embeddings past the count, up to the next multiple of 128, must be finite: they meet zeros of G.
#define EMBEDDINGS_PRODUCT(NAME, T)                                                                        \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)                 \
      NAME(const __grid_constant__ TensorMap gradient, const __grid_constant__ TensorMap classifier,       \
           const __grid_constant__ TensorMap adapter, const __grid_constant__ ProductParams params) {      \
    product<T, false, false>(&gradient, JoinedMaps{&classifier, &adapter, params.adapter_column}, params); \
  }
#define CLASSIFIER_PRODUCT(NAME, T, AVERAGED)                                                        \
  extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)           \
      NAME(const __grid_constant__ TensorMap gradient, const __grid_constant__ TensorMap embeddings, \
           const __grid_constant__ ProductParams params) {                                           \
    product<T, true, AVERAGED>(&gradient, &embeddings, params);                                      \
  }

EMBEDDINGS_PRODUCT(embeddings_gradient_sm90a_bf16, __nv_bfloat16)
EMBEDDINGS_PRODUCT(embeddings_gradient_sm90a_f16, __half)
CLASSIFIER_PRODUCT(classifier_gradient_sm90a_bf16, __nv_bfloat16, false)
CLASSIFIER_PRODUCT(classifier_gradient_sm90a_f16, __half, false)
CLASSIFIER_PRODUCT(averaged_classifier_gradient_sm90a_bf16, __nv_bfloat16, true)
CLASSIFIER_PRODUCT(averaged_classifier_gradient_sm90a_f16, __half, true)

static_assert(sizeof(ProductPlan) == 232448, "the host asks for as much shared memory");
static_assert(PIECE * BLOCK_K == 128 * 128 && CONSUMERS * TILE_N * GROUP * sizeof(float) == 2 * 192 * 128 * 4,
              "the host mirrors the rows of a piece and the bytes of a block's partials");
