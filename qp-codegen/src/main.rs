//! The `qp-codegen` command: check, format and explain quantizers, and print the kernels that they become.

mod lsp;
mod try_out;

use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use qp_codegen::cuda::{self, Target, print};
use qp_codegen::ir::{Elem, Kernel};
use qp_codegen::kernels::{Span, dequantize, embed_packed, encode, gemv, grouped, prepare, product};
use qp_codegen::layout::{Packed, TooLarge};
use qp_codegen::nvrtc;
use qp_codegen::reader;
use qp_codegen::reference::RmsNorm;
use qp_codegen::spec::terms::Terms;
use qp_codegen::spec::{self, Definition, Format, Matrix, Quantizer, Shape};
use qp_codegen::syntax::diag::shown;
use qp_codegen::syntax::{self, Diagnostics};
use qp_codegen::{explain, formats, output, palette, text_file};

/// Compile .qspec quantizers to CUDA kernels.
#[derive(Parser)]
#[command(name = "qp-codegen", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check .qspec files and report all that is wrong with them
    Check {
        /// Files to check
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Also fail if a table is not trained yet
        #[arg(long)]
        trained: bool,
    },
    /// Lay .qspec files out in the one way
    Fmt {
        /// Files to rewrite; `-` formats standard input to standard output
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Change nothing; fail if a file is not formatted
        #[arg(long)]
        check: bool,
    },
    /// Show what a quantizer costs and how its bits lie
    Explain {
        /// A name of the palette, file.qspec, or file.qspec:name
        spec: String,
        /// Rows x columns of the matrix that sizes are told for
        #[arg(long, default_value = "4096x4096", allow_hyphen_values = true, value_parser = shape)]
        shape: Shape,
        /// Print the canonical text instead: one self-contained quantizer, everything evaluated
        #[arg(long)]
        canonical: bool,
    },
    /// List the quantizers of the palette, or of files
    List {
        /// Files to list
        files: Vec<PathBuf>,
    },
    /// Show what some bits decode to: windows, or with --layout the tensors of a format's matrix
    Try {
        /// A name of the palette or of a format, file.qspec, or file.qspec:name
        spec: String,
        /// Windows (of a format: codes), decimal or 0x…; or the bytes of each tensor of --layout, in hexadecimal
        #[arg(required = true)]
        bits: Vec<String>,
        /// A layout of the format
        #[arg(long, requires = "shape")]
        layout: Option<String>,
        /// Rows x columns of the matrix
        #[arg(long, requires = "layout", allow_hyphen_values = true, value_parser = shape)]
        shape: Option<Shape>,
    },
    /// Print the kernel of a quantizer
    Emit(Emit),
    /// Serve an editor: the language server protocol over standard input and output
    Lsp {
        /// What editors add that know other ways of talking, too
        #[arg(long, hide = true)]
        stdio: bool,
    },
}

/// What `emit` prints.
#[derive(Args)]
struct Emit {
    /// A name of the palette or of a format, file.qspec, or file.qspec:name
    #[arg(long)]
    spec: String,
    /// What the kernel does
    #[arg(long, value_enum, default_value = "gemv")]
    op: Operation,
    /// Rows x columns of the matrix (of all fused matrices together)
    #[arg(long, default_value = "4096x4096", allow_hyphen_values = true, value_parser = shape)]
    shape: Shape,
    /// Tokens
    #[arg(
        long,
        default_value_t = 1,
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(u32).range(1..=product::MAX_BATCH as i64)
    )]
    batch: u32,
    /// What to compile for
    #[arg(long, default_value = "sm_90a")]
    target: Target,
    /// Take what the launch of `--matrix` does from this fusion pattern: a name of the palette or file.qspec:name
    #[arg(long, requires = "matrix")]
    fusion: Option<String>,
    /// The matrix whose launch is meant: q, k, v, o, gate, up or down
    #[arg(long, value_parser = matrix)]
    matrix: Option<Matrix>,
    /// Print the kernel IR instead of CUDA source
    #[arg(long, group = "form")]
    ir: bool,
    /// Print PTX (needs NVRTC, no GPU)
    #[arg(long, group = "form")]
    ptx: bool,
    /// Machine code; goes to a file (needs NVRTC, no GPU)
    #[arg(long, group = "form", requires = "output")]
    cubin: bool,
    /// Write here instead of to standard output
    #[arg(short, long)]
    output: Option<PathBuf>,
}

