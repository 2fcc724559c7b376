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
    /// A tensor's values.
    fn upload(on: &Executor, tensor: &Tensor) -> Result<Floats, DeviceError> {
        let bytes = tensor.bytes();
        Ok(match &tensor.dtype {
            Dtype::F16 => Floats::F16(on.upload_bytes(bytes)?),
            Dtype::Bf16 => Floats::Bf16(on.upload_bytes(bytes)?),
            Dtype::F32 => Floats::F32(on.upload_bytes(bytes)?),
            Dtype::Format(_) => Floats::F32(on.upload_bytes(bytemuck::cast_slice(&tensor.to_f32()))?),
        })
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
        let mut parts = Vec::new();
        for id in &stored.layers {
            match &weights[*id].weight {
                Weight::Dense(tensor) => return Ok(Matrix::Dense(uploads.dense(on, tensor)?)),
                Weight::Quantized { matrix, .. } => {
                    parts.push((weights[*id].rows as u32, matrix.words.as_slice(), matrix.scales.as_slice()));
                }
            }
        }
        let q = &layout.specs[stored.spec];
        Ok(Matrix::Packed(Arc::new(DeviceMatrix::upload(on, q, stored.shape.cols, &parts)?)))
    }
}

/// The unquantized matrices of the first model that was uploaded: later ones that share tensors with it share them on the
/// device, too.
#[derive(Default)]
pub struct Uploads {
    /// By address of the tensors, which are kept so that nothing else comes to lie there.
    first: Option<HashMap<usize, (Tensor, Arc<Floats>)>>,
    /// Those of the model that is being uploaded.
    now: HashMap<usize, (Tensor, Arc<Floats>)>,
}

impl Uploads {
    fn dense(&mut self, on: &Executor, tensor: &Tensor) -> Result<Arc<Floats>, DeviceError> {
        let address = tensor.bytes().as_ptr().addr();
        if let Some((_, there)) = self.first.as_ref().unwrap_or(&self.now).get(&address) {
            return Ok(there.clone());
        }
        let new = Arc::new(Floats::upload(on, tensor)?);
        if self.first.is_none() {
            self.now.insert(address, (tensor.clone(), new.clone()));
        }
        Ok(new)
    }

    /// A whole model has been uploaded.
    pub fn done(&mut self) {
        self.first.get_or_insert_with(|| std::mem::take(&mut self.now));
    }
}
