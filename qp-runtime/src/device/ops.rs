//! The operations on quantized matrices, ready to launch: argument structs and the buffers that go with them.

use std::marker::PhantomData;

use half::bf16;
use qp_codegen::kernels::decode::pack_tables;
use qp_codegen::kernels::dequantize::{self, Dequantize};
use qp_codegen::kernels::embed_packed::{self, EmbedPacked};
use qp_codegen::kernels::experts::Experts;
use qp_codegen::kernels::gemv::Gemv;
use qp_codegen::kernels::prepare::{self, Entering, Prepare, Spread};
use qp_codegen::kernels::product::Launch;
use qp_codegen::kernels::rotate;
use qp_codegen::layout::{COLUMN_PAD, Packed};
use qp_codegen::reference::{Activations, activation_cells};
use qp_codegen::spec::{Quantizer, Rotation, Shape};

use super::{Buffer, DeviceError, Element, Executor, LaunchArgs, Loaded, Recorder};

/// Arguments of [`Launch::lower`]'s kernels.
#[derive(LaunchArgs)]
pub struct GemvArgs<'a> {
    tables: &'a Buffer<u32>,
    weights: &'a Buffer<u32>,
    scales: &'a Buffer<bf16>,
    x: &'a Buffer<i8>,
    x_scale: &'a Buffer<f32>,
    x_sum: &'a Buffer<i32>,
    y: &'a mut Buffer<f32>,
    partial: &'a mut Buffer<i32>,
    arrived: &'a mut Buffer<i32>,
}

/// Arguments of [`Launch::lower_with`]'s kernels that prepare.
#[derive(LaunchArgs)]
pub struct PreparingArgs<'a> {
    input: &'a Buffer<f32>,
    up: &'a Buffer<f32>,
    norm: &'a Buffer<f32>,
    flips: &'a Buffer<u32>,
    base: &'a Buffer<u32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
    tables: &'a Buffer<u32>,
    weights: &'a Buffer<u32>,
    scales: &'a Buffer<bf16>,
    y: &'a mut Buffer<f32>,
    partial: &'a mut Buffer<i32>,
    arrived: &'a mut Buffer<i32>,
}

/// Arguments of [`Launch::lower_for_experts`]'s kernels.
#[derive(LaunchArgs)]
pub struct ExpertsArgs<'a> {
    tables: &'a Buffer<u32>,
    weights: &'a Buffer<u32>,
    scales: &'a Buffer<bf16>,
    x: &'a Buffer<i8>,
    x_scale: &'a Buffer<f32>,
    x_sum: &'a Buffer<i32>,
    y: &'a mut Buffer<f32>,
    partial: &'a mut Buffer<i32>,
    arrived: &'a mut Buffer<i32>,
    units: &'a Buffer<i32>,
    pairs: &'a Buffer<i32>,
    places: &'a Buffer<i32>,
}

/// Arguments of [`dequantize::lower`]'s kernels.
#[derive(LaunchArgs)]
pub struct DequantizeArgs<'a, T: Element> {
    tables: &'a Buffer<u32>,
    weights: &'a Buffer<u32>,
    scales: &'a Buffer<bf16>,
    y: &'a mut Buffer<T>,
}

/// Arguments of [`prepare::lower`]'s kernels.
#[derive(LaunchArgs)]
pub struct PrepareArgs<'a> {
    input: &'a Buffer<f32>,
    up: &'a Buffer<f32>,
    norm: &'a Buffer<f32>,
    flips: &'a Buffer<u32>,
    base: &'a Buffer<u32>,
    scratch: &'a mut Buffer<u32>,
    x: &'a mut Buffer<i8>,
    x_scale: &'a mut Buffer<f32>,
    x_sum: &'a mut Buffer<i32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
}

