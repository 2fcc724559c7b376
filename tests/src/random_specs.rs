//! Random `.qspec` texts: windows, patterns of steps, vectors, blocks, tables, expressions and mixes of every kind that the
//! language has, most of which the checker accepts.

use std::fmt::Write as _;

/// Pseudo-random numbers (SplitMix64), the same everywhere.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5851_F42D_4C95_7F2D)
    }

    /// 32 bits.
    pub fn word(&mut self) -> u32 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 16) as u32
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.word()) * u64::from(n)) >> 32) as u32
    }

    /// A number of `from..=to`.
    pub fn within(&mut self, from: u32, to: u32) -> u32 {
        from + self.below(to - from + 1)
    }

    /// True once in `n` times, on average.
    pub fn once_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    /// One of several.
    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u32) as usize]
    }
}

/// What the codes of a mix have in common.
struct Common {
    rows: u32,
    cols: u32,
    value: &'static str,
    half: bool,
    unit: &'static str,
}

/// The text of a random file, whose last quantizer is the one that is meant. Its tables are untrained.
pub fn text(r: &mut Random) -> String {
    write(r, false)
}

/// The same with small tables written in it, so that it stands alone.
pub fn text_alone(r: &mut Random) -> String {
    write(r, true)
}

fn write(r: &mut Random, alone: bool) -> String {
    let large = r.once_in(12);
    let (rows, cols) = loop {
        // Blocks of ordinary and of extreme shapes, small ones more often.
        let rows = 2 * if large { 1 << r.below(11) } else { r.pick(&[1, 1, 1, 2, 2, 3, 4, 5, 8, 16]) };
        let cols = 32 * if large { 1 << r.below(11) } else { r.pick(&[1, 2, 3, 4, 4, 4, 4, 5, 8, 16]) };
        if rows * cols <= if large { 1 << 16 } else { 1 << 12 } {
            break (rows, cols);
        }
    };
    let value = r.pick(&["i8", "i8", "i16"]);
    let unit = r.pick(&["1/32", "1/4096", "0.07", "1"]);
    let common = Common { rows, cols, value, half: r.once_in(2), unit };
    let scale = r.pick(&["row", "row", "matrix"]);
    let rotate = if r.once_in(2) { format!("hadamard(seed = {})", r.below(1000)) } else { "none".into() };
    let most = if r.once_in(8) { 7 } else { 3 };
    let mixed = if r.once_in(4) { r.within(2, most) } else { 1 };
    let mut out = String::new();
    for i in 0..mixed {
        let name = if mixed == 1 { "q".to_string() } else { format!("part_{i}") };
        let body = body(r, &common, alone);
        let _ = writeln!(out, "quantizer {name} {{\n{body}    scale {scale}\n    rotate {rotate}\n}}\n");
    }
    if mixed > 1 {
        let names: Vec<String> = (0..mixed).map(|i| format!("part_{i}")).collect();
        let _ = writeln!(out, "quantizer q = mix({})", names.join(", "));
    }
    out
}

