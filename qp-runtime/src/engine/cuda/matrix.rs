//! Matrices on a device.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use qp_codegen::ir::Elem;
use qp_codegen::layout::Packed;

use super::layout::{Form, Layout, Stored};
use crate::codec::scale_count;
use crate::device::grouped::GroupedMatrix;
use crate::device::ops::DeviceMatrix;
use crate::device::{Buffer, DeviceError, Executor};
use crate::model::{Dtype, LayerId, Tensor, Weight, Weights};

/// A buffer of floats of any width.
pub enum Floats {
    /// IEEE half precision.
    F16(Buffer<f16>),
    /// bfloat16.
    Bf16(Buffer<bf16>),
    /// Single precision.
    F32(Buffer<f32>),
}

impl Floats {
    /// The values of tensors, one behind the other, which are `elem`.
    fn upload(on: &Executor, elem: Elem, tensors: &[&Tensor]) -> Result<Floats, DeviceError> {
        let mut out = Floats::zeroed(on, elem, tensors.iter().map(|t| t.len()).sum())?;
        let mut at = 0;
        for tensor in tensors {
            let made = matches!(tensor.dtype, Dtype::Format(_)).then(|| tensor.to_f32());
            let bytes = made.as_ref().map_or_else(|| tensor.bytes(), |made| bytemuck::cast_slice(made));
            match &mut out {
                Floats::F16(buffer) => buffer.write_bytes(at, bytes)?,
                Floats::Bf16(buffer) => buffer.write_bytes(at, bytes)?,
                Floats::F32(buffer) => buffer.write_bytes(at, bytes)?,
            }
            at += tensor.len();
        }
        Ok(out)
    }

    fn zeroed(on: &Executor, elem: Elem, len: usize) -> Result<Floats, DeviceError> {
        Ok(match elem {
            Elem::F16 => Floats::F16(on.zeroed(len)?),
            Elem::BF16 => Floats::Bf16(on.zeroed(len)?),
            _ => Floats::F32(on.zeroed(len)?),
        })
    }
}

/// A matrix on a device. Cheap to clone.
#[derive(Clone)]
pub enum Matrix {
    /// Packed words, scales and tables.
    Packed(Arc<DeviceMatrix>),
    /// Of a format, packed.
    Grouped(Arc<GroupedMatrix>),
    /// Rows × columns.
    Dense(Arc<Floats>),
}

impl Matrix {
    /// Zeros, of a shape and form.
    ///
    /// # Errors
    /// A full GPU.
    pub fn zeroed(on: &Executor, layout: &Layout, stored: &Stored) -> Result<Matrix, DeviceError> {
        let shape = stored.shape;
        Ok(match &stored.form {
            Form::Dense(elem) => Matrix::Dense(Arc::new(Floats::zeroed(on, *elem, shape.len() as usize)?)),
            Form::Grouped(terms) => Matrix::Grouped(Arc::new(GroupedMatrix::zeroed(on, terms, shape)?)),
            Form::Packed(_) | Form::Shared => {
                let q = &layout.specs[stored.spec];
                let words = vec![0; Packed::new(q, shape).words()];
                let scales = vec![bf16::ONE; scale_count(q, shape)];
                let matrix = DeviceMatrix::upload(on, q, shape.cols, &[(shape.rows, &words, &scales)])?;
                Matrix::Packed(Arc::new(matrix))
            }
        })
    }

    /// The matrix of a model's layers.
    ///
    /// # Errors
    /// A full GPU.
    pub fn upload(
        on: &Executor,
        layout: &Layout,
        stored: &Stored,
        weights: &Weights,
        uploads: &mut Uploads,
    ) -> Result<Matrix, DeviceError> {
        if let Form::Grouped(terms) = &stored.form {
            let exact = |id: &LayerId| weights[*id].weight.dense().and_then(Tensor::exact);
            let parts: Vec<_> = stored.layers.iter().filter_map(exact).map(|(r, t)| (&**r, t)).collect();
            return Ok(Matrix::Grouped(Arc::new(GroupedMatrix::upload(on, terms, &parts)?)));
        }
        let (mut parts, mut tensors) = (Vec::new(), Vec::new());
        for id in &stored.layers {
            match &weights[*id].weight {
                Weight::Dense(tensor) => tensors.push(tensor),
                Weight::Quantized { matrix, .. } => {
                    parts.push((weights[*id].rows as u32, matrix.words.as_slice(), matrix.scales.as_slice()));
                }
            }
        }
        if let Form::Dense(elem) = &stored.form {
            return Ok(Matrix::Dense(uploads.dense(on, *elem, &tensors)?));
        }
        let q = &layout.specs[stored.spec];
        Ok(Matrix::Packed(Arc::new(DeviceMatrix::upload(on, q, stored.shape.cols, &parts)?)))
    }
}

/// The unquantized matrices of the first model that was uploaded: later ones that share tensors with it share them on the
/// device, too.
#[derive(Default)]
pub struct Uploads {
    first: Option<Known>,
    /// Those of the model that is being uploaded.
    now: Known,
}

/// Matrices by addresses of their tensors, which are kept so that nothing else comes to lie there.
type Known = HashMap<Vec<usize>, (Vec<Tensor>, Arc<Floats>)>;

impl Uploads {
    fn dense(&mut self, on: &Executor, elem: Elem, tensors: &[&Tensor]) -> Result<Arc<Floats>, DeviceError> {
        let addresses: Vec<usize> = tensors.iter().map(|tensor| tensor.bytes().as_ptr().addr()).collect();
        if let Some((_, there)) = self.first.as_ref().unwrap_or(&self.now).get(&addresses) {
            return Ok(there.clone());
        }
        let new = Arc::new(Floats::upload(on, elem, tensors)?);
        if self.first.is_none() {
            let kept = tensors.iter().map(|tensor| (*tensor).clone()).collect();
            self.now.insert(addresses, (kept, new.clone()));
        }
        Ok(new)
    }

    /// A whole model has been uploaded.
    pub fn done(&mut self) {
        self.first.get_or_insert_with(|| std::mem::take(&mut self.now));
    }
}
