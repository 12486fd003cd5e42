// The classifier of a call: its own columns and, where it has a low-rank adapter, the adapter's after them.
#pragma once
#include "common.cuh"

// (V, hidden) as [own | 0 | adapter]: the embeddings are as wide, see src/low_rank.rs.
struct ClassifierParams {
  const void *own;         // (V, own_columns)
  const void *adapter;     // (V, rank), or null
  int64_t own_columns;     // hidden without an adapter
  int64_t adapter_column;  // where the adapter's columns begin, a multiple of 64; hidden without an adapter
  int64_t rank;
};

// The columns of some classes from `column` on, which are either's alone: where the first class has them, what lies between
// classes, and how many columns follow.
template <typename T> struct ClassColumns {
  const T *first;
  int64_t apart, left;

  __device__ __forceinline__ ClassColumns(const ClassifierParams &c, int64_t first_class, int64_t column) {
    const bool own = column < c.adapter_column;
    const int64_t in = own ? column : column - c.adapter_column;
    apart = own ? c.own_columns : c.rank;
    first = (const T *)(own ? c.own : c.adapter) + first_class * apart + in;
    left = apart - in;
  }
};

// One number of it.
template <typename T> __device__ __forceinline__ float class_number(const ClassifierParams &c, int64_t at, int64_t column) {
  if (column < c.own_columns) return to_float(((const T *)c.own)[at * c.own_columns + column]);
  if (column < c.adapter_column) return 0.f;
  return to_float(((const T *)c.adapter)[at * c.rank + column - c.adapter_column]);
}
