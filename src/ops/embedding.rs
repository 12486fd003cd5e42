//! Rows of a table.

use crate::by_class::ByClass;
use crate::native::Element;
use crate::node::{attach, Node};
use crate::positions::to_i64;
use candle_core::{bail, CpuStorage, DType, InplaceOp1, Layout, Result, Shape, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

/// The rows of `table` that `ids` name: `y_i = table_(ids_i)`.
///
/// - `table` of shape `(V, D)`, in bf16, f16, f32 or f64; so is the result, of shape `(.., D)`.
/// - `ids` of shape `(..)`, in u32, i64 or i32.
///
/// The gradient of a row of the table is the sum of the upstream gradients of its places, in their order, in f32 (f64 for f64) and
/// rounded once; Candle's `index_select` sums in the dtype of the table, where the 257th gradient of a frequent token is lost
/// in bf16. [`backward`](crate::backward) adds it to what the table, as a tied head, has from a loss, row by row and in
/// place (rounded once more), without a second tensor of the table's size.
///
/// ```
/// # use candle_core::{Device, Tensor, Var};
/// use candle_cut_cross_entropy::{backward, ops::embedding};
/// # fn main() -> candle_core::Result<()> {
/// let table = Var::new(&[[1f32, 2.], [3., 4.], [5., 6.]], &Device::Cpu)?;
/// let rows = embedding(&table, &Tensor::new(&[2u32, 0, 2], &Device::Cpu)?)?;
/// assert_eq!(rows.to_vec2::<f32>()?, [[5., 6.], [1., 2.], [5., 6.]]);
/// let gradients = backward(&rows.sum_all()?)?;
/// let of_table = gradients.get(&table).unwrap().to_vec2::<f32>()?;
/// assert_eq!(of_table, [[1., 1.], [0., 0.], [2., 2.]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A table that is no matrix or has no numbers, tensors on two devices, ids that are no integers, and on the CPU an id outside `[0, V)`. Elsewhere
/// ids are not checked.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let Ok((vocab, columns)) = table.dims2() else {
        bail!(
            "embedding: the table must be a matrix (V, D), got {:?}",
            table.dims()
        )
    };
    if table.elem_count() == 0 {
        bail!(
            "embedding: no numbers in a table of shape {:?}",
            table.dims()
        )
    }
    let floats = [DType::BF16, DType::F16, DType::F32, DType::F64];
    if !floats.contains(&table.dtype()) {
        bail!(
            "embedding: the table must be bf16, f16, f32 or f64, got {:?}",
            table.dtype()
        )
    }
    if !ids.dtype().is_int() {
        bail!("embedding: ids must be integers, got {:?}", ids.dtype())
    }
    if !ids.device().same_device(table.device()) {
        bail!(
            "embedding: ids are on {:?}, the table on {:?}",
            ids.device().location(),
            table.device().location()
        )
    }
    let flat = to_i64(ids)?.flatten_all()?.contiguous()?;
    if flat.device().is_cpu() {
        let outside = |id: &i64| !(0..vocab as i64).contains(id);
        if let Some(id) = flat.to_vec1::<i64>()?.into_iter().find(outside) {
            bail!("embedding: id {id} is outside [0, {vocab})")
        }
    }
    let rows = table.detach().contiguous()?.index_select(&flat, 0)?;
    let shape = Shape::from([ids.dims(), &[columns]].concat());
    match table.track_op() {
        true => attach(rows, &[table], Embedding(flat))?.reshape(shape),
        false => rows.reshape(shape),
    }
}

/// Of the ids, i64.
struct Embedding(Tensor);

impl Node for Embedding {
    const NAME: &'static str = "embedding";

    fn backward(&self, arguments: &[&Tensor], upstream: &Tensor) -> Result<Vec<Option<Tensor>>> {
        self.backward_onto(arguments, upstream, &|_| None)
    }

    fn backward_onto(
        &self,
        arguments: &[&Tensor],
        upstream: &Tensor,
        so_far: &dyn Fn(&Tensor) -> Option<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let table = arguments[0];
        let rows = upstream.detach().contiguous()?;
        let sum = match so_far(table) {
            Some(sum) => sum.contiguous()?,
            None => table.zeros_like()?,
        };
        Ok(vec![Some(with_rows(sum, &self.0, &rows)?)])
    }
}

/// `sum` with these rows added where their ids say, in place but for dtypes and devices that only Candle knows.
fn with_rows(sum: Tensor, ids: &Tensor, rows: &Tensor) -> Result<Tensor> {
    if ids.elem_count() == 0 {
        return Ok(sum);
    }
    if sum.device().is_cpu() {
        let ids = ids.to_vec1::<i64>()?.into_iter().map(|id| id as u32);
        let by_id = ByClass::new(&ids.collect::<Vec<_>>(), sum.dim(0)?);
        sum.inplace_op1(&AddRows { by_id, rows })?;
        return Ok(sum);
    }
    #[cfg(feature = "cuda")]
    if crate::cuda::class_logits::add_rows(&sum, ids, rows)? {
        return Ok(sum);
    }
    sum.index_add(ids, rows, 0)
}

struct AddRows<'a> {
    by_id: ByClass,
    rows: &'a Tensor,
}

impl InplaceOp1 for AddRows<'_> {
    fn name(&self) -> &'static str {
        "add-rows"
    }

    fn cpu_fwd(&self, sums: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (start, shape) = (layout.start_offset(), layout.shape());
        let at = start..start + shape.elem_count();
        let columns = shape.dims2()?.1;
        match sums {
            CpuStorage::BF16(sums) => self.add::<bf16>(&mut sums[at], columns),
            CpuStorage::F16(sums) => self.add::<f16>(&mut sums[at], columns),
            CpuStorage::F32(sums) => self.add::<f32>(&mut sums[at], columns),
            CpuStorage::F64(sums) => self.add::<f64>(&mut sums[at], columns),
            _ => bail!("embedding: a gradient that is not of a float"),
        }
    }
}

impl AddRows<'_> {
    fn add<T: Element>(&self, sums: &mut [T], columns: usize) -> Result<()> {
        let (storage, layout) = self.rows.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else {
            bail!("embedding: an upstream gradient that is not on the CPU")
        };
        let rows = &T::cpu_storage_as_slice(storage)?[layout.start_offset()..];
        sums.par_chunks_mut(columns).enumerate().for_each_init(
            || {
                (
                    vec![T::Real::default(); columns],
                    vec![T::Real::default(); columns],
                )
            },
            |(sum, row), (id, sums)| {
                let entries = self.by_id.entries(id);
                if entries.is_empty() {
                    return;
                }
                T::widen(sums, sum);
                for entry in entries {
                    T::widen(&rows[entry * columns..][..columns], row);
                    for (sum, value) in sum.iter_mut().zip(&*row) {
                        *sum += *value;
                    }
                }
                T::narrow(sum, sums);
            },
        );
        Ok(())
    }
}