/// The same, with factors.
#[derive(LaunchArgs)]
pub struct EnterArgs<'a> {
    input: &'a Buffer<f32>,
    up: &'a Buffer<f32>,
    norm: &'a Buffer<f32>,
    flips: &'a Buffer<u32>,
    base: &'a Buffer<u32>,
    scratch: &'a mut Buffer<u32>,
    x: &'a mut Buffer<i8>,
    x_scale: &'a mut Buffer<f32>,
    x_sum: &'a mut Buffer<i32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
    factors: &'a Buffer<f32>,
}

/// Arguments of [`embed_packed::lower`]'s kernels.
#[derive(LaunchArgs)]
pub struct EmbedPackedArgs<'a> {
    tables: &'a Buffer<u32>,
    weights: &'a Buffer<u32>,
    scales: &'a Buffer<bf16>,
    tokens: &'a Buffer<i32>,
    flips: &'a Buffer<u32>,
    base: &'a Buffer<u32>,
    y: &'a mut Buffer<f32>,
}

/// A packed matrix, or several that share an input stored one below the other, on a device.
pub struct DeviceMatrix {
    /// Rows × columns; of several, rows are padded to whole tiles.
    pub layout: Packed,
    tables: Buffer<u32>,
    weights: Buffer<u32>,
    scales: Buffer<bf16>,
}

impl DeviceMatrix {
    /// Uploads matrices of one quantizer with equal columns: for each its rows, packed words and scales (one a row or
    /// one in all). Row `r` of matrix `i` becomes row [`DeviceMatrix::first_rows`]`[i] + r`.
    ///
    /// # Errors
    /// A full GPU.
    pub fn upload(
        on: &Executor,
        q: &Quantizer,
        cols: u32,
        parts: &[(u32, &[u32], &[bf16])],
    ) -> Result<Self, DeviceError> {
        let mut weights = on.zeroed(parts.iter().map(|part| part.1.len()).sum())?;
        let (mut at, mut all, mut rows) = (0, Vec::new(), 0);
        for &(r, packed, scales) in parts {
            let layout = Packed::new(q, Shape { rows: r, cols });
            weights.write(at, packed)?;
            at += packed.len();
            let before = all.len();
            match scales {
                [one] => all.resize(before + r as usize, *one),
                each => all.extend_from_slice(each),
            }
            all.resize(before + layout.padded_rows() as usize, bf16::ZERO);
            rows += if parts.len() == 1 { r } else { layout.padded_rows() };
        }
        Ok(DeviceMatrix {
            layout: Packed::new(q, Shape { rows, cols }),
            tables: on.upload(&or_one(pack_tables(q)))?,
            weights,
            scales: on.upload(&all)?,
        })
    }

    /// A matrix whose words repeat `words`, and whose rows all have the scale `scale`.
    ///
    /// # Errors
    /// No words, a full GPU.
    pub fn repeating(
        on: &Executor,
        q: &Quantizer,
        shape: Shape,
        words: &[u32],
        scale: bf16,
    ) -> Result<Self, DeviceError> {
        let layout = Packed::new(q, shape);
        Ok(DeviceMatrix {
            tables: on.upload(&or_one(pack_tables(q)))?,
            weights: on.repeating(words, layout.words())?,
            scales: on.repeating(&[scale], layout.padded_rows() as usize)?,
            layout,
        })
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        self.tables.bytes() + self.weights.bytes() + self.scales.bytes()
    }

    /// Another matrix of the same contents.
    ///
    /// # Errors
    /// A full GPU.
    pub fn copy(&self, on: &Executor) -> Result<Self, DeviceError> {
        Ok(DeviceMatrix {
            layout: self.layout.clone(),
            tables: on.copy(&self.tables)?,
            weights: on.copy(&self.weights)?,
            scales: on.copy(&self.scales)?,
        })
    }

    /// Decodes the matrix: rows × columns, row-major, in the rotated space.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn dequantize(&self, on: &Executor, q: &Quantizer) -> Result<Vec<f32>, DeviceError> {
        let kernel = DecodeKernel::load(on, q, self.layout.shape)?;
        let mut y = on.zeroed(self.layout.shape.len() as usize)?;
        kernel.launch(on, self, &mut y)?;
        y.to_vec()
    }
}

