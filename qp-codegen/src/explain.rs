//! What a quantizer costs and how its bits lie, as text for people.

mod format;

use std::fmt::Write;

use crate::cuda::{Device, Target};
use crate::kernels::gemv::Gemv;
use crate::kernels::{encode, product};
use crate::layout::{self, BLOCKS_PER_TILE, LANES_PER_BLOCK, Packed};
use crate::metric::Effort;
use crate::palette;
use crate::spec::expr::{Decode, Op};
use crate::spec::{Code, Quantizer, Rotation, ScaleKind, Shape, TableSource, Value};

/// Bits of the stream that the picture shows.
const PICTURE_BITS: u32 = 64;

pub use format::explain as explain_format;

/// Bytes of all tables.
pub fn table_bytes(q: &Quantizer) -> u64 {
    let of = |c: &Code| c.tables.iter().map(|t| u64::from(t.entries * c.vector * c.value.bytes())).sum::<u64>();
    q.codes.iter().map(of).sum()
}

/// Bytes of a packed matrix with its scales, without tables.
pub fn matrix_bytes(q: &Quantizer, shape: Shape) -> u64 {
    let scales = match q.scale {
        ScaleKind::Row => u64::from(shape.rows),
        ScaleKind::Matrix => 1,
    };
    Packed::new(q, shape).words() as u64 * 4 + 2 * scales
}

/// Operations that turn a step's bits into its entries: two to cut the window out, then one a node that computes
/// (a look-up counts two: its address and its load; a bit costs nothing of its own).
pub fn step_operations(d: &Decode, vector: u32) -> u32 {
    let cost = |op: &Op| match op {
        Op::Window => 2,
        Op::Const(_) | Op::Bit(..) => 0,
        Op::Not(_) | Op::Binary(..) | Op::Byte(..) | Op::ByteSum(_) | Op::Signs(_) | Op::Vector(..) => 1,
        Op::Lookup { .. } => 2,
        Op::Pack(_) => vector.max(2) - 1,
    };
    d.nodes.iter().map(cost).sum()
}

/// The least mean squared error of any code of `rate` bits for a Gaussian source of unit variance: `2^(-2 rate)`.
pub fn bound(rate: f64) -> f64 {
    (-2.0 * rate).exp2()
}

/// Everything, for a matrix of `shape`.
pub fn explain(q: &Quantizer, shape: Shape) -> String {
    let mut out = String::new();
    let o = &mut out;
    let weights = f64::from(shape.rows) * f64::from(shape.cols);
    let bytes = matrix_bytes(q, shape) as f64;
    line(o, &q.name);
    line(o, &format!("  rate        {} bits a weight", decimal(q.rate())));
    line(
        o,
        &format!(
            "  in memory   {} bytes a weight for {} x {}, scales and padding included ({:.2} MB)",
            decimal(bytes / weights),
            shape.rows,
            shape.cols,
            bytes / 1e6
        ),
    );
    line(o, &format!("  tables      {} bytes", table_bytes(q)));
    let measured = match palette::distortion(&q.name).filter(|_| palette::get(&q.name).as_ref() == Some(q)) {
        Some(d) => format!("{d} mean squared error for a unit Gaussian, {:.3} times the bound", d / bound(q.rate())),
        None => format!("not measured: qp bench distortion FILE.qspec:{}", q.name),
    };
    line(o, &format!("  distortion  {measured} (bound {})", significant(bound(q.rate()))));
    line(
        o,
        &format!(
            "  scale       {}",
            match q.scale {
                ScaleKind::Row => "one a row, bfloat16",
                ScaleKind::Matrix => "one for the matrix, bfloat16",
            }
        ),
    );
    line(
        o,
        &format!(
            "  rotation    {}",
            match q.rotation {
                Rotation::None => "none".to_string(),
                Rotation::Hadamard { seed, block: None, .. } => {
                    format!("random signs (seed {seed}), then Hadamard, along the columns")
                }
                Rotation::Hadamard { seed, block: Some(block), interleave } => {
                    let interleaved = interleave.map(|n| format!(", interleaved over {n}")).unwrap_or_default();
                    format!("random signs (seed {seed}), then Hadamard in blocks of {block} columns{interleaved}")
                }
            }
        ),
    );
    speed(o, q, shape);
    line(o, &format!("  hash        {}", q.hash()));
    for (i, code) in q.codes.iter().enumerate() {
        line(o, "");
        if q.codes.len() > 1 {
            line(o, &format!("code {i}: column blocks {i}, {}, …", i + q.codes.len()));
        } else {
            line(o, "code");
        }
        explain_code(o, code);
    }
    out
}

