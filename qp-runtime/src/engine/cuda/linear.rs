//! Linear layers on a device: those of one input together, equal quantizers fused into one matrix.

use std::sync::Arc;

use half::{bf16, f16};
use qp_codegen::ir::Elem;
use qp_codegen::spec::Quantizer;

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

/// The matrix of a product.
pub enum Matrix {
    /// Packed; of several layers one below the other.
    Quantized {
        /// By what.
        quantizer: Arc<Quantizer>,
        /// Its content hash.
        hash: String,
        /// The words.
        matrix: DeviceMatrix,
    },
    /// Rows × columns.
    Dense(Arc<Floats>),
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
    pub fn upload(executor: &Executor, layers: &[&Linear]) -> Result<Group, DeviceError> {
        let mut products: Vec<Product> = Vec::new();
        let mut places = vec![None; layers.len()];
        for (i, layer) in layers.iter().enumerate() {
            if places[i].is_some() {
                continue;
            }
            let product = match &layer.weight {
                Weight::Dense(tensor) => {
                    places[i] = Some((products.len(), 0));
                    dense(executor, layer, Arc::new(Floats::upload(executor, tensor)?))?
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

/// One unquantized layer, whose weights are on the device.
pub fn dense(executor: &Executor, layer: &Linear, weights: Arc<Floats>) -> Result<Product, DeviceError> {
    let rows = layer.rows as u32;
    let bias = layer.bias.as_ref().map(|b| executor.upload(b)).transpose()?;
    Ok(Product { matrix: Matrix::Dense(weights), stride: rows, parts: vec![Part { first: 0, rows, bias }] })
}

fn quantized(
    executor: &Executor,
    quantizer: &Arc<Quantizer>,
    layers: &[(usize, &Linear, &PackedMatrix)],
) -> Result<Product, DeviceError> {
    let cols = layers[0].1.cols as u32;
    let rows: Vec<u32> = layers.iter().map(|l| l.1.rows as u32).collect();
    let data: Vec<_> =
        layers.iter().zip(&rows).map(|(l, r)| (*r, l.2.words.as_slice(), l.2.scales.as_slice())).collect();
    let matrix = DeviceMatrix::upload(executor, quantizer, cols, &data)?;
    let parts = first_rows(quantizer, cols, &rows).into_iter().zip(layers).map(|(first, (_, l, _))| {
        let bias = l.bias.as_ref().map(|b| executor.upload(b)).transpose()?;
        Ok(Part { first, rows: l.rows as u32, bias })
    });
    let parts = parts.collect::<Result<_, DeviceError>>()?;
    let stride = matrix.layout.padded_rows();
    Ok(Product {
        matrix: Matrix::Quantized { quantizer: quantizer.clone(), hash: quantizer.hash(), matrix },
        stride,
        parts,
    })
}
