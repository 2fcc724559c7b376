//! Attention over pages on a device: the kernels of [`qp_codegen::kernels::attend`], loaded.

use qp_codegen::kernels::attend::{Append, Attend, append, few, many};

use super::ops::Faults;
use super::{Buffer, DeviceError, Executor, LaunchArgs, Loaded, Recorder};

/// Arguments of [`append::lower`]'s kernels.
#[derive(LaunchArgs)]
struct AppendArgs<'a> {
    q: &'a Buffer<f32>,
    k: &'a Buffer<f32>,
    v: &'a Buffer<f32>,
    q_norm: &'a Buffer<f32>,
    k_norm: &'a Buffer<f32>,
    cos: &'a Buffer<f32>,
    sin: &'a Buffer<f32>,
    positions: &'a Buffer<i32>,
    slots: &'a Buffer<i32>,
    cache: &'a mut Buffer<u8>,
    queries: &'a mut Buffer<i8>,
    query_scale: &'a mut Buffer<f32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
}

/// Arguments of the kernels that attend.
#[derive(LaunchArgs)]
struct AttendArgs<'a> {
    queries: &'a Buffer<i8>,
    query_scale: &'a Buffer<f32>,
    sinks: &'a Buffer<f32>,
    positions: &'a Buffer<i32>,
    sequence: &'a Buffer<i32>,
    slots: &'a Buffer<i32>,
    table: &'a Buffer<i32>,
    tiles: &'a Buffer<i32>,
    stride: i32,
    cache: &'a Buffer<u8>,
    y: &'a mut Buffer<f32>,
    partial: &'a mut Buffer<f32>,
    arrived: &'a mut Buffer<i32>,
    faults: &'a mut Buffer<i32>,
    layer: i32,
}

/// What a step's tokens are; all layers read it.
pub struct Tokens {
    /// Each token's position in its sequence.
    pub positions: Buffer<i32>,
    /// Each token's row of the table.
    pub sequence: Buffer<i32>,
    /// Where each token's key and value lie, `64 · page + offset`; negative for a token that only fills up the step.
    pub slots: Buffer<i32>,
    /// Pages of the sequences, `stride` a row.
    pub table: Buffer<i32>,
    /// Tiles of queries ([`many::tiles`]); any, for steps of few tokens.
    pub tiles: Buffer<i32>,
    /// Pages of a row of the table.
    pub stride: i32,
}

/// Queries of a step, rounded.
pub struct Queries {
    /// Tokens × heads × 2 × columns.
    pub planes: Buffer<i8>,
    /// Tokens × heads.
    pub scale: Buffer<f32>,
}

impl Queries {
    /// Room for the queries of a step.
    ///
    /// # Errors
    /// A full GPU.
    pub fn new(on: &Executor, op: &Attend) -> Result<Self, DeviceError> {
        let rows = (op.tokens * op.heads) as usize;
        Ok(Queries { planes: on.zeroed(rows * 2 * op.cache.columns() as usize)?, scale: on.zeroed(rows)? })
    }
}

/// What [`AppendKernel`] reads beside the step's tokens.
#[derive(Clone, Copy)]
pub struct AppendInputs<'a> {
    /// Queries, not turned.
    pub q: &'a Buffer<f32>,
    /// Keys, not turned.
    pub k: &'a Buffer<f32>,
    /// Values.
    pub v: &'a Buffer<f32>,
    /// Weights of the norms of queries and of keys; read by a kernel with norms only.
    pub norms: [&'a Buffer<f32>; 2],
    /// Cosines and sines, positions × `rotary / 2`.
    pub turns: [&'a Buffer<f32>; 2],
}

/// Keys and values of a step put into the cache, queries rounded; loaded.
pub struct AppendKernel {
    kernel: Loaded,
}

impl AppendKernel {
    /// Makes the kernel.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn load(on: &Executor, op: &Append) -> Result<Self, DeviceError> {
        Ok(AppendKernel { kernel: on.load::<AppendArgs<'_>>(append::lower(op))? })
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
        &self,
        to: &mut Recorder,
        inputs: AppendInputs<'_>,
        tokens: &Tokens,
        cache: &mut Buffer<u8>,
        queries: &mut Queries,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        to.launch(&self.kernel, Self::args(inputs, tokens, cache, queries, faults))
    }

    /// Launches it.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &self,
        on: &Executor,
        inputs: AppendInputs<'_>,
        tokens: &Tokens,
        cache: &mut Buffer<u8>,
        queries: &mut Queries,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        on.launch(&self.kernel, Self::args(inputs, tokens, cache, queries, faults))
    }

    fn args<'a>(
        AppendInputs { q, k, v, norms: [q_norm, k_norm], turns: [cos, sin] }: AppendInputs<'a>,
        Tokens { positions, slots, .. }: &'a Tokens,
        cache: &'a mut Buffer<u8>,
        Queries { planes, scale }: &'a mut Queries,
        Faults { faults, layer }: Faults<'a>,
    ) -> AppendArgs<'a> {
        AppendArgs {
            q,
            k,
            v,
            q_norm,
            k_norm,
            cos,
            sin,
            positions,
            slots,
            cache,
            queries: planes,
            query_scale: scale,
            faults,
            layer,
        }
    }
}