/// The GPU for which times are told.
const TARGET: Target = Target::Sm90a;

/// How exact products are, how long one takes and what limits it, and where the quantizer can be encoded.
fn speed(o: &mut String, q: &Quantizer, shape: Shape) {
    let products = match q.value() {
        Value::I8 => "one product of bytes",
        Value::I16 => "two products of bytes, of high and low ones",
    };
    line(o, &format!("  products    exact sums of integers, by {products}; activations are rounded to 15 bits"));
    let seconds = |device: &Device| {
        let op = Gemv { quantizer: q, shape, batch: 1, accumulate: false };
        product::Launch::ranked(&op, device)[0].0
    };
    line(o, &time(&seconds, matrix_bytes(q, shape)));
    let refused = q.codes.iter().find_map(|c| encode::Plan::new(c, &TARGET.device()).err());
    let on_gpu = match refused {
        _ if !q.is_trained() => "not before its table is trained: qp train-codebook".to_string(),
        None => "on a CPU or a GPU".to_string(),
        Some(why) => why.to_string(),
    };
    line(o, &format!("  encoding    {on_gpu}"));
}

/// What the cost model expects of a product with one token's activations, and what limits it: reading,
/// where that alone takes most of the time; decoding, where a higher clock would save much; or the launch itself.
fn time(seconds: &dyn Fn(&Device) -> f64, bytes: u64) -> String {
    let device = TARGET.device();
    let all = seconds(&device);
    let reading = bytes as f64 / device.bandwidth;
    let limit = if reading > 0.6 * all {
        "limited by the memory"
    } else if seconds(&Device { clock: device.clock * 1e3, ..device }) < 0.8 * all {
        "limited by decoding"
    } else {
        "starting it takes most of that"
    };
    format!(
        "  a token     about {} us on an {}, {limit}; reading the bytes alone takes {}",
        rounded(all * 1e6),
        device.name,
        rounded(reading * 1e6)
    )
}

fn line(out: &mut String, text: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}

