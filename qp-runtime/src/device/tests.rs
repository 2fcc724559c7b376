//! The executor on the interpreter; `qp check-gpu` runs the same interface on a GPU.

use qp_codegen::cuda::{self, Target};
use qp_codegen::ir::{Builder, Elem, Kernel, Scalar, Special};
use qp_codegen::kernels::{Span, add, argmax, dense, embed, glu, norm, read, rows};
use qp_codegen::reference::{Activation, RmsNorm};

use rayon::prelude::*;

use super::*;
use crate::jit::{self, Cache};

#[derive(LaunchArgs)]
struct Scale<'a> {
    input: &'a Buffer<i32>,
    output: &'a mut Buffer<i32>,
    factor: i32,
}

/// `output[i] = input[i] · factor + output[i]` for 64 elements.
fn scale() -> Kernel {
    let b = Builder::new("scale", [2, 1], 32);
    let (input, output) = (b.buffer("input", Elem::I32, false), b.buffer("output", Elem::I32, true));
    let factor = b.scalar("factor", Scalar::I32);
    let i = b.special(Special::BlockX) * 32 + b.special(Special::Thread);
    let sum = b.load(input, i, Elem::I32) * factor + b.load(output, i, Elem::I32);
    b.store(output, i, sum, Elem::I32);
    b.finish()
}

#[test]
fn launches_run_in_order() {
    let exec = Executor::interpreter();
    let kernel = exec.load::<Scale<'_>>(scale()).unwrap();
    let input = exec.upload(&(0..64).collect::<Vec<i32>>()).unwrap();
    let mut output = exec.zeroed::<i32>(64).unwrap();
    for factor in [1, 10] {
        exec.launch(&kernel, Scale { input: &input, output: &mut output, factor }).unwrap();
    }
    exec.synchronize().unwrap();
    assert_eq!(output.to_vec().unwrap(), (0..64).map(|i| 11 * i).collect::<Vec<_>>());
}

#[test]
fn a_graph_replays_with_the_buffers_present_content() {
    let exec = Executor::interpreter();
    let kernel = exec.load::<Scale<'_>>(scale()).unwrap();
    let mut input = exec.upload(&[1i32; 64]).unwrap();
    let mut output = exec.zeroed::<i32>(64).unwrap();
    let mut recorder = exec.record();
    recorder.launch(&kernel, Scale { input: &input, output: &mut output, factor: 2 }).unwrap();
    recorder.launch(&kernel, Scale { input: &input, output: &mut output, factor: 3 }).unwrap();
    let graph = recorder.finish().unwrap();
    assert_eq!(output.to_vec().unwrap(), [0; 64], "recording runs nothing");
    graph.launch().unwrap();
    input.write(0, &[100]).unwrap();
    graph.launch().unwrap();
    let out = output.to_vec().unwrap();
    assert_eq!(out[..2], [505, 10]);
    drop((input, output));
    graph.launch().unwrap();
    assert_eq!(graph.kernels().count(), 2);
}