/// The shape of matrices stored one below the other: of several, each is padded to whole tiles.
pub fn stacked(q: &Quantizer, shapes: &[Shape]) -> Shape {
    match shapes {
        [one] => *one,
        several => {
            Shape { rows: several.iter().map(|&s| Packed::new(q, s).padded_rows()).sum(), cols: several[0].cols }
        }
    }
}

/// Where matrices of `rows` begin in a [`DeviceMatrix`] of them all.
pub fn first_rows(q: &Quantizer, cols: u32, rows: &[u32]) -> Vec<u32> {
    rows.iter()
        .scan(0, |at, &rows| {
            let first = *at;
            *at += Packed::new(q, Shape { rows, cols }).padded_rows();
            Some(first)
        })
        .collect()
}

/// Tokens' activations as integers, on a device.
pub struct DeviceActivations {
    /// Two planes a token ([`activation_cells`]).
    pub x: Buffer<i8>,
    /// One a token.
    pub scale: Buffer<f32>,
    /// One a token.
    pub sum: Buffer<i32>,
}

impl DeviceActivations {
    /// Room for `batch` tokens of `columns`.
    ///
    /// # Errors
    /// A full GPU.
    pub fn new(on: &Executor, columns: u32, batch: u32) -> Result<Self, DeviceError> {
        let planes = 2 * columns.next_multiple_of(COLUMN_PAD) as usize;
        DeviceActivations::of(on, planes * batch as usize, batch as usize)
    }

    /// Room for `rows` rows of `bytes` bytes together.
    ///
    /// # Errors
    /// A full GPU.
    pub fn of(on: &Executor, bytes: usize, rows: usize) -> Result<Self, DeviceError> {
        Ok(DeviceActivations { x: on.zeroed(bytes)?, scale: on.zeroed(rows)?, sum: on.zeroed(rows)? })
    }

    /// Uploads tokens' activations.
    ///
    /// # Errors
    /// A full GPU.
    pub fn upload(on: &Executor, tokens: &[Activations]) -> Result<Self, DeviceError> {
        let x = activation_cells(tokens);
        let scale: Vec<f32> = tokens.iter().map(|t| t.scale).collect();
        let sum: Vec<i32> = tokens.iter().map(|t| t.sum as i32).collect();
        Ok(DeviceActivations { x: on.upload(&x)?, scale: on.upload(&scale)?, sum: on.upload(&sum)? })
    }
}

/// A product of a packed matrix with the activations of some tokens, loaded.
pub struct GemvKernel {
    kernel: Loaded,
    /// Of a kernel that prepares.
    signs: Option<Signs>,
    partial: Buffer<i32>,
    arrived: Buffer<i32>,
}

