// What every kernel of attention shares: the problem, and which keys a query sees.
#pragma once
#include "common.cuh"

constexpr float LN2 = 0.6931471805599453f;

// Numbers apart of a tensor's batch entries, positions and heads. The last dimension is contiguous.
struct StrideParams {
  int64_t batch, time, head;
};

// Offset of position 0 of a head.
__device__ __forceinline__ int64_t offset(const StrideParams &strides, uint32_t batch, uint32_t head) {
  return batch * strides.batch + head * strides.head;
}

struct AttentionParams {
  const void *q, *k, *v;         // (batch, queries, heads, head_dim), (batch, keys, heads / group, head_dim) twice
  void *out;                     // (batch, queries, heads, head_dim), contiguous
  float *lse;                    // (batch, heads, queries)
  const void *out_grad;          // as out
  float *delta;                  // (batch, heads, queries): rows' sums of out_grad * out
  float *log2_lse;               // on Hopper lse / ln 2, there as delta (batch, heads, queries rounded up to 128)
  void *q_grad, *k_grad, *v_grad;  // out, contiguous
  StrideParams q_strides, k_strides, v_strides;
  uint32_t batch, queries, keys, heads, group, head_dim;
  uint32_t causal, window;       // query i is at position i + keys - queries and sees the `window` keys up to itself
  float scale, softcap;          // softcap 0 for none
};

// Where the tiles of a block lie.
struct Head {
  uint32_t batch, head;

  // Offset of position 0 of this head in a contiguous (batch, time, heads, head_dim).
  __device__ __forceinline__ int64_t contiguous(const AttentionParams &p, uint32_t time, uint32_t heads) const {
    return ((int64_t)batch * time * heads + head) * p.head_dim;
  }
  // Offset in (batch, heads, queries).
  __device__ __forceinline__ int64_t rows(const AttentionParams &p) const { return ((int64_t)batch * p.heads + head) * p.queries; }
};

// Which keys a query sees.
struct Sight {
  int offset, keys;
  bool causal;
  uint32_t window;

  __device__ __forceinline__ explicit Sight(const AttentionParams &p)
      : offset((int)p.keys - (int)p.queries), keys(p.keys), causal(p.causal), window(p.window) {}

  __device__ __forceinline__ bool sees(int query, int key) const {
    return key < keys && (!causal || (uint32_t)(query + offset - key) < window);
  }
  // Whether every one of these queries sees every one of these keys.
  __device__ __forceinline__ bool all(int query, int queries, int key, int keys_) const {
    if (key + keys_ > keys) return false;
    return !causal || (query + offset >= key + keys_ - 1 && (uint32_t)(query + queries - 1 + offset - key) < window);
  }
  // Tiles of N keys, from the first to before the last, that some of these queries see.
  template <int N> __device__ __forceinline__ int2 tiles_of_keys(int query, int queries) const {
    int first = 0, last = keys - 1;
    if (causal) {
      last = min(last, query + queries - 1 + offset);
      first = (int)max((int64_t)0, (int64_t)query + offset - (int64_t)window + 1);
    }
    return make_int2(first / N, last < first ? first / N : last / N + 1);
  }
  // Tiles of N queries that see some of these keys.
  template <int N> __device__ __forceinline__ int2 tiles_of_queries(int key, int keys_, int queries) const {
    int first = 0, last = queries - 1;
    if (causal) {
      first = max(0, key - offset);
      last = (int)min((int64_t)last, (int64_t)min(key + keys_, keys) - 1 - offset + (int64_t)window - 1);
    }
    return make_int2(first / N, last < first ? first / N : last / N + 1);
  }
};
