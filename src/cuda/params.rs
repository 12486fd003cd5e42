//! The parameters of the kernels, field by field as in `cuda/*.cu`. Pointers are device addresses, 0 for null.

use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Debug, Clone, Copy, Default)]
        pub(super) struct $name { $(pub $field: $ty),* }
        // SAFETY: plain numbers, laid out as the kernel's struct.
        unsafe impl DeviceRepr for $name {}
    )*};
}
#[cfg(feature = "models")]
pub(super) use params;

params! {
    /// `rows.cu`
    PickParams {
        targets: u64,
        row_embedding: u64,
        row_position: u64,
        row_target: u64,
        count: u64,
        packed: u64,
        ignore_index: i64,
        first_class: i64,
        positions: u32,
        time: u32,
        shift: u32,
        vocab: u32,
    }
    /// `rows.cu`
    MergeParams {
        partials: u64,
        target_logit: u64,
        row_position: u64,
        row_target: u64,
        count: u64,
        row_max: u64,
        row_log_sum: u64,
        packed: u64,
        first_row: u32,
        group_rows: u32,
        splits: u32,
        positions: u32,
        z_loss: f32,
        sharded: u32,
    }
    /// `rows.cu`
    ShardParams {
        max: u64,
        all: u64,
        row_max: u64,
        row_log_sum: u64,
        target_logit: u64,
        row_position: u64,
        row_target: u64,
        count: u64,
        here: u64,
        packed: u64,
        positions: u32,
        z_loss: f32,
    }
    /// `filter.cu`
    FilterParams {
        statistics: u64,
        row_max: u64,
        row_log_sum: u64,
        row_target: u64,
        count: u64,
        keep: u64,
        masses: u64,
        first_row: u32,
        group_rows: u32,
        class_tiles: u32,
        mass_stride: u32,
        embeddings_threshold: f32,
        classifier_threshold: f32,
        keep_targets: u32,
    }
    /// `filter.cu`
    ProbableParams {
        maxima: u64,
        sums: u64,
        row_log_sum: u64,
        row_target: u64,
        count: u64,
        redo: u64,
        keep: u64,
        masses: u64,
        first_row: u32,
        chunk_rows: u32,
        class_tiles: u32,
        mass_stride: u32,
        embeddings_threshold: f32,
        classifier_threshold: f32,
    }
    /// `filter.cu`
    CountParams {
        keep: u64,
        count: u64,
        kept: u64,
        class_tiles: u32,
    }
    /// `filter.cu`
    ScaleMassesParams {
        masses: u64,
        keep: u64,
        p_scale: u64,
        count: u64,
        scaled: u64,
        first_row: u32,
        class_tiles: u32,
        mass_stride: u32,
        bit: u32,
    }
    /// `filter.cu`
    SumMassesParams {
        masses: u64,
        row_scale: u64,
        count: u64,
        sums: u64,
        first_row: u32,
        rows: u32,
        class_tiles: u32,
        mass_stride: u32,
        scale: f32,
    }
    /// `filter.cu`
    ShareParams {
        classifier: u64,
        bias: u64,
        row_sums: u64,
        mass_sums: u64,
        shares: u64,
        mean_classes: u64,
        hidden: i64,
        vocab: i64,
        softcap: f32,
        aligned: u32,
        scale: f32,
    }
    /// `filter.cu`
    EntryParams {
        row_max: u64,
        row_log_sum: u64,
        target_logit: u64,
        row_target: u64,
        count: u64,
        keep: u64,
        p_scale: u64,
        target_scale: u64,
        embeddings_entry: u64,
        classifier_entry: u64,
        first_row: u32,
        rows: u32,
        class_tiles: u32,
        softcap: f32,
    }
    /// `filter.cu`
    ListTargetsParams {
        embeddings: u64,
        row_embedding: u64,
        sorted_row: u64,
        sorted_target: u64,
        entry: u64,
        count: u64,
        list: u64,
        combined: u64,
        slots: u64,
        target_bias: u64,
        hidden: i64,
        first_row: u32,
        rows: u32,
    }
    /// `rows.cu`
    LossParams {
        packed: u64,
        count: u64,
        positions: u32,
        mean: u32,
    }
    /// `rows.cu`
    ScaleParams {
        upstream: u64,
        row_max: u64,
        row_log_sum: u64,
        row_position: u64,
        count: u64,
        p_scale: u64,
        target_scale: u64,
        scale: u64,
        positions: u32,
        mean: u32,
        z_loss: f32,
    }
    /// `rows.cu`
    FinishParams {
        sums: u64,
        target_part: u64,
        row_target: u64,
        classifier: u64,
        row_embedding: u64,
        count: u64,
        scale: u64,
        row_scale: u64,
        embeddings_grad: u64,
        hidden: i64,
        first_row: u32,
    }
    /// `rows.cu`
    BiasParams {
        gradient: u64,
        count: u64,
        keep: u64,
        scale: u64,
        row_scale: u64,
        slots: u64,
        target_bias: u64,
        shares: u64,
        mass_sums: u64,
        bias_grad: u64,
        vocab: i64,
        first_class: i64,
        range: i64,
        first_row: u32,
        rows: u32,
        class_tiles: u32,
        overwrite: u32,
    }
    /// `rows.cu`
    ReferenceParams {
        gathered: u64,
        classifier: u64,
        bias: u64,
        row_target: u64,
        count: u64,
        reference: u64,
        hidden: i64,
        first_row: u32,
        softcap: f32,
    }
    /// `rows.cu`
    SumsParams {
        reference: u64,
        sums: u64,
        target_logit: u64,
        row_position: u64,
        row_target: u64,
        count: u64,
        row_max: u64,
        row_log_sum: u64,
        packed: u64,
        redo: u64,
        first_row: u32,
        chunk_rows: u32,
        class_tiles: u32,
        positions: u32,
        z_loss: f32,
    }
    /// `rows.cu`
    FactorParams {
        row_max: u64,
        row_log_sum: u64,
        target_logit: u64,
        row_target: u64,
        count: u64,
        redo: u64,
        factor: u64,
        target_part: u64,
        gathered: u64,
        hidden: i64,
        first_row: u32,
        mean: u32,
        softcap: f32,
        z_loss: f32,
    }
    /// `rows.cu`
    SharesParams {
        row_max: u64,
        row_log_sum: u64,
        count: u64,
        shares: u64,
        first_row: u32,
        z_loss: f32,
    }
    /// `rows.cu`
    UpstreamParams {
        upstream: u64,
        gradient: u64,
        numbers: i64,
    }
    /// `rows.cu`
    GatherParams {
        embeddings: u64,
        row_embedding: u64,
        count: u64,
        gathered: u64,
        chunks: i64,
        first_row: u32,
    }
    /// `forward_sm90a.cu`
    HopperForwardParams {
        count: u64,
        row_target: u64,
        bias: u64,
        partials: u64,
        target_logit: u64,
        pace: u64,
        statistics: u64,
        first_row: u32,
        rows: u32,
        classes: u32,
        depth: u32,
        splits: u32,
        tiles_per_split: u32,
        raster: u32,
        softcap: f32,
    }
    /// `gradient_sm90a.cu`
    HopperGradientParams {
        count: u64,
        row_target: u64,
        bias: u64,
        row_max: u64,
        row_log_sum: u64,
        p_scale: u64,
        target_scale: u64,
        keep: u64,
        gradient: u64,
        sums: u64,
        maxima: u64,
        masses: u64,
        target_logit: u64,
        first_row: u32,
        rows: u32,
        classes: u32,
        depth: u32,
        first_class: u32,
        range: u32,
        gradient_stride: u32,
        keep_stride: u32,
        raster: u32,
        softcap: f32,
    }
    /// `products_sm90a.cu`
    HopperProductParams {
        count: u64,
        keep: u64,
        scale: u64,
        out: u64,
        slots: u64,
        target_rows: u64,
        shares: u64,
        mass_rows: u64,
        list: u64,
        embeddings: u64,
        combined: u64,
        partials: u64,
        first_row: u32,
        rows: u32,
        classes: u32,
        depth: u32,
        first_class: u32,
        range: u32,
        keep_stride: u32,
        overwrite: u32,
        band: u32,
    }
    /// `forward_sm80.cu`
    ForwardParams {
        embeddings: u64,
        classifier: u64,
        bias: u64,
        row_embedding: u64,
        row_target: u64,
        count: u64,
        partials: u64,
        target_logit: u64,
        statistics: u64,
        hidden: i64,
        vocab: i64,
        first_row: u32,
        group_rows: u32,
        splits: u32,
        softcap: f32,
        aligned: u32,
    }
    /// `gradient_sm80.cu`
    GradientParams {
        embeddings: u64,
        classifier: u64,
        bias: u64,
        row_embedding: u64,
        row_target: u64,
        count: u64,
        row_max: u64,
        row_log_sum: u64,
        p_scale: u64,
        target_scale: u64,
        keep: u64,
        gradient: u64,
        hidden: i64,
        vocab: i64,
        first_class: i64,
        range: i64,
        first_row: u32,
        class_tiles: u32,
        softcap: f32,
        aligned: u32,
    }
    /// `products_sm80.cu`
    ProductParams {
        gradient: u64,
        operand: u64,
        row_embedding: u64,
        count: u64,
        keep: u64,
        scale: u64,
        result: u64,
        hidden: i64,
        vocab: i64,
        first_class: i64,
        range: i64,
        first_row: u32,
        rows: u32,
        class_tiles: u32,
        accumulate: u32,
        aligned: u32,
        shares: u64,
        mass_rows: u64,
        list: u64,
        combined: u64,
    }
    /// `rows.cu`
    SortParams {
        row_target: u64,
        count: u64,
        sorted_row: u64,
        sorted_target: u64,
        first_row: u32,
        rows: u32,
    }
    /// `rows.cu`
    TargetsParams {
        embeddings: u64,
        target_part: u64,
        row_embedding: u64,
        sorted_row: u64,
        sorted_target: u64,
        count: u64,
        slots: u64,
        target_rows: u64,
        target_bias: u64,
        hidden: i64,
        first_row: u32,
        rows: u32,
    }
}