impl GemvKernel {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &Gemv, launch: &Launch) -> Result<Self, DeviceError> {
        GemvKernel::load_with(on, op, None, launch)
    }

    /// Makes the kernel, with a preparation one whose blocks do that themselves.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load_with(
        on: &Executor,
        op: &Gemv,
        prepare: Option<&Prepare>,
        launch: &Launch,
    ) -> Result<Self, DeviceError> {
        let kernel = launch.lower_with(op, prepare);
        let (partial, arrived) = launch.meeting_place(op);
        Ok(GemvKernel {
            kernel: if prepare.is_some() { on.load::<PreparingArgs>(kernel)? } else { on.load::<GemvArgs>(kernel)? },
            signs: prepare.map(|p| Signs::upload(on, p.rotation, p.columns, rotate::base)).transpose()?,
            partial: on.zeroed(partial)?,
            arrived: on.zeroed(arrived)?,
        })
    }

    /// The kernel.
    pub fn loaded(&self) -> &Loaded {
        &self.kernel
    }

    /// Adds the launch `y = m · x` (or `y += m · x`) to a graph.
    ///
    /// # Errors
    /// A kernel of other parameters.
    pub fn record(
        &mut self,
        to: &mut Recorder,
        m: &DeviceMatrix,
        x: &DeviceActivations,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel.clone();
        to.launch(&kernel, self.args(m, x, y))
    }

    /// The same of a kernel that prepares: `x` is what `inputs` become.
    ///
    /// # Errors
    /// A kernel of other parameters.
    ///
    /// # Panics
    /// If the kernel does not prepare.
    pub fn record_preparing(
        &mut self,
        to: &mut Recorder,
        m: &DeviceMatrix,
        inputs: PrepareInputs<'_>,
        faults: Faults<'_>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel.clone();
        to.launch(&kernel, self.preparing(m, inputs, faults, y))
    }

    /// The same, launched.
    ///
    /// # Errors
    /// Those of the executor.
    ///
    /// # Panics
    /// If the kernel does not prepare.
    pub fn launch_preparing(
        &mut self,
        on: &Executor,
        m: &DeviceMatrix,
        inputs: PrepareInputs<'_>,
        faults: Faults<'_>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel.clone();
        on.launch(&kernel, self.preparing(m, inputs, faults, y))
    }

    fn preparing<'a>(
        &'a mut self,
        m: &'a DeviceMatrix,
        PrepareInputs { input, up, norm, factors: _ }: PrepareInputs<'a>,
        Faults { faults, layer }: Faults<'a>,
        y: &'a mut Buffer<f32>,
    ) -> PreparingArgs<'a> {
        let Signs { flips, base } = self.signs.as_ref().expect("a kernel that prepares");
        let DeviceMatrix { tables, weights, scales, .. } = m;
        let (partial, arrived) = (&mut self.partial, &mut self.arrived);
        PreparingArgs { input, up, norm, flips, base, faults, layer, tables, weights, scales, y, partial, arrived }
    }

    /// Launches `y = m · x` (or `y += m · x`).
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &mut self,
        on: &Executor,
        m: &DeviceMatrix,
        x: &DeviceActivations,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let kernel = self.kernel.clone();
        on.launch(&kernel, self.args(m, x, y))
    }

    fn args<'a>(&'a mut self, m: &'a DeviceMatrix, x: &'a DeviceActivations, y: &'a mut Buffer<f32>) -> GemvArgs<'a> {
        GemvArgs {
            tables: &m.tables,
            weights: &m.weights,
            scales: &m.scales,
            x: &x.x,
            x_scale: &x.scale,
            x_sum: &x.sum,
            y,
            partial: &mut self.partial,
            arrived: &mut self.arrived,
        }
    }
}

/// Products of packed matrices of experts with the activations of pairs of tokens and experts, loaded.
pub struct ExpertsKernel {
    kernel: Loaded,
    nowhere: [Buffer<i32>; 2],
}

/// Which pairs go through which expert.
#[derive(Clone, Copy)]
pub struct Pairs<'a> {
    /// Units, or the experts of pairs if each is a unit.
    pub units: &'a Buffer<i32>,
    /// The units' pairs.
    pub pairs: &'a Buffer<i32>,
    /// Of each expert, the place of its matrix.
    pub places: &'a Buffer<i32>,
}

impl ExpertsKernel {
    /// Makes the kernel; `op` is the product of one expert with the pairs of a unit.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &Gemv, experts: &Experts, launch: &Launch) -> Result<Self, DeviceError> {
        let kernel = on.load::<ExpertsArgs>(launch.lower_for_experts(op, experts))?;
        Ok(ExpertsKernel { kernel, nowhere: [on.zeroed(1)?, on.zeroed(1)?] })
    }

    /// Adds the launch to a graph: each row of `y` that belongs to a pair of one of the matrices of `m` gets that product.
    ///
    /// # Errors
    /// A kernel of other parameters.
    pub fn record(
        &mut self,
        to: &mut Recorder,
        m: &DeviceMatrix,
        x: &DeviceActivations,
        Pairs { units, pairs, places }: Pairs<'_>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        let [partial, arrived] = &mut self.nowhere;
        let args = ExpertsArgs {
            tables: &m.tables,
            weights: &m.weights,
            scales: &m.scales,
            x: &x.x,
            x_scale: &x.scale,
            x_sum: &x.sum,
            y,
            partial,
            arrived,
            units,
            pairs,
            places,
        };
        to.launch(&self.kernel, args)
    }
}