/// Operations that `emit` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Operation {
    /// Packed words to the matrix
    Dequantize,
    /// Rows of packed words, rotated back: an embedding
    Embed,
    /// Search for the windows of weights (of a mix, the first code's)
    Encode,
    /// Product of packed weights with the activations of a few tokens, or of many
    Gemv,
    /// Rotation and rounding of activations
    Rotate,
}

fn shape(text: &str) -> Result<Shape, String> {
    let parse = |t: &str| t.trim().parse::<u32>().ok().filter(|n| (1..=1 << 20).contains(n));
    let parts = text.split_once(['x', '×']).and_then(|(r, c)| Some((parse(r)?, parse(c)?)));
    let (rows, cols) = parts.ok_or("expected rows x columns, as in 4096x14336")?;
    Ok(Shape { rows, cols })
}

fn matrix(text: &str) -> Result<Matrix, String> {
    let names = Matrix::ALL.map(Matrix::name).join(", ");
    Matrix::ALL.into_iter().find(|m| m.name() == text).ok_or(format!("expected one of {names}"))
}

/// Why a command fails.
enum Failure {
    /// Wrong specs: shown with their text.
    Specs(Diagnostics),
    /// Anything else.
    Other(String),
}

impl From<Diagnostics> for Failure {
    fn from(d: Diagnostics) -> Self {
        Failure::Specs(d)
    }
}

fn main() -> ExitCode {
    let run = match Cli::parse().command {
        Command::Check { files, trained } => check(&files, trained),
        Command::Fmt { files, check } => fmt(&files, check),
        Command::Explain { spec, shape, canonical } => explain(&spec, shape, canonical),
        Command::List { files } => list(&files),
        Command::Try { spec, bits, layout, shape } => try_bits(&spec, &bits, layout.zip(shape)),
        Command::Emit(e) => emit(&e),
        Command::Lsp { stdio: _ } => lsp::serve().map_err(Failure::Other),
    };
    match run {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Specs(d)) => {
            show(&d);
            ExitCode::FAILURE
        }
        Err(Failure::Other(message)) => {
            tell(&format!("error: {}\n", shown(&message)));
            ExitCode::FAILURE
        }
    }
}

fn show(d: &Diagnostics) {
    tell(&d.render(io::stderr().is_terminal()));
}

/// Writes to standard error, if there is a reader.
fn tell(text: &str) {
    io::stderr().write_all(text.as_bytes()).unwrap_or_default();
}

