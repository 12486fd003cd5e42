// activation(gate) * up, number by number, and its gradients. The activation is SiLU or the tanh form of GELU.
#include "vectors.cuh"

constexpr int ROW_THREADS = 256;

struct GatedParams {
  const void *gate, *up;        // (rows, columns), their rows `gate_stride` and `up_stride` numbers apart
  const void *upstream;         // (rows, columns)
  void *out;                    // out: the product
  void *gate_grad, *up_grad;    // out
  int64_t gate_stride, up_stride;
  uint32_t columns, gelu, aligned, unused;
};

// An activation and its derivative.
struct Activation {
  float value, slope;

  static __device__ __forceinline__ Activation silu(float x) {
    const float sigmoid = 1.f / (1.f + fast_exp(-x));
    return {x * sigmoid, sigmoid * (1.f + x * (1.f - sigmoid))};
  }
  static __device__ __forceinline__ Activation gelu(float x) {
    constexpr float FACTOR = 0.7978845608028654f, CUBIC = 0.044715f;  // sqrt(2 / pi)
    const float tanh = fast_tanh(FACTOR * x * (1.f + CUBIC * x * x));
    // Far beyond where tanh is 1: the square of a larger number may be infinite.
    const float near = fminf(fmaxf(x, -1e4f), 1e4f);
    const float inner_slope = FACTOR * (1.f + 3.f * CUBIC * near * near);
    return {0.5f * x * (1.f + tanh), 0.5f * (1.f + tanh) + 0.5f * x * (1.f - tanh * tanh) * inner_slope};
  }
  static __device__ __forceinline__ Activation of(float x, bool gelu_) { return gelu_ ? gelu(x) : silu(x); }
};

// A block has a part of a row: its numbers at `column` and, in the results, at `at`.
template <typename T, int N, class Each> __device__ __forceinline__ void each(const GatedParams &p, Each f) {
  const uint32_t column = (blockIdx.y * ROW_THREADS + threadIdx.x) * N;
  if (column >= p.columns) return;
  const int64_t row = blockIdx.x;
  const auto gate = Numbers<T, N>::load((const T *)p.gate + row * p.gate_stride + column);
  const auto up = Numbers<T, N>::load((const T *)p.up + row * p.up_stride + column);
  f(gate, up, row * p.columns + column);
}

template <typename T, int N> __device__ void forward(const GatedParams &p) {
  each<T, N>(p, [&](const Numbers<T, N> &gate, const Numbers<T, N> &up, int64_t at) {
    Numbers<T, N> out;
#pragma unroll
    for (int j = 0; j < N; j++) out.set(j, Activation::of(gate.get(j), p.gelu).value * up.get(j));
    out.store((T *)p.out + at);
  });
}

template <typename T, int N> __device__ void backward(const GatedParams &p) {
  each<T, N>(p, [&](const Numbers<T, N> &gate, const Numbers<T, N> &up, int64_t at) {
    const auto upstream = Numbers<T, N>::load((const T *)p.upstream + at);
    Numbers<T, N> of_gate, of_up;
#pragma unroll
    for (int j = 0; j < N; j++) {
      const auto activation = Activation::of(gate.get(j), p.gelu);
      of_gate.set(j, upstream.get(j) * up.get(j) * activation.slope);
      of_up.set(j, upstream.get(j) * activation.value);
    }
    of_gate.store((T *)p.gate_grad + at);
    of_up.store((T *)p.up_grad + at);
  });
}

FOR_DTYPES(gated_forward, forward, GatedParams, ROW_THREADS)
FOR_DTYPES(gated_backward, backward, GatedParams, ROW_THREADS)