/// The decoding of packed matrices of one quantizer and shape to `f16`, `bf16` or `f32`, loaded: rows × columns, row-major,
/// in the rotated space.
pub struct DecodeKernel<T> {
    kernel: Loaded,
    element: PhantomData<T>,
}

impl<T: Element> DecodeKernel<T> {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, q: &Quantizer, shape: Shape) -> Result<Self, DeviceError> {
        let op = Dequantize { quantizer: q, shape, output: T::ELEM };
        let kernel = on.load::<DequantizeArgs<'_, T>>(dequantize::lower(&op, on.device().sms))?;
        Ok(DecodeKernel { kernel, element: PhantomData })
    }

    /// Launches it: `y` gets the weights of `m`.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(&self, on: &Executor, m: &DeviceMatrix, y: &mut Buffer<T>) -> Result<(), DeviceError> {
        on.launch(&self.kernel, Self::args(m, y))
    }

    fn args<'a>(m: &'a DeviceMatrix, y: &'a mut Buffer<T>) -> DequantizeArgs<'a, T> {
        DequantizeArgs { tables: &m.tables, weights: &m.weights, scales: &m.scales, y }
    }
}

/// The signs of a rotation on a device.
pub(super) struct Signs {
    pub(super) flips: Buffer<u32>,
    pub(super) base: Buffer<u32>,
}

impl Signs {
    /// Those of `rotation` of `columns`, whose dense part's signs `base` gives.
    pub(super) fn upload(
        on: &Executor,
        rotation: Rotation,
        columns: u32,
        base: fn(Rotation, u32) -> Vec<u32>,
    ) -> Result<Self, DeviceError> {
        let flips = on.upload(&rotate::flips(rotation, columns))?;
        Ok(Signs { flips, base: on.upload(&base(rotation, columns))? })
    }
}

/// What a preparation reads.
#[derive(Clone, Copy)]
pub struct PrepareInputs<'a> {
    /// The values, or, with a gated unit, the gates.
    pub input: &'a Buffer<f32>,
    /// What the gates gate. Read with a gated unit only.
    pub up: &'a Buffer<f32>,
    /// The norm's weights. Read with a norm only.
    pub norm: &'a Buffer<f32>,
    /// Factors of columns, where a format has them.
    pub factors: Option<&'a Buffer<f32>>,
}

impl<'a> PrepareInputs<'a> {
    /// Those of a preparation without a gated unit and a norm.
    pub fn plain(input: &'a Buffer<f32>) -> Self {
        PrepareInputs { input, up: input, norm: input, factors: None }
    }
}

/// Where a launch says that its values are not finite.
pub struct Faults<'a> {
    /// One a layer of the model, 0 until a launch finds such values.
    pub faults: &'a mut Buffer<i32>,
    /// The launch's place there.
    pub layer: i32,
}

/// Gated unit, norm, rotation and rounding of activations to integers, loaded.
pub struct PrepareKernel {
    kernel: Loaded,
    signs: Signs,
    scratch: Buffer<u32>,
}

