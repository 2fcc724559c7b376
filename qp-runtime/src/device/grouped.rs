//! Matrices of formats on a device, and products with them.

use qp_codegen::kernels::grouped::layout::{ROWS, Relaid, RowTile, Stored};
use qp_codegen::kernels::grouped::{self, Launch, Product};
use qp_codegen::kernels::prepare::Prepare;
use qp_codegen::kernels::rotate;
use qp_codegen::reader::{Integers, Reader};
use qp_codegen::spec::Shape;
use qp_codegen::spec::terms::Terms;
use rayon::prelude::*;

use super::ops::{DeviceActivations, Faults, Pairs, PrepareInputs, Signs};
use super::{Buffer, DeviceError, Executor, LaunchArgs, Loaded, Recorder};

/// Arguments of [`grouped::lower`]'s kernels.
#[derive(LaunchArgs)]
pub struct GroupedArgs<'a> {
    weights: &'a Buffer<u32>,
    numbers: &'a Buffer<u32>,
    factors: &'a Buffer<f32>,
    x: &'a Buffer<i8>,
    x_scale: &'a Buffer<f32>,
    y: &'a mut Buffer<f32>,
}

/// Arguments of [`grouped::lower_with`]'s kernels that prepare.
#[derive(LaunchArgs)]
pub struct GroupedPreparingArgs<'a> {
    input: &'a Buffer<f32>,
    up: &'a Buffer<f32>,
    norm: &'a Buffer<f32>,
    flips: &'a Buffer<u32>,
    base: &'a Buffer<u32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
    entering: &'a Buffer<f32>,
    weights: &'a Buffer<u32>,
    numbers: &'a Buffer<u32>,
    factors: &'a Buffer<f32>,
    y: &'a mut Buffer<f32>,
}

/// Arguments of [`grouped::lower_for_experts`]'s kernels.
#[derive(LaunchArgs)]
pub struct GroupedExpertsArgs<'a> {
    weights: &'a Buffer<u32>,
    numbers: &'a Buffer<u32>,
    factors: &'a Buffer<f32>,
    x: &'a Buffer<i8>,
    x_scale: &'a Buffer<f32>,
    y: &'a mut Buffer<f32>,
    units: &'a Buffer<i32>,
    pairs: &'a Buffer<i32>,
    places: &'a Buffer<i32>,
}

/// Rows of tiles that are stored again at a time.
const AT_ONCE: u32 = 512;

/// A matrix of a format, or several that share an input one below the other, on a device.
pub struct GroupedMatrix {
    /// Rows × columns, and where everything lies.
    pub layout: Relaid,
    weights: Buffer<u32>,
    numbers: Buffer<u32>,
    factors: Buffer<f32>,
    /// Factors of activations before the product; of formats that have them.
    pub entering: Buffer<f32>,
    /// Factors of results after it.
    pub leaving: Buffer<f32>,
}

/// The shape of matrices stored one below the other: of several, each is padded to whole tiles.
pub fn stacked(shapes: &[Shape]) -> Shape {
    match shapes {
        [one] => *one,
        several => Shape { rows: several.iter().map(|s| s.rows.next_multiple_of(ROWS)).sum(), cols: several[0].cols },
    }
}

/// Where matrices of `rows` begin in a [`GroupedMatrix`] of them all.
pub fn first_rows(rows: &[u32]) -> Vec<u32> {
    rows.iter()
        .scan(0, |at, &rows| {
            let first = *at;
            *at += rows.next_multiple_of(ROWS);
            Some(first)
        })
        .collect()
}

impl GroupedMatrix {
    /// Stores matrices of one format with `terms`, with equal columns, again and uploads them: for each its reader and the
    /// bytes of its tensors.
    ///
    /// # Errors
    /// A full GPU.
    pub fn upload(on: &Executor, terms: &Terms, given: &[(&Reader, Vec<&[u8]>)]) -> Result<Self, DeviceError> {
        let shapes: Vec<Shape> = given.iter().map(|p| p.0.shape()).collect();
        let layout = Relaid::new(terms, stacked(&shapes));
        let parts: Vec<Integers> = given.iter().map(|(reader, tensors)| reader.integers(tensors)).collect();
        let mut stored = parts.first().map_or_else(Stored::default, |integers| Stored::new(integers, &layout));
        let mut at = 0;
        for integers in &parts {
            let tiles = integers.shape().rows.div_ceil(ROWS);
            for first in (0..tiles).step_by(AT_ONCE as usize) {
                let some = first..tiles.min(first + AT_ONCE);
                let made: Vec<RowTile> =
                    some.into_par_iter().map(|tile| layout.row_tile(integers, tile * ROWS)).collect();
                (at + first..).zip(&made).for_each(|(at, tile)| stored.put(&layout, at, tile));
            }
            at += tiles;
        }
        // Matrices one below the other have no factors of their own.
        let turned = given.first().filter(|_| !terms.sides.is_empty()).and_then(|(reader, t)| reader.turned(t));
        let [mut entering, mut leaving] = turned.map_or([vec![], vec![]], |t| t.map(|side| side.factors));
        entering.resize(entering.len().max(1), 1.0);
        leaving.resize(leaving.len().max(1), 1.0);
        Ok(GroupedMatrix {
            weights: on.upload(&stored.words)?,
            numbers: on.upload_bytes(&stored.numbers)?,
            factors: on.upload(&stored.factors)?,
            entering: on.upload(&entering)?,
            leaving: on.upload(&leaving)?,
            layout,
        })
    }

