// The outputs of the backward's two products on Hopper: parameters, which kept tiles each sums, who takes which.
#pragma once
#include "hopper.cuh"

using namespace hopper;

constexpr int TILE_N = 192;       // columns of an output tile, along the depth of E and C ...
constexpr int NARROW = 128;       // ... or of one in the last strip or the last two, if that is enough
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

constexpr uint32_t PARTS_MAX = 127;  // parts of outputs that a cluster may have: fewer are left than there are clusters

constexpr uint32_t COMBINED = 1u << 31;  // of a TargetRow

enum Keep : uint8_t { FOR_EMBEDDINGS = 1, FOR_CLASSIFIER = 2 };

// Everything but the two matrices; mirrored on the host. The boxes of both maps are 64 high.
struct ProductParams {
  const uint32_t* count;     // [1] compacted rows
  const uint8_t* keep;       // [row tiles][class_tiles] bits of Keep; null: all kept
  const float* scale;        // [1] factor of dC, or null: 1 (dE: not read)
  void* out;                 // dE: [rows][depth] f32. dC: [vocab][grad_columns] T, all classes of C
  const uint32_t* slots;     // dC: [vocab] 1 + the row of target_rows to add, 0 for none; or null: none at all
  const float* target_rows;  // [slots][depth]
  // dC, what tiles that are not kept leave in each class (see filter.cu), before `scale`; or null: nothing.
  const float* shares;           // [vocab]
  const void* mass_rows;         // [class tiles][depth] T: shared out among the tile's classes
  const uint2* list;             // [vocab] TargetRow of filter.cu, or null: no targets
  const void* embeddings;        // [rows][depth] T
  const void* combined;          // [rows / 2][depth] T: means of rows with the same target
  // dE, where all tiles are kept: [blocks][KEEP][TILE_N] of the outputs that clusters share. Or null: they share none.
  float* parts;
  float* partials;               // dC, of more rows than a piece has: [blocks][CONSUMERS][TILE_N][GROUP] sums of pieces
  uint32_t first_row;        // compacted row that row 0 of the gradient is
  uint32_t rows;             // at most
  uint32_t vocab;          // all classes
  uint32_t hidden;           // columns of the matrices read, padded where those of dC are not a multiple of 8
  uint32_t adapter_column;   // dE: from which on columns of C are its adapter's, a multiple of 64; or beyond all
  uint32_t first_class;      // of the range, a multiple of 128
  uint32_t range;            // classes of the range
  uint32_t class_tiles;      // ceil(vocab / 128)
  uint32_t overwrite;        // 1 for the first that writes the output; 0: add to what is there
  uint8_t* exponents;        // dC of several chunks of rows: [strips][CLUSTER][vocab] of Between, else null
  uint32_t last;             // dC: 1 for the last chunk of rows, which rounds to T
  uint32_t band;             // at least 1: strips of 384 columns that go through the output tiles together, so
                             // many that their part of C or E stays in L2
  uint32_t grad_columns;     // columns of dC; those past them are computed and not written
  uint32_t wide;             // where MIXED: strips of whole width, before the narrow ones
};

// Of the tiles that an output sums, [first, end).
struct Part {
  uint32_t output, first, end;
};
struct Parts {
  uint32_t count;
  Part list[PARTS_MAX];
};

struct ProductPlan {
  Ring<TILE_M, TILE_N, STAGES, Share::A> ring;
  uint16_t kept[OUTER_MAX];   // kept tiles of each outer tile
  uint16_t order[OUTER_MAX];  // outer tiles, most kept first
  uint32_t bits[WORDS_MAX];   // [outer tile][words] which inner tiles are kept
  union {
    alignas(16) float masses[CONSUMERS][TILE_N];  // dC: the averages' part of each group's tile
    Parts parts;                                  // dE: of the outputs after the whole rounds, this cluster's
  };
};