/// Attention of a step's tokens, loaded.
pub struct AttendKernel {
    kernel: Loaded,
    partial: Buffer<f32>,
    arrived: Buffer<i32>,
}

impl AttendKernel {
    /// Makes the kernel for few tokens, each with tiles of its own.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn few(on: &Executor, op: &Attend) -> Result<Self, DeviceError> {
        AttendKernel::few_as(on, op, &few::Launch::choose(op, &on.device()))
    }

    /// The same with a chosen launch.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn few_as(on: &Executor, op: &Attend, launch: &few::Launch) -> Result<Self, DeviceError> {
        let (partial, arrived) = few::meeting_place(op, launch);
        let kernel = on.load::<AttendArgs<'_>>(few::lower(op, launch))?;
        Ok(AttendKernel { kernel, partial: on.zeroed(partial)?, arrived: on.zeroed(arrived)? })
    }

    /// Makes the kernel for many tokens, in up to `tiles` tiles of consecutive tokens.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn many(on: &Executor, op: &Attend, tiles: u32) -> Result<Self, DeviceError> {
        let kernel = on.load::<AttendArgs<'_>>(many::lower(op, &many::Launch::choose(op, &on.device()), tiles))?;
        Ok(AttendKernel { kernel, partial: on.zeroed(1)?, arrived: on.zeroed(1)? })
    }

    /// The kernel.
    pub fn loaded(&self) -> &Loaded {
        &self.kernel
    }

    /// Adds the launch to a graph: `y` gets tokens × heads · columns. `sinks` are read by a kernel with sinks only.
    ///
    /// # Errors
    /// A kernel of other parameters.
    pub fn record(
        &mut self,
        to: &mut Recorder,
        (queries, sinks): (&Queries, &Buffer<f32>),
        tokens: &Tokens,
        cache: &Buffer<u8>,
        y: &mut Buffer<f32>,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        let AttendKernel { kernel, partial, arrived } = self;
        to.launch(kernel, Self::args(partial, arrived, queries, sinks, tokens, cache, y, faults))
    }

    /// Launches it.
    ///
    /// # Errors
    /// Those of the executor.
    pub fn launch(
        &mut self,
        on: &Executor,
        (queries, sinks): (&Queries, &Buffer<f32>),
        tokens: &Tokens,
        cache: &Buffer<u8>,
        y: &mut Buffer<f32>,
        faults: Faults<'_>,
    ) -> Result<(), DeviceError> {
        let AttendKernel { kernel, partial, arrived } = self;
        on.launch(kernel, Self::args(partial, arrived, queries, sinks, tokens, cache, y, faults))
    }

    #[expect(clippy::too_many_arguments, reason = "the kernel's parameters")]
    fn args<'a>(
        partial: &'a mut Buffer<f32>,
        arrived: &'a mut Buffer<i32>,
        Queries { planes, scale }: &'a Queries,
        sinks: &'a Buffer<f32>,
        Tokens { positions, sequence, slots, table, tiles, stride }: &'a Tokens,
        cache: &'a Buffer<u8>,
        y: &'a mut Buffer<f32>,
        Faults { faults, layer }: Faults<'a>,
    ) -> AttendArgs<'a> {
        AttendArgs {
            queries: planes,
            query_scale: scale,
            sinks,
            positions,
            sequence,
            slots,
            table,
            tiles,
            stride: *stride,
            cache,
            y,
            partial,
            arrived,
            faults,
            layer,
        }
    }
}