fn body(r: &mut Random, common: &Common, alone: bool) -> String {
    let weights = common.rows * common.cols;
    let vector = r.pick(&[1, 2, 2, 4]);
    let lane_steps = weights / vector / 4;
    // A pattern that divides a lane's steps, with a sum that makes whole words; tried a few times, as not all block shapes
    // have one of each kind.
    let steps = (0..200)
        .find_map(|i| {
            let n = if i > 150 || r.once_in(2) { 1 } else { r.within(2, 16) };
            let steps: Vec<u32> = (0..n).map(|_| r.within(1, 4 * vector.min(2) + 2)).collect();
            let bits = (lane_steps / n) * steps.iter().sum::<u32>();
            (lane_steps.is_multiple_of(n) && bits.is_multiple_of(32)).then_some(steps)
        })
        .unwrap_or_else(|| vec![r.within(1, 8)]);
    let most = steps.iter().copied().max().unwrap_or(1);
    let longest = if r.once_in(3) { 24 } else { most.max(12) };
    let window = if r.once_in(4) { most } else { r.within(most, longest) };
    let tables = r.pick(&[0, 1, 1, 1, 2]);
    let mut text = String::new();
    let list: Vec<String> = steps.iter().map(u32::to_string).collect();
    let step = if list.len() == 1 { list[0].clone() } else { format!("[{}]", list.join(", ")) };
    let _ = writeln!(text, "    window {window}\n    vector {vector}\n    step {step}");
    let _ = writeln!(text, "    block {} x {}", common.rows, common.cols);
    let _ = writeln!(text, "    values {}{}", common.value, if common.half { " + 1/2" } else { "" });
    let _ = writeln!(text, "    unit {}", common.unit);
    let mut names = Vec::new();
    for i in 0..tables {
        // Rarely one that leaves no room for itself in shared memory.
        let bits = if r.once_in(20) && !alone { r.within(12, 16) } else { r.within(0, 9) };
        let name = ["t", "u"][i as usize];
        let source = if alone {
            let values: Vec<String> = (0..vector << bits).map(|_| (r.below(256) as i32 - 128).to_string()).collect();
            format!("= [{}]", values.join(", "))
        } else {
            "trained(seed = 1, rounds = 1, samples = 1) in \"none\"".to_string()
        };
        let _ = writeln!(text, "    table {name}[{}] {source}", 1 << bits);
        names.push((name, bits));
    }
    let _ = writeln!(text, "    decode w {{");
    let mut words = vec!["w".to_string()];
    for i in 0..r.below(4) {
        let word = word(r, &words, 3);
        let _ = writeln!(text, "        let x{i} = {word}");
        words.push(format!("x{i}"));
    }
    let mut result = vector_of(r, &words, &names, window, vector);
    while r.once_in(3) {
        let more = vector_of(r, &words, &names, window, vector);
        result = format!("({result} {} {more})", r.pick(&["^", "+"]));
    }
    let _ = writeln!(text, "        {result}\n    }}");
    text
}

/// An expression of words.
fn word(r: &mut Random, words: &[String], depth: u32) -> String {
    if depth == 0 || r.once_in(4) {
        return if r.once_in(5) { r.word().to_string() } else { words[r.below(words.len() as u32) as usize].clone() };
    }
    let a = word(r, words, depth - 1);
    match r.below(9) {
        0 => format!("~{a}"),
        1 => format!("byte({a}, {})", r.below(4)),
        2 => format!("sum_bytes({a})"),
        3 => format!("({a} * 0x{:x})", r.word() | 1),
        4 => format!("({a} {} {})", r.pick(&["<<", ">>"]), r.below(34)),
        5 => format!("({a} & 0x{:x})", r.word()),
        _ => {
            let b = word(r, words, depth - 1);
            format!("({a} {} {b})", r.pick(&["+", "-", "*", "&", "|", "^", "<<", ">>"]))
        }
    }
}

/// An expression of vectors.
fn vector_of(r: &mut Random, words: &[String], tables: &[(&str, u32)], window: u32, vector: u32) -> String {
    match r.below(5) {
        0..3 if !tables.is_empty() => {
            let (name, bits) = tables[r.below(tables.len() as u32) as usize];
            let index = word(r, words, 2);
            if r.once_in(2) { format!("{name}[({index}) >> {}]", 32 - bits.max(1)) } else { format!("{name}[{index}]") }
        }
        3 => {
            let bits: Vec<String> = (0..vector)
                .map(|_| match r.pick(words_or_window(words)) {
                    "w" => format!("w[{}]", r.below(window)),
                    word => format!("{word}[{}]", r.below(32)),
                })
                .collect();
            format!("signs({})", bits.join(", "))
        }
        _ => {
            let parts: Vec<String> = (0..vector).map(|_| word(r, words, 2)).collect();
            format!("[{}]", parts.join(", "))
        }
    }
}

/// The names of the words that a bit may be taken of.
fn words_or_window(words: &[String]) -> &[&str] {
    const NAMES: [&str; 4] = ["w", "x0", "x1", "x2"];
    &NAMES[..words.len()]
}