/// Writes to standard output; a reader that went away is no error.
fn print_out(text: &str) -> Result<(), Failure> {
    match io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(Failure::Other(format!("standard output: {e}"))),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn check(files: &[PathBuf], trained: bool) -> Result<(), Failure> {
    let (mut errors, mut warnings) = (0, 0);
    let (mut quantizers, mut formats, mut fusions) = (0, 0, 0);
    for file in files {
        let found = match spec::load_file(file) {
            Ok(library) => {
                quantizers += library.quantizers.len();
                formats += library.formats.len();
                fusions += library.fusions.len();
                let mut found = library.warnings;
                if trained {
                    let arg = |q: &Quantizer| format!("{}:{}", file.display(), q.name);
                    found.list.extend(library.quantizers.iter().filter_map(|q| spec::untrained(q, &arg(q))));
                }
                found
            }
            Err(found) => found,
        };
        show(&found);
        let (e, w) = found.counts();
        errors += e;
        warnings += w;
    }
    let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
    if errors + warnings > 0 {
        tell(&format!("{}, {}\n", count(errors, "error"), count(warnings, "warning")));
    }
    if errors > 0 {
        return Err(Failure::Specs(Diagnostics::default()));
    }
    let fusions = if fusions > 0 { format!(", {}", count(fusions, "fusion")) } else { String::new() };
    let formats = if formats > 0 { format!(", {}", count(formats, "format")) } else { String::new() };
    print_out(&format!("ok: {}{formats}{fusions}\n", count(quantizers, "quantizer")))
}

fn fmt(files: &[PathBuf], check: bool) -> Result<(), Failure> {
    let mut wrong = Diagnostics::default();
    let mut unformatted = Vec::new();
    for file in files {
        let read_failed = |e: io::Error| Failure::Other(format!("cannot read {}: {e}", file.display()));
        let stdin = file == Path::new("-");
        let text = if stdin {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).map_err(read_failed)?;
            text
        } else {
            text_file::read(file).map_err(read_failed)?
        };
        let id = wrong.sources.add(file.display().to_string(), text.clone());
        match syntax::format(id, &text) {
            Err(errors) => wrong.list.extend(errors),
            Ok(formatted) if stdin && !check => print_out(&formatted)?,
            Ok(formatted) if formatted == text => (),
            Ok(_) if check => unformatted.push(file.display().to_string()),
            Ok(formatted) => replace(file, formatted.as_bytes())?,
        }
    }
    if wrong.has_errors() {
        return Err(wrong.into());
    }
    if unformatted.is_empty() {
        return Ok(());
    }
    let files = unformatted.join(", ");
    Err(Failure::Other(format!("not formatted: {files}; run: qp-codegen fmt {}", unformatted.join(" "))))
}

/// Replaces a file whole or not at all.
fn replace(file: &Path, bytes: &[u8]) -> Result<(), Failure> {
    output::write(file, bytes).map_err(|e| Failure::Other(format!("cannot write {}: {e}", file.display())))
}

fn explain(spec: &str, shape: Shape, canonical: bool) -> Result<(), Failure> {
    let q = match spec::resolve_any(spec)? {
        Definition::Format(f) if canonical => return print_out(&f.canonical()),
        Definition::Format(f) => return print_out(&explain::explain_format(&f, shape)),
        Definition::Quantizer(_) if canonical => return print_out(&spec::resolve(spec)?.canonical()),
        Definition::Quantizer(q) => q,
    };
    Packed::check(&q, shape).map_err(|problem| Failure::Other(problem.to_string()))?;
    print_out(&explain::explain(&q, shape))
}

fn list(files: &[PathBuf]) -> Result<(), Failure> {
    if files.is_empty() {
        print_out(&explain::list(&palette::library().quantizers))?;
        return print_out(&format!("\nformats of others, which `qp import` reads: {}\n", formats::names().join(", ")));
    }
    let (mut all, mut formats): (Vec<Quantizer>, Vec<String>) = (Vec::new(), Vec::new());
    for file in files {
        let library = spec::load_file(file)?;
        all.extend(library.quantizers);
        formats.extend(library.formats.into_iter().map(|f| f.name));
    }
    if !all.is_empty() || formats.is_empty() {
        print_out(&explain::list(&all))?;
    }
    if formats.is_empty() { Ok(()) } else { print_out(&format!("formats: {}\n", formats.join(", "))) }
}

fn try_bits(spec: &str, bits: &[String], layout: Option<(String, Shape)>) -> Result<(), Failure> {
    let definition = spec::resolve_any(spec)?;
    if let Definition::Quantizer(_) = &definition {
        // Its tables must be there.
        spec::resolve(spec)?;
    }
    let text = match (layout, &definition) {
        (Some((layout, shape)), Definition::Format(f)) => {
            let tensors: Result<Vec<_>, _> = bits.iter().map(|t| try_out::bytes(t)).collect();
            tensors.and_then(|tensors| try_out::matrix(f, &layout, shape, &tensors))
        }
        (Some(_), Definition::Quantizer(q)) => Err(format!("`{}` has no layouts: it is no format", q.name)),
        (None, _) => {
            let windows: Result<Vec<u32>, _> = bits.iter().map(|t| try_out::number(t)).collect();
            windows.and_then(|w| try_out::windows(&definition, &w))
        }
    };
    print_out(&text.map_err(Failure::Other)?)
}