fn decimal(x: f64) -> String {
    let text = format!("{x:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// About `x`, to two digits.
fn rounded(x: f64) -> String {
    let digits = (1 - x.log10().floor() as i32).clamp(0, 12) as usize;
    decimal(format!("{x:.digits$}").parse().unwrap_or(x))
}

fn megabytes(bytes: u64) -> String {
    rounded((bytes as f64 / 1e6).max(0.01))
}

fn significant(x: f64) -> String {
    let digits = (3 - x.log10().floor() as i32).clamp(0, 12) as usize;
    format!("{x:.digits$}")
}

fn explain_code(o: &mut String, c: &Code) {
    let steps: Vec<String> = c.steps.iter().map(u32::to_string).collect();
    let value = match c.value {
        Value::I8 => "8-bit",
        Value::I16 => "16-bit",
    };
    line(
        o,
        &format!(
            "  step        {} bits for {} weight{}, window {} bits",
            steps.join(" and "),
            c.vector,
            if c.vector == 1 { "" } else { "s" },
            c.window
        ),
    );
    line(
        o,
        &format!(
            "  block       {} x {} = {} weights, {} steps, {} bits{}",
            c.block.rows,
            c.block.cols,
            c.weights(),
            c.steps_per_block(),
            c.block_bits(),
            if c.is_memoryless() { "" } else { ", tail-biting" }
        ),
    );
    let offset = if c.half_offset { " + 1/2" } else { "" };
    line(o, &format!("  weight      (entry{offset}) x {} x scale, entries {value}", c.unit));
    for t in &c.tables {
        let source = match &t.source {
            TableSource::Inline => "written in the spec".to_string(),
            TableSource::File(f) => format!("from {}", f.display()),
            TableSource::Trained { file, .. } if t.values.is_empty() => {
                format!("not trained yet, to be kept in {}", file.display())
            }
            TableSource::Trained { file, training: r } => {
                let how = format!("{} rounds of {} samples, seed {}", r.rounds, r.samples, r.seed);
                format!("trained ({how}), in {}", file.display())
            }
        };
        let bytes = t.entries * c.vector * c.value.bytes();
        line(o, &format!("  table {:<5} {} entries of {}, {bytes} bytes, {source}", t.name, t.entries, c.vector));
    }
    let operations = step_operations(&c.decode, c.vector);
    let each = f64::from(operations) / f64::from(c.vector);
    line(o, &format!("  decode      {operations} operations a step, {} a weight", decimal(each)));
    let effort = Effort::of(c);
    line(
        o,
        &format!(
            "  encode      {:.0} windows compared a weight; on a CPU about {} s of a core for a million weights, {} MB a thread \
             and {} MB for all",
            effort.windows,
            rounded(effort.seconds * 1e6),
            megabytes(effort.of_thread),
            megabytes(effort.shared),
        ),
    );
    line(o, "");
    picture(o, c);
    line(o, "");
    lanes(o, c);
}

/// The windows of the first steps, and of the last, over the stream.
fn picture(o: &mut String, c: &Code) {
    let bits = c.block_bits();
    let shown = PICTURE_BITS.min(bits);
    line(
        o,
        "  the windows over the block's bits, lowest first (# the bits that a step moves, = the rest of its window)",
    );
    let mut ruler = String::new();
    for tens in (0..shown).step_by(8) {
        let _ = write!(ruler, "{tens:<8}");
    }
    line(o, &format!("    {:<9}{}", "bit", ruler.trim_end()));
    let mut words = vec![' '; shown as usize];
    for start in (0..shown).step_by(32) {
        words[start as usize] = '|';
    }
    line(o, &format!("    {:<9}{}", "word", words.iter().collect::<String>().trim_end()));
    let last = c.steps_per_block() - 1;
    let row = |s: u32| {
        let (at, kv) = (c.step_offset(s), c.step_bits(s));
        let mut text = vec!['.'; shown as usize];
        for i in 0..c.window {
            let bit = (at + i) % bits;
            if let Some(t) = text.get_mut(bit as usize) {
                *t = if i < kv { '#' } else { '=' };
            }
        }
        let first = s * c.vector;
        let weights =
            if c.vector == 1 { format!("weight {first}") } else { format!("weights {first}..{}", first + c.vector) };
        (format!("    {:<9}{}", format!("step {s}"), text.iter().collect::<String>()), weights)
    };
    let first_rows = 5.min(last);
    for s in 0..first_rows {
        let (text, weights) = row(s);
        line(o, &format!("{text}  {weights}"));
    }
    if last > first_rows {
        line(o, "    …");
    }
    let (text, weights) = row(last);
    let wraps = c.step_offset(last) + c.window > bits;
    line(o, &format!("{text}  {weights}{}", if wraps { ", wraps around" } else { "" }));
}

/// How the block's bits are shared by lanes, and tiles are stored.
fn lanes(o: &mut String, c: &Code) {
    let words = layout::lane_words(c);
    let steps = c.steps_per_block() / LANES_PER_BLOCK;
    let tile = layout::tile(c.block);
    line(o, "  the block over four lanes of a warp");
    let cell = format!("{words} words, {steps} steps");
    let width = cell.len().max(14);
    let join = |cells: Vec<String>| cells.iter().map(|t| format!("{t:<width$}")).collect::<Vec<_>>().join(" | ");
    let lane = |t: u32| format!("lane 4g+{t}");
    line(o, &format!("    | {} |", join((0..LANES_PER_BLOCK).map(lane).collect())));
    let range = |t: u32| format!("words {}..{}", t * words, (t + 1) * words);
    line(o, &format!("    | {} |", join((0..LANES_PER_BLOCK).map(range).collect())));
    let range = |t: u32| format!("steps {}..{}", t * steps, (t + 1) * steps);
    line(o, &format!("    | {} |", join((0..LANES_PER_BLOCK).map(range).collect())));
    let chunks: Vec<String> = layout::chunks(words).iter().map(|(_, w)| w.to_string()).collect();
    line(
        o,
        &format!(
            "  a tile is {} x {} weights: {BLOCKS_PER_TILE} blocks g, {} bytes; its lanes' words are stored in chunks of {}",
            tile.rows,
            tile.cols,
            words * 128,
            chunks.join(" + ")
        ),
    );
}

/// The quantizers as a table, one line each.
pub fn list(quantizers: &[Quantizer]) -> String {
    let rows: Vec<[String; 7]> = quantizers
        .iter()
        .map(|q| {
            let c = &q.codes[0];
            let operations = q
                .codes
                .iter()
                .map(|c| f64::from(step_operations(&c.decode, c.vector)) / f64::from(c.vector))
                .fold(0.0, f64::max);
            let distortion = palette::distortion(&q.name).map_or("-".to_string(), significant);
            let state = if q.is_trained() { "" } else { "untrained" };
            [
                q.name.clone(),
                decimal(q.rate()),
                format!("{}/{}", c.window, c.vector),
                table_bytes(q).to_string(),
                decimal(operations),
                distortion,
                state.to_string(),
            ]
        })
        .collect();
    let head = ["quantizer", "bits", "L/V", "table bytes", "ops a weight", "distortion", ""].map(str::to_string);
    let width = |i: usize| rows.iter().chain([&head]).map(|r| r[i].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = String::new();
    for row in [&head].into_iter().chain(&rows) {
        let cells = row.iter().zip(&widths).enumerate();
        let cells = cells.map(|(i, (t, w))| if i == 0 { format!("{t:<w$}") } else { format!("{t:>w$}") });
        line(&mut out, cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_add_up() {
        let q = palette::get("tcq_2.5").unwrap();
        let shape = Shape { rows: 64, cols: 256 };
        assert_eq!(matrix_bytes(&q, shape), 64 * 256 * 5 / 16 + 2 * 64);
        assert_eq!(table_bytes(&q), 1024);
        assert_eq!(table_bytes(&palette::get("nuq_8").unwrap()), 512);
        assert_eq!(significant(bound(2.0)), "0.06250");
    }

    #[test]
    fn it_says_how_exact_how_fast_and_what_encodes_it() {
        let shape = Shape { rows: 28672, cols: 4096 };
        let text = explain(&palette::get("fine_3").unwrap(), shape);
        for line in [
            "  products    exact sums of integers, by one product of bytes; activations are rounded to 15 bits\n",
            "  a token     about ",
            " us on an H100 SXM, ",
            "; reading the bytes alone takes ",
            "  encoding    on a CPU or a GPU\n",
        ] {
            assert!(text.contains(line), "{line}{text}");
        }
        let small = explain(&palette::get("nuq_4").unwrap(), Shape { rows: 64, cols: 256 });
        assert!(small.contains("by two products of bytes"), "{small}");
        let mut long = palette::get("tcq_3").unwrap();
        (long.codes[0].window, long.codes[0].steps) = (24, vec![2]);
        let text = explain(&long, shape);
        assert!(
            text.contains("  encoding    windows of 24 bits have more states than a GPU's encoder can keep"),
            "{text}"
        );
        assert!(text.contains("not measured: qp bench distortion FILE.qspec:tcq_3 "), "{text}");
    }

    #[test]
    fn the_picture_shows_a_window_that_wraps() {
        let text = explain(&palette::get("tcq_1.5").unwrap(), Shape { rows: 16, cols: 128 });
        assert!(text.contains("step 0   ###=============..."), "{text}");
        assert!(text.contains("step 1   ...###=============..."), "{text}");
        assert!(text.contains("step 127 =============..."), "{text}");
        assert!(text.contains("wraps around"), "{text}");
    }
}
