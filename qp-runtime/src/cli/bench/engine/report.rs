//! What `qp bench engine` measured, as JSON and as text.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The GPU's name, or what stands for one.
    pub device: String,
    /// Quantizers of the matrices.
    pub quantizers: String,
    /// Bits of a number of keys and values.
    pub cache_bits: u32,
    /// Bits a weight of all packed matrices.
    pub bits: f64,
    /// Bytes of matrices that a step of one token reads.
    pub read_bytes: u64,
    /// Bytes of keys and values of a token.
    pub token_bytes: u64,
    /// Bytes a second that a kernel reaches which only reads; `None` where that means nothing.
    pub bandwidth: Option<f64>,
    /// Device memory.
    pub memory: Memory,
    /// Tokens one after the other.
    pub decode: Vec<Decode>,
    /// Prompts.
    pub prompts: Vec<Prompt>,
    /// Where a step's time goes.
    pub kinds: Vec<Kind>,
    /// First tokens in fresh processes.
    pub starts: Vec<Start>,
}

/// Bytes on the device.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// Matrices.
    pub weights: u64,
    /// Keys and values of all pages.
    pub cache: u64,
    /// What a step of the largest size needs.
    pub step: u64,
    /// What else was taken: kernels, graphs, the driver; `None` where the device does not say.
    pub other: Option<u64>,
}

/// Steps of one token a sequence.
#[derive(Clone, Debug, Serialize)]
pub struct Decode {
    /// Sequences of a step.
    pub sequences: usize,
    /// Tokens of each before it.
    pub context: usize,
    /// Seconds of a step; `None` if it does not fit the memory.
    pub seconds: Option<f64>,
}

/// A prompt.
#[derive(Clone, Debug, Serialize)]
pub struct Prompt {
    /// Its tokens.
    pub tokens: usize,
    /// Seconds of the first one of this length, kernels and graphs made; `None` if it does not fit the memory.
    pub first: Option<f64>,
    /// Seconds of later ones.
    pub seconds: Option<f64>,
}

/// Name of all launches of a step together.
pub const ALL: &str = "all in one graph";

/// Launches of one kind, of a whole step, in a graph of their own.
#[derive(Clone, Debug, Serialize)]
pub struct Kind {
    /// Tokens of the step.
    pub tokens: u32,
    /// What they do.
    pub kind: String,
    /// How many.
    pub launches: usize,
    /// Seconds of all of them.
    pub seconds: f64,
}

/// Seconds of a fresh process until its first tokens.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// What was started.
    pub what: String,
    /// Until the device was open.
    pub device: f64,
    /// From then until the weights were read and checked, which begins with the process; 0 where they are made up.
    pub weights: f64,
    /// Until the engine was ready: matrices on the device, first kernels made.
    pub engine: f64,
    /// Until the first token after a short prompt.
    pub first: f64,
    /// Until the second.
    pub second: f64,
}

impl Start {
    /// From the beginning to the first token.
    pub fn all(&self) -> f64 {
        self.device + self.weights + self.engine + self.first
    }
}

impl Report {
    /// Share of the bandwidth that a step takes, if that is known.
    fn share(&self, d: &Decode) -> Option<f64> {
        let bytes = self.read_bytes as f64 + self.token_bytes as f64 * (d.sequences * d.context) as f64;
        Some(bytes / d.seconds? / self.bandwidth?)
    }

    /// Tables in Markdown.
    pub fn text(&self) -> String {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        let mut out = format!(
            "{}; {}: {:.2} bits a weight, {:.2} GB a step; keys and values in {} bits{}.\n\n",
            self.device,
            self.quantizers,
            self.bits,
            self.read_bytes as f64 / 1e9,
            self.cache_bits,
            self.bandwidth.map_or(String::new(), |b| format!(", memory read alone {:.2} TB/s", b / 1e12)),
        );
        out += "| sequences | context | ms a step | tokens/s | of the bandwidth |\n|---|---|---|---|---|\n";
        for d in &self.decode {
            let _ = match d.seconds {
                None => writeln!(out, "| {} | {} | does not fit | | |", d.sequences, d.context),
                Some(s) => writeln!(
                    out,
                    "| {} | {} | {:.3} | {:.0} | {} |",
                    d.sequences,
                    d.context,
                    s * 1e3,
                    d.sequences as f64 / s,
                    self.share(d).map_or("-".to_owned(), |s| format!("{:.0} %", 100.0 * s)),
                ),
            };
        }
        out += "\n| prompt, tokens | first of its length, ms | ms | tokens/s |\n|---|---|---|---|\n";
        for p in &self.prompts {
            let _ = match (p.first, p.seconds) {
                (Some(first), Some(s)) => {
                    let (first_ms, ms, rate) = (first * 1e3, s * 1e3, p.tokens as f64 / s);
                    writeln!(out, "| {} | {first_ms:.1} | {ms:.1} | {rate:.0} |", p.tokens)
                }
                _ => writeln!(out, "| {} | does not fit | | |", p.tokens),
            };
        }
        out += "\n| tokens of a step | launches | how many | us | share |\n|---|---|---|---|---|\n";
        for k in &self.kinds {
            let of_step = |o: &&Kind| o.tokens == k.tokens && o.kind == ALL;
            let all = self.kinds.iter().find(of_step).map_or(k.seconds, |o| o.seconds);
            let (us, share) = (k.seconds * 1e6, 100.0 * k.seconds / all);
            let _ = writeln!(out, "| {} | {} | {} | {us:.1} | {share:.0} % |", k.tokens, k.kind, k.launches);
        }
        if !self.starts.is_empty() {
            out += "\n| a fresh process, seconds | device | weights | engine | first token | all | next token |\n";
            out += "|---|---|---|---|---|---|---|\n";
        }
        for s in &self.starts {
            let Start { what, device, weights, engine, first, second } = s;
            let _ = writeln!(
                out,
                "| {what} | {device:.2} | {weights:.2} | {engine:.2} | {first:.3} | {:.2} | {second:.4} |",
                s.all()
            );
        }
        let Memory { weights, cache, step, other } = &self.memory;
        let _ = writeln!(
            out,
            "\nDevice memory: weights {:.2} GiB, keys and values {:.2} GiB, a step {:.2} GiB{}.",
            gib(*weights),
            gib(*cache),
            gib(*step),
            other.map_or(String::new(), |o| format!(", all else {:.2} GiB", gib(o))),
        );
        out
    }
}