/// The product with a matrix of a format.
fn product_of_format(e: &Emit, format: &Format) -> Result<Kernel, Failure> {
    let refused = |why: String| Failure::Other(format!("`{}` has no such kernel: {why}", format.name));
    if e.op != Operation::Gemv {
        return Err(refused("formats have products alone".to_owned()));
    }
    reader::possible(format, e.shape).map_err(|why| refused(why.to_string()))?;
    let terms = Terms::of(format).map_err(|why| refused(why.to_string()))?;
    if !terms.fits(e.shape) {
        let (rows, cols) = (e.shape.rows, e.shape.cols);
        return Err(refused(format!(
            "numbers are not those of runs, or results too many to transform, in {rows} x {cols} weights"
        )));
    }
    let y = Span::rows(e.shape.rows);
    let op = grouped::Product { terms: &terms, shape: e.shape, batch: e.batch, y, accumulate: false };
    Ok(grouped::lower(&op, &grouped::Launch::choose(&op, &e.target.device())))
}

/// The kernel that `e` asks for.
fn kernel(e: &Emit) -> Result<Kernel, Failure> {
    // The tables are data: a kernel is the same before and after training.
    let q = match spec::resolve_any(&e.spec)? {
        Definition::Format(format) => return product_of_format(e, &format),
        Definition::Quantizer(q) => q,
    };
    let too_large = |problem: TooLarge| Failure::Other(problem.to_string());
    Packed::check(&q, e.shape).map_err(too_large)?;
    let device = e.target.device();
    let (mut norm, mut accumulate) = (None, false);
    if let (Some(name), Some(matrix)) = (&e.fusion, e.matrix) {
        let fusion = spec::resolve_fusion(name)?;
        let launch = fusion.launch_of(matrix);
        let normed = launch.is_some_and(|l| l.prologue.contains(&spec::Prologue::RmsNorm));
        norm = normed.then_some(RmsNorm { eps: 1e-5, add_one: false });
        accumulate = launch.is_some_and(|l| l.epilogue.contains(&spec::Epilogue::AddResidual));
    }
    Ok(match e.op {
        Operation::Dequantize => {
            dequantize::lower(&dequantize::Dequantize { quantizer: &q, shape: e.shape, output: Elem::F16 }, device.sms)
        }
        Operation::Embed => {
            let y = Span::rows(e.shape.cols);
            embed_packed::lower(&embed_packed::EmbedPacked { quantizer: &q, shape: e.shape, batch: e.batch, y })
        }
        Operation::Encode => {
            let plan = encode::Plan::new(&q.codes[0], &device).map_err(|e| Failure::Other(e.to_string()))?;
            plan.lower(plan.searches(&device))
        }
        Operation::Gemv => {
            let op = gemv::Gemv { quantizer: &q, shape: e.shape, batch: e.batch, accumulate };
            product::Launch::choose(&op, &device).lower(&op)
        }
        Operation::Rotate => {
            let columns = e.shape.cols;
            let op = prepare::Prepare {
                columns,
                batch: e.batch,
                input: Span::rows(columns),
                gate: None,
                norm,
                rotation: q.rotation,
                entering: None,
            };
            prepare::lower(&op, &device)
        }
    })
}

fn emit(e: &Emit) -> Result<(), Failure> {
    let kernel = kernel(e)?;
    let source = print(cuda::check(&kernel, e.target).map_err(|problems| Failure::Other(problems.to_string()))?);
    let (target, options) = (e.target.nvrtc_arch(), nvrtc::Options::default());
    let failed = |e: nvrtc::CompileError| Failure::Other(e.to_string());
    let bytes = if e.ir {
        kernel.to_string().into_bytes()
    } else if e.ptx {
        nvrtc::compile_ptx(&source, &kernel.name, target, &options).map_err(failed)?.into_bytes()
    } else if e.cubin {
        nvrtc::compile(&source, &kernel.name, target, &options).map_err(failed)?.bytes
    } else {
        source.into_bytes()
    };
    match &e.output {
        Some(file) => replace(file, &bytes),
        None => print_out(&String::from_utf8_lossy(&bytes)),
    }
}
