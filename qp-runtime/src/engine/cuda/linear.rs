//! Linear layers on a device: those of one input together, equal quantizers fused into one matrix.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use qp_codegen::ir::Elem;
use qp_codegen::layout::Packed;
use qp_codegen::spec::{Quantizer, Shape};

use crate::codec::PackedMatrix;
use crate::device::ops::{DeviceMatrix, first_rows};
use crate::device::{Buffer, DeviceError, Executor};
use crate::model::{Dtype, Linear, Tensor, Weight};

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
    pub fn upload(executor: &Executor, tensor: &Tensor) -> Result<Floats, DeviceError> {
        let bytes = tensor.bytes();
        Ok(match tensor.dtype {
            Dtype::F16 => Floats::F16(executor.upload_bytes(bytes)?),
            Dtype::Bf16 => Floats::Bf16(executor.upload_bytes(bytes)?),
            Dtype::F32 => Floats::F32(executor.upload_bytes(bytes)?),
            Dtype::Blocks(_) => Floats::F32(executor.upload_bytes(bytemuck::cast_slice(&tensor.to_f32()))?),
        })
    }

    /// Its element type.
    pub fn elem(&self) -> Elem {
        match self {
            Floats::F16(_) => Elem::F16,
            Floats::Bf16(_) => Elem::BF16,
            Floats::F32(_) => Elem::F32,
        }
    }
}

/// The matrix of a product or of an embedding.
#[derive(Clone)]
pub enum Matrix {
    /// Packed; of several layers one below the other.
    Quantized {
        /// By what.
        quantizer: Arc<Quantizer>,
        /// Its content hash.
        hash: String,
        /// The words.
        matrix: Arc<DeviceMatrix>,
    },
    /// Rows × columns.
    Dense(Arc<Floats>),
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
    fn dense(&mut self, executor: &Executor, tensor: &Tensor) -> Result<Arc<Floats>, DeviceError> {
        let address = tensor.bytes().as_ptr().addr();
        if let Some((_, there)) = self.first.as_ref().unwrap_or(&self.now).get(&address) {
            return Ok(there.clone());
        }
        let new = Arc::new(Floats::upload(executor, tensor)?);
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

impl Matrix {
    /// Uploads the matrix of one layer.
    pub fn upload(executor: &Executor, layer: &Linear, uploads: &mut Uploads) -> Result<Matrix, DeviceError> {
        match &layer.weight {
            Weight::Dense(tensor) => Ok(Matrix::Dense(uploads.dense(executor, tensor)?)),
            Weight::Quantized { quantizer, matrix } => packed(executor, quantizer, &[(0, layer, &**matrix)]),
        }
    }
}

/// A matrix that computes one layer, or several.
pub struct Product {
    /// The matrix.
    pub matrix: Matrix,
    /// Distance from one token's outputs to the next: the rows, padding included.
    pub stride: u32,
    /// Its layers.
    pub parts: Vec<Part>,
}

/// One layer of a product.
pub struct Part {
    /// Its first row.
    pub first: u32,
    /// Its rows.
    pub rows: u32,
    /// One a row.
    pub bias: Option<Buffer<f32>>,
}

/// Linear layers of one input.
pub struct Group {
    /// Length of the input.
    pub cols: u32,
    /// What computes them.
    pub products: Vec<Product>,
    /// Product and first row of each layer.
    pub places: Vec<(usize, u32)>,
}

impl Group {
    /// Uploads layers of one input.
    pub fn upload(executor: &Executor, layers: &[&Linear], uploads: &mut Uploads) -> Result<Group, DeviceError> {
        let mut products: Vec<Product> = Vec::new();
        let mut places = vec![None; layers.len()];
        for (i, layer) in layers.iter().enumerate() {
            if places[i].is_some() {
                continue;
            }
            let product = match &layer.weight {
                Weight::Dense(_) => {
                    places[i] = Some((products.len(), 0));
                    Product::of(executor, layer, Matrix::upload(executor, layer, uploads)?)?
                }
                Weight::Quantized { quantizer, .. } => {
                    let alike = layers.iter().enumerate().skip(i).filter_map(|(j, l)| match &l.weight {
                        Weight::Quantized { quantizer: other, matrix } if other == quantizer => {
                            Some((j, *l, &**matrix))
                        }
                        Weight::Quantized { .. } | Weight::Dense(_) => None,
                    });
                    let alike: Vec<_> = alike.collect();
                    let product = quantized(executor, quantizer, &alike)?;
                    for ((j, ..), part) in alike.iter().zip(&product.parts) {
                        places[*j] = Some((products.len(), part.first));
                    }
                    product
                }
            };
            products.push(product);
        }
        Ok(Group { cols: layers[0].cols as u32, products, places: places.into_iter().flatten().collect() })
    }
}

impl Product {
    /// One layer, whose matrix is on the device.
    pub fn of(executor: &Executor, layer: &Linear, matrix: Matrix) -> Result<Product, DeviceError> {
        let rows = layer.rows as u32;
        let stride = match &matrix {
            Matrix::Dense(_) => rows,
            Matrix::Quantized { matrix, .. } => matrix.layout.padded_rows(),
        };
        let bias = layer.bias.as_ref().map(|b| executor.upload(b)).transpose()?;
        Ok(Product { matrix, stride, parts: vec![Part { first: 0, rows, bias }] })
    }
}

/// Layers of one quantizer and input, one below the other.
fn packed(
    executor: &Executor,
    quantizer: &Arc<Quantizer>,
    layers: &[(usize, &Linear, &PackedMatrix)],
) -> Result<Matrix, DeviceError> {
    let cols = layers[0].1.cols as u32;
    let data: Vec<_> =
        layers.iter().map(|(_, l, m)| (l.rows as u32, m.words.as_slice(), m.scales.as_slice())).collect();
    let matrix = Arc::new(DeviceMatrix::upload(executor, quantizer, cols, &data)?);
    Ok(Matrix::Quantized { quantizer: quantizer.clone(), hash: quantizer.hash(), matrix })
}

fn quantized(
    executor: &Executor,
    quantizer: &Arc<Quantizer>,
    layers: &[(usize, &Linear, &PackedMatrix)],
) -> Result<Product, DeviceError> {
    let cols = layers[0].1.cols as u32;
    let rows: Vec<u32> = layers.iter().map(|l| l.1.rows as u32).collect();
    let matrix = packed(executor, quantizer, layers)?;
    let parts = first_rows(quantizer, cols, &rows).into_iter().zip(layers).map(|(first, (_, l, _))| {
        let bias = l.bias.as_ref().map(|b| executor.upload(b)).transpose()?;
        Ok(Part { first, rows: l.rows as u32, bias })
    });
    let parts = parts.collect::<Result<_, DeviceError>>()?;
    let stride = rows.iter().map(|&rows| Packed::new(quantizer, Shape { rows, cols }).padded_rows()).sum();
    Ok(Product { matrix, stride, parts })
}
