//! A product that is added to a matrix in place, in main memory.

use candle_core::{bail, CpuStorage, InplaceOp3, Layout, Result, WithDType};

/// `sums += g^T e` for `g` `(rows, V)` and `e` `(rows, D)`, all contiguous, on all threads. In f32 or f64.
pub(super) struct AddProduct;

impl InplaceOp3 for AddProduct {
    fn name(&self) -> &'static str {
        "add-product"
    }

    fn cpu_fwd(
        &self,
        sums: &mut CpuStorage,
        sums_layout: &Layout,
        g: &CpuStorage,
        g_layout: &Layout,
        e: &CpuStorage,
        e_layout: &Layout,
    ) -> Result<()> {
        let (g, e) = ((g, g_layout), (e, e_layout));
        let (start, end) = ends(sums_layout)?;
        match sums {
            CpuStorage::F32(sums) => add(&mut sums[start..end], g, e, 1.),
            CpuStorage::F64(sums) => add(&mut sums[start..end], g, e, 1.),
            _ => bail!("{}: sums must be f32 or f64", self.name()),
        }
    }
}

fn ends(layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(ends) => Ok(ends),
        None => bail!("expected a contiguous tensor, got {layout:?}"),
    }
}

fn add<R: WithDType>(
    sums: &mut [R],
    (g, g_layout): (&CpuStorage, &Layout),
    (e, e_layout): (&CpuStorage, &Layout),
    one: R,
) -> Result<()> {
    let (rows, vocab) = g_layout.shape().dims2()?;
    let hidden = e_layout.shape().dims2()?.1;
    let slice = |storage, layout| -> Result<&[R]> {
        let (start, end) = ends(layout)?;
        Ok(&R::cpu_storage_as_slice(storage)?[start..end])
    };
    let (g, e) = (slice(g, g_layout)?, slice(e, e_layout)?);
    assert_eq!(sums.len(), vocab * hidden);
    assert_eq!(g.len(), rows * vocab);
    assert_eq!(e.len(), rows * hidden);
    // SAFETY: the slices have the sizes of their matrices, and `sums`, borrowed mutably, overlaps neither of the others.
    unsafe {
        gemm::gemm(
            vocab,
            hidden,
            rows,
            sums.as_mut_ptr(),
            1,
            hidden as isize,
            true,
            g.as_ptr(),
            vocab as isize,
            1,
            e.as_ptr(),
            1,
            hidden as isize,
            one,
            one,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(rayon::current_num_threads()),
        )
    }
    Ok(())
}