// "Outer" tiles are those of the output (rows for dE, classes for dC), "inner" ones are summed over. MIXED: of any number of
// narrow strips, else of the last one at most.
template <bool CLASSIFIER, bool MIXED>
struct ProductTiles {
  uint32_t rows, outer, inner, words, strips, rounds, share, cluster, clusters;

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
    const uint32_t all = outer * strips, rest = all % clusters;
    rounds = all / clusters;
    share = rounds + ((rounds % 2 ? clusters - 1 - cluster : cluster) < rest);
  }
  // Takes from the plan what `list_parts` left there, in the place of an output of a round that is not whole.
  __device__ void take_parts(const ProductPlan& plan, const ProductParams& p) {
    if (!CLASSIFIER && p.parts) share = rounds + plan.parts.count;
  }
  __device__ uint32_t output(uint32_t n, uint32_t of_cluster) const {
    return n * clusters + (n % 2 ? clusters - 1 - of_cluster : of_cluster);
  }
  // The n-th output of this block, or part of one: its tile, its first column and which tiles it sums.
  __device__ void decode(const ProductPlan& plan, const ProductParams& p, uint32_t n, uint32_t& tile,
                         uint32_t& column, bool& narrow, uint32_t& first, uint32_t& end) const {
    Part part{output(n, cluster), 0, inner};
    if (!CLASSIFIER && p.parts && n >= rounds) part = plan.parts.list[n - rounds];
    place(p, part.output, tile, column, narrow);
    tile = plan.order[tile], first = part.first, end = part.end;
  }
  // Of an output, the place of its tile in the order and its first column. A band of strips goes through all tiles before
  // the next one does: what it reads of C or E comes from L2 however the kept tiles are strewn.
  __device__ void place(const ProductParams& p, uint32_t output, uint32_t& at, uint32_t& column, bool& narrow) const {
    if constexpr (MIXED) {
      place_mixed(p, output, at, column, narrow);
      return;
    }
    const uint32_t band = output / (p.band * outer), inside = output - band * p.band * outer;
    const uint32_t width = min(p.band, strips - band * p.band);
    at = inside / width;
    column = (band * p.band + inside % width) * STRIP;
    narrow = p.hidden - column <= CLUSTER * NARROW;
    column += cluster_rank() * (narrow ? NARROW : TILE_N);
  }
  // Narrow outputs take two thirds of the time: of dE's, which are few, they come last; of dC's, each cluster gets both
  // kinds in turn.
  __device__ void place_mixed(const ProductParams& p, uint32_t output, uint32_t& at, uint32_t& column,
                              bool& narrow) const {
    uint32_t from = 0, count = strips, place = output;
    if constexpr (!CLASSIFIER) {
      const bool late = output >= p.wide * outer;
      from = late ? p.wide : 0, count = late ? strips - p.wide : p.wide, place = late ? output - p.wide * outer : output;
    }
    const uint32_t band = place / (p.band * outer), inside = place - band * p.band * outer;
    const uint32_t width = min(p.band, count - band * p.band);
    at = inside / width;
    const uint32_t strip = from + band * p.band + (CLASSIFIER ? (inside + 2 * at) % width : inside % width);
    narrow = strip >= p.wide;
    column = strip * STRIP - (narrow ? (strip - p.wide) * (STRIP - CLUSTER * NARROW) : 0);
    column += cluster_rank() * (narrow ? NARROW : TILE_N);
  }
  // A warp: a cluster's parts of the outputs after the whole rounds, where all tiles are kept. Each cluster gets as much as it
  // has less than the others, so that all finish together.
  __device__ void list_parts(const ProductParams& p, uint32_t of_cluster, Parts& parts) const {
    const uint32_t lane = threadIdx.x % WARP, all = outer * strips;
    auto cost = [&](uint32_t output) {  // of each of its tiles
      uint32_t at, column;
      bool narrow;
      place(p, output, at, column, narrow);
      return narrow ? 2u : 3u;
    };
    uint32_t total = 0;
    for (uint32_t one = lane; one < all; one += WARP) total += cost(one);
    const uint32_t fair = (__reduce_add_sync(~0u, total) * inner + clusters - 1) / clusters;
    auto room = [&](uint32_t other) {
      uint32_t taken = 0;
      for (uint32_t n = 0; n < rounds; ++n) taken += cost(output(n, other));
      return fair - min(fair, taken * inner);
    };
    uint32_t begin = 0;
    for (uint32_t other = lane; other < of_cluster; other += WARP) begin += room(other);
    begin = __reduce_add_sync(~0u, begin);
    const uint32_t end = begin + room(of_cluster);
    uint32_t from = 0, count = 0;
    for (uint32_t output = rounds * clusters; output < all; ++output) {
      const uint32_t each = cost(output);
      auto tile_at = [&](uint32_t place) { return place > from ? min((place - from) / each, inner) : 0; };
      const Part part{output, tile_at(begin), tile_at(end)};
      from += each * inner;
      if (part.first >= part.end) continue;
      if (lane == 0) parts.list[count] = part;
      ++count;
    }
    if (lane == 0) parts.count = count;
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
template <bool CLASSIFIER, bool MIXED>
__device__ void list_outputs(ProductPlan& plan, const ProductTiles<CLASSIFIER, MIXED>& tiles, const ProductParams& p) {
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
  if (!CLASSIFIER && p.parts && threadIdx.x < WARP) tiles.list_parts(p, tiles.cluster, plan.parts);
}

// Those of the bits [begin, begin + 32) that are in [first, end), which is not before them nor after.
__device__ __forceinline__ uint32_t bits_within(uint32_t first, uint32_t end, uint32_t begin) {
  const uint32_t from = first > begin ? ~0u << (first - begin) : ~0u;
  return end - begin < WARP ? from & ((1u << (end - begin)) - 1) : from;
}

// One thread: the kept tiles of each output, in order.
template <bool CLASSIFIER, bool MIXED, typename Other>
__device__ void produce(ProductPlan& plan, const TensorMap* gradient, const Other& other, const ProductParams& p) {
  ProductTiles<CLASSIFIER, MIXED> tiles(p);
  tiles.take_parts(plan, p);
  Filler ring(plan.ring);
  for (uint32_t n = 0; n < tiles.share; ++n) {
    uint32_t tile, column, first, end;
    bool narrow;
    tiles.decode(plan, p, n, tile, column, narrow, first, end);
    for (uint32_t word = first / WARP; word * WARP < end; ++word) {
      uint32_t todo = plan.bits[tile * tiles.words + word];
      if (!CLASSIFIER) todo &= bits_within(first, end, word * WARP);
      for (; todo; todo &= todo - 1) {
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