#[test]
fn a_struct_that_differs_is_refused_with_the_first_difference() {
    #[derive(LaunchArgs)]
    struct Renamed<'a> {
        input: &'a Buffer<i32>,
        result: &'a mut Buffer<i32>,
        factor: i32,
    }
    #[derive(LaunchArgs)]
    struct ReadOnly<'a> {
        input: &'a Buffer<i32>,
        output: &'a Buffer<i32>,
        factor: i32,
    }
    #[derive(LaunchArgs)]
    struct Short<'a> {
        input: &'a Buffer<i32>,
        output: &'a mut Buffer<i32>,
    }
    #[derive(LaunchArgs)]
    struct OtherType<'a> {
        input: &'a Buffer<i32>,
        output: &'a mut Buffer<i32>,
        factor: f32,
    }
    let exec = Executor::interpreter();
    let message = |e: Result<Loaded, DeviceError>| e.err().expect("a difference").to_string();
    let m = message(exec.load::<Renamed<'_>>(scale()));
    assert!(m.contains("parameter 1 is `output` (written buffer of I32)") && m.contains("`result`"), "{m}");
    let m = message(exec.load::<ReadOnly<'_>>(scale()));
    assert!(m.contains("has `output` (read buffer of I32)"), "{m}");
    let m = message(exec.load::<Short<'_>>(scale()));
    assert!(m.contains("parameter 2 is `factor` (scalar I32), but the launch struct has absent"), "{m}");
    let m = message(exec.load::<OtherType<'_>>(scale()));
    assert!(m.contains("scalar F32"), "{m}");
    // A kernel loaded without its struct is checked at the launch.
    let kernel = exec.load_all(vec![scale()]).unwrap().remove(0);
    let (input, output) = (exec.zeroed(64).unwrap(), exec.zeroed(64).unwrap());
    let e = exec.launch(&kernel, ReadOnly { input: &input, output: &output, factor: 1 });
    assert!(matches!(e, Err(DeviceError::Mismatch(_))));
}

#[test]
fn short_buffers_trap_and_ranges_are_checked() {
    let exec = Executor::interpreter();
    let kernel = exec.load::<Scale<'_>>(scale()).unwrap();
    let input = exec.zeroed::<i32>(63).unwrap();
    let mut output = exec.zeroed::<i32>(64).unwrap();
    let e = exec.launch(&kernel, Scale { input: &input, output: &mut output, factor: 1 }).unwrap_err();
    assert!(matches!(&e, DeviceError::Kernel { kernel, .. } if kernel == "scale"), "{e}");
    assert!(output.write(60, &[0; 5]).is_err());
    assert!(output.read(usize::MAX, &mut [0; 2]).is_err());
    assert!(output.write(64, &[]).is_ok());
}

#[test]
fn a_buffer_shorter_than_a_kernel_says_is_refused_before_it_runs() {
    #[derive(LaunchArgs)]
    struct ReadArgs<'a> {
        x: &'a Buffer<u32>,
        y: &'a mut Buffer<u32>,
    }
    let on = Executor::interpreter();
    let op = read::Read { blocks: 1, rounds: 1 };
    let kernel = on.load::<ReadArgs<'_>>(read::lower(&op)).unwrap();
    let (words, threads) = (op.words() as usize, op.threads() as usize);
    for (x, y, short) in [(words, threads, None), (words - 1, threads, Some("x")), (words + 8, threads - 1, Some("y"))]
    {
        let (x, mut y) = (on.zeroed(x).unwrap(), on.zeroed(y).unwrap());
        let launched = on.launch(&kernel, ReadArgs { x: &x, y: &mut y });
        let recorded = on.record().launch(&kernel, ReadArgs { x: &x, y: &mut y });
        for result in [launched, recorded] {
            match (result, short) {
                (Ok(()), None) => (),
                (Err(e), Some(name)) => assert!(e.to_string().contains(&format!("bytes for `{name}`")), "{e}"),
                (result, _) => panic!("{result:?} for {short:?}"),
            }
        }
    }
    assert!(on.zeroed::<u8>(1 << 31).is_err());
}

#[test]
fn without_a_gpu_the_message_says_what_to_do() {
    let Err(e) = Executor::cuda(1_000_000) else { panic!("a million GPUs") };
    let cures = ["install", "update", "GPU"];
    assert!(cures.iter().any(|c| e.to_string().contains(c)), "{e}");
}

/// The kernels between the matrices of a model of Llama-3.1-8B's shape, attention apart.
fn step_kernels(batch: u32, target: Target) -> Vec<Kernel> {
    let (hidden, inner) = (4096, 14336);
    let gated = |first| Span { first, stride: 2 * inner };
    let residual = Span::rows(hidden);
    vec![
        embed::lower(&embed::Embed { columns: hidden, elem: Elem::BF16, batch, y: residual }),
        norm::lower(&norm::Norm { columns: hidden, batch, x: residual, norm: RmsNorm { eps: 1e-5, add_one: false } }),
        rows::lower(&rows::Rows { columns: hidden, batch, x: residual, y: residual }),
        glu::lower(&glu::Glu { columns: inner, batch, activation: Activation::Silu, gate: gated(0), up: gated(inner) }),
        add::lower(&add::Add { columns: hidden, batch, x: Span::rows(0), y: residual }),
        dense::lower(&dense::Dense {
            rows: 128_256,
            cols: hidden,
            elem: Elem::BF16,
            batch,
            x: residual,
            y: Span::rows(128_256),
            accumulate: false,
        }),
        argmax::lower(&argmax::Argmax { columns: 128_256, batch, logits: Span::rows(128_256) }, &target.device()),
    ]
}

#[test]
fn step_kernels_compile_without_spills_for_every_target() {
    let Some(nvrtc) = jit::nvrtc_for_tests() else { return };
    let targets: Vec<Target> = Target::ALL.into_iter().filter(|t| nvrtc.supports(t.nvrtc_arch())).collect();
    targets.into_par_iter().flat_map_iter(|t| [(t, 1), (t, 8)]).for_each(|(target, batch)| {
        for kernel in step_kernels(batch, target) {
            let source = cuda::print(cuda::check(&kernel, target).unwrap_or_else(|e| panic!("{e}")));
            let options = jit::Options::default();
            let cubin = jit::compile_in(&Cache::none(), &source, &kernel.name, target.nvrtc_arch(), &options);
            let cubin = cubin.unwrap_or_else(|e| panic!("{e}"));
            let usage = cubin.usage.expect("the compiler says");
            assert_eq!((usage.spill_stores, usage.spill_loads, usage.stack), (0, 0, 0), "{} for {target}", kernel.name);
            assert!(!cubin.log.contains("warning"), "{}", cubin.log);
        }
    });
}

#[test]
fn blocks_of_an_uneven_grid_are_kept_apart() {
    let device = Target::Sm90a.device();
    let fit = |apart: bool, grid: u32, array: u32| {
        let b = Builder::new("k", [grid, 1], 256);
        if apart {
            b.apart();
        }
        b.shared("s", Elem::U32, array / 4);
        device.shared_per_sm / (executor::shared_bytes(&b.finish(), &device) + 1024)
    };
    assert_eq!([64, 131, 256, 300].map(|grid| fit(true, grid, 16 << 10)), [1, 1, 2, 3]);
    assert_eq!([132, 264].map(|grid| fit(true, grid, 16 << 10)), [13, 13], "an even grid");
    assert_eq!(fit(false, 64, 16 << 10), 13, "not asked for");
    assert_eq!(fit(true, 256, 160 << 10), 1, "it needs more");
}