impl PrepareKernel {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &Prepare) -> Result<Self, DeviceError> {
        PrepareKernel::load_as(on, op, Spread::choose(op, &on.device()))
    }

    /// Makes the kernel that is spread so.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load_as(on: &Executor, op: &Prepare, spread: Spread) -> Result<Self, DeviceError> {
        let kernel = prepare::lower_as(op, spread);
        let kernel = match op.entering {
            Some(Entering { factors: true, .. }) => on.load::<EnterArgs<'_>>(kernel)?,
            _ => on.load::<PrepareArgs<'_>>(kernel)?,
        };
        let signs = Signs::upload(on, op.rotation, op.columns, rotate::base)?;
        Ok(PrepareKernel { kernel, signs, scratch: on.zeroed(op.scratch(spread))? })
    }

    /// The kernel.
    pub fn loaded(&self) -> &Loaded {
        &self.kernel
    }

    /// Adds the launch to a graph.
    ///
    /// # Errors
    /// A kernel of other parameters.
    pub fn record(
        &mut self,
        to: &mut Recorder,
        inputs: PrepareInputs<'_>,
        out: &mut DeviceActivations,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        let PrepareKernel { kernel, signs, scratch } = self;
        match inputs.factors {
            Some(factors) => to.launch(kernel, Self::args(signs, scratch, inputs, out, faults).with(factors)),
            None => to.launch(kernel, Self::args(signs, scratch, inputs, out, faults)),
        }
    }

    /// Launches it.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &mut self,
        on: &Executor,
        inputs: PrepareInputs<'_>,
        out: &mut DeviceActivations,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        let PrepareKernel { kernel, signs, scratch } = self;
        match inputs.factors {
            Some(factors) => on.launch(kernel, Self::args(signs, scratch, inputs, out, faults).with(factors)),
            None => on.launch(kernel, Self::args(signs, scratch, inputs, out, faults)),
        }
    }

    fn args<'a>(
        Signs { flips, base }: &'a Signs,
        scratch: &'a mut Buffer<u32>,
        PrepareInputs { input, up, norm, factors: _ }: PrepareInputs<'a>,
        DeviceActivations { x, scale, sum }: &'a mut DeviceActivations,
        Faults { faults, layer }: Faults<'a>,
    ) -> PrepareArgs<'a> {
        PrepareArgs { input, up, norm, flips, base, scratch, x, x_scale: scale, x_sum: sum, faults, layer }
    }
}

impl<'a> PrepareArgs<'a> {
    fn with(self, factors: &'a Buffer<f32>) -> EnterArgs<'a> {
        let PrepareArgs { input, up, norm, flips, base, scratch, x, x_scale, x_sum, faults, layer } = self;
        EnterArgs { input, up, norm, flips, base, scratch, x, x_scale, x_sum, faults, layer, factors }
    }
}

/// Rows of a packed matrix, decoded and rotated back, loaded.
pub struct EmbedPackedKernel {
    kernel: Loaded,
    signs: Signs,
}

impl EmbedPackedKernel {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &EmbedPacked) -> Result<Self, DeviceError> {
        let (rotation, columns) = (op.quantizer.rotation, op.shape.cols);
        let kernel = on.load::<EmbedPackedArgs>(embed_packed::lower(op))?;
        let signs = Signs::upload(on, rotation, columns, rotate::inverse_base)?;
        Ok(EmbedPackedKernel { kernel, signs })
    }

    /// Adds the launch to a graph: `y` gets the rows `tokens` of `m`.
    ///
    /// # Errors
    /// A kernel of other parameters.
    pub fn record(
        &self,
        to: &mut Recorder,
        m: &DeviceMatrix,
        tokens: &Buffer<i32>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        to.launch(&self.kernel, self.args(m, tokens, y))
    }

    /// Launches it.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &self,
        on: &Executor,
        m: &DeviceMatrix,
        tokens: &Buffer<i32>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        on.launch(&self.kernel, self.args(m, tokens, y))
    }

    fn args<'a>(&'a self, m: &'a DeviceMatrix, tokens: &'a Buffer<i32>, y: &'a mut Buffer<f32>) -> EmbedPackedArgs<'a> {
        let Signs { flips, base } = &self.signs;
        EmbedPackedArgs { tables: &m.tables, weights: &m.weights, scales: &m.scales, tokens, flips, base, y }
    }
}

pub(super) fn or_one(mut words: Vec<u32>) -> Vec<u32> {
    if words.is_empty() {
        words.push(0);
    }
    words
}