    /// A matrix of zeros.
    ///
    /// # Errors
    /// A full GPU.
    pub fn zeroed(on: &Executor, terms: &Terms, shape: Shape) -> Result<Self, DeviceError> {
        let layout = Relaid::new(terms, shape);
        Ok(GroupedMatrix {
            weights: on.zeroed(layout.words())?,
            numbers: on.zeroed(layout.number_words())?,
            factors: on.zeroed(layout.padded_rows() as usize)?,
            entering: on.zeroed(terms.sides.input.field.map_or(1, |_| shape.cols as usize))?,
            leaving: on.zeroed(terms.sides.output.field.map_or(1, |_| shape.rows as usize))?,
            layout,
        })
    }

    /// What a product of the matrix with activations is launched with: `y = m · x` (or `y += m · x`).
    pub fn args<'a>(&'a self, x: &'a DeviceActivations, y: &'a mut Buffer<f32>) -> GroupedArgs<'a> {
        let GroupedMatrix { weights, numbers, factors, .. } = self;
        GroupedArgs { weights, numbers, factors, x: &x.x, x_scale: &x.scale, y }
    }

    /// The same of products of experts, whose matrices these are: each row of `y` that belongs to a pair of one of them gets that product.
    pub fn args_of_experts<'a>(
        &'a self,
        x: &'a DeviceActivations,
        Pairs { units, pairs, places }: Pairs<'a>,
        y: &'a mut Buffer<f32>,
    ) -> GroupedExpertsArgs<'a> {
        let GroupedMatrix { weights, numbers, factors, .. } = self;
        GroupedExpertsArgs { weights, numbers, factors, x: &x.x, x_scale: &x.scale, y, units, pairs, places }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> usize {
        let Self { weights, numbers, factors, entering, leaving, layout: _ } = self;
        weights.bytes() + numbers.bytes() + factors.bytes() + entering.bytes() + leaving.bytes()
    }

    /// Another matrix of the same contents.
    ///
    /// # Errors
    /// A full GPU.
    pub fn copy(&self, on: &Executor) -> Result<Self, DeviceError> {
        Ok(GroupedMatrix {
            layout: self.layout.clone(),
            weights: on.copy(&self.weights)?,
            numbers: on.copy(&self.numbers)?,
            factors: on.copy(&self.factors)?,
            entering: on.copy(&self.entering)?,
            leaving: on.copy(&self.leaving)?,
        })
    }
}

/// A product of a matrix of a format with the activations of some tokens, loaded.
pub struct GroupedKernel {
    kernel: Loaded,
    /// Of a kernel that prepares.
    signs: Option<Signs>,
}

impl GroupedKernel {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &Product<'_>, launch: &Launch) -> Result<Self, DeviceError> {
        GroupedKernel::load_with(on, op, None, launch)
    }

    /// Makes the kernel, with a preparation one whose blocks do that themselves.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load_with(
        on: &Executor,
        op: &Product<'_>,
        prepare: Option<&Prepare>,
        launch: &Launch,
    ) -> Result<Self, DeviceError> {
        let kernel = grouped::lower_with(op, launch, prepare);
        let kernel = match prepare {
            None => on.load::<GroupedArgs<'_>>(kernel)?,
            Some(_) => on.load::<GroupedPreparingArgs<'_>>(kernel)?,
        };
        let signs = prepare.map(|p| Signs::upload(on, p.rotation, p.columns, rotate::base)).transpose()?;
        Ok(GroupedKernel { kernel, signs })
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
        &self,
        to: &mut Recorder,
        m: &GroupedMatrix,
        x: &DeviceActivations,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        to.launch(&self.kernel, m.args(x, y))
    }

    /// Launches `y = m · x` (or `y += m · x`).
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &self,
        on: &Executor,
        m: &GroupedMatrix,
        x: &DeviceActivations,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        on.launch(&self.kernel, m.args(x, y))
    }

    /// [`GroupedKernel::record`] of a kernel that prepares: `x` is what `inputs` become.
    ///
    /// # Errors
    /// A kernel of other parameters.
    ///
    /// # Panics
    /// If the kernel does not prepare.
    pub fn record_preparing(
        &self,
        to: &mut Recorder,
        m: &GroupedMatrix,
        inputs: PrepareInputs<'_>,
        faults: Faults<'_>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        to.launch(&self.kernel, self.preparing(m, inputs, faults, y))
    }

    /// The same, launched.
    ///
    /// # Errors
    /// Those of the executor.
    ///
    /// # Panics
    /// If the kernel does not prepare.
    pub fn launch_preparing(
        &self,
        on: &Executor,
        m: &GroupedMatrix,
        inputs: PrepareInputs<'_>,
        faults: Faults<'_>,
        y: &mut Buffer<f32>,
    ) -> Result<(), DeviceError> {
        on.launch(&self.kernel, self.preparing(m, inputs, faults, y))
    }

    fn preparing<'a>(
        &'a self,
        m: &'a GroupedMatrix,
        PrepareInputs { input, up, norm, factors: _ }: PrepareInputs<'a>,
        Faults { faults, layer }: Faults<'a>,
        y: &'a mut Buffer<f32>,
    ) -> GroupedPreparingArgs<'a> {
        let Signs { flips, base } = self.signs.as_ref().expect("a kernel that prepares");
        let GroupedMatrix { weights, numbers, factors, entering, .. } = m;
        GroupedPreparingArgs { input, up, norm, flips, base, faults, layer, entering, weights, numbers, factors, y }
    }
}
