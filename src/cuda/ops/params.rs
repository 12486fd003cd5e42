//! The parameters of the kernels of [`crate::ops`], field by field as in `cuda/*.cu`. Pointers are device addresses, 0 for
//! null.

use crate::cuda::params::params;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

params! {
    /// `rms_norm.cu`
    RmsNormParams {
        x: u64,
        residual: u64,
        weight: u64,
        sum: u64,
        normed: u64,
        upstream: u64,
        x_grad: u64,
        inverse_rms: u64,
        partials: u64,
        weight_grad: u64,
        rows: u64,
        size: u32,
        chunk_rows: u32,
        chunks: u32,
        aligned: u32,
        eps: f32,
        offset: f32,
    }
    /// `gated.cu`
    GatedParams {
        gate: u64,
        up: u64,
        upstream: u64,
        out: u64,
        gate_grad: u64,
        up_grad: u64,
        gate_stride: i64,
        up_stride: i64,
        columns: u32,
        gelu: u32,
        aligned: u32,
        unused: u32,
    }
    /// `rope.cu`
    RopeParams {
        x: u64,
        cos: u64,
        sin: u64,
        out: u64,
        batch_stride: i64,
        time_stride: i64,
        head_stride: i64,
        time: u32,
        heads: u32,
        head_dim: u32,
        pairs: u32,
        direction: f32,
        aligned: u32,
    }
    /// `attention.cuh`: numbers apart of batch entries, positions and heads.
    Strides {
        batch: i64,
        time: i64,
        head: i64,
    }
    /// `attention.cuh`
    AttentionParams {
        q: u64,
        k: u64,
        v: u64,
        out: u64,
        lse: u64,
        out_grad: u64,
        delta: u64,
        q_grad: u64,
        k_grad: u64,
        v_grad: u64,
        q_strides: Strides,
        k_strides: Strides,
        v_strides: Strides,
        batch: u32,
        queries: u32,
        keys: u32,
        heads: u32,
        group: u32,
        head_dim: u32,
        causal: u32,
        window: u32,
        scale: f32,
        softcap: f32,
    }
    /// `optimizer.cu`
    GradientParams {
        gradient: u64,
        partials: u64,
        factor: u64,
        out: u64,
        count: u64,
        aligned: u32,
        unused: u32,
    }
    /// `optimizer.cu`
    NormParams {
        partials: u64,
        norm: u64,
        factor: u64,
        count: u64,
        max_norm: f32,
        unused: u32,
    }
    /// `optimizer.cu`
    AdamWParams {
        gradient: u64,
        variable: u64,
        master: u64,
        first_moment: u64,
        second_moment: u64,
        count: u64,
        beta1: f32,
        beta2: f32,
        one_minus_beta1: f32,
        one_minus_beta2: f32,
        keep: f32,
        rate: f32,
        second_scale: f32,
        eps: f32,
        aligned: u32,
        unused: u32,
    }
}
