//! What the words of the language mean, for whoever points at one.

use super::names::Block;

/// A word, how it is used, and what it means.
pub struct Word {
    pub word: &'static str,
    pub example: &'static str,
    pub text: &'static str,
}

const fn word(word: &'static str, example: &'static str, text: &'static str) -> Word {
    Word { word, example, text }
}

/// Keywords that begin an item.
const OF_ITEMS: &[Word] = &[
    word(
        "use",
        "use \"file.qspec\"",
        "Makes families, quantizers and functions of another file known. The path is relative to this file.",
    ),
    word(
        "family",
        "family name(parameters) { … }",
        "A quantizer with parameters; its members are `quantizer name = family(constants)`.",
    ),
    word("quantizer", "quantizer name { … }", "A quantizer written out, a member of a family, or a mix of several."),
    word("fusion", "fusion name { launch … }", "Which matrices of a layer share a launch."),
    word(
        "function",
        "function name(parameters) { … }",
        "An expression with a name, expanded where a decode block calls it.",
    ),
    word("layout", "layout name of quantizer { … }", "Where a file keeps the bits of a format."),
];

/// Keywords that begin a property.
const OF_PROPERTIES: &[Word] = &[
    word("let", "let n = 2 ** bits", "A constant for what follows; in a block, a name for an expression."),
    word("window", "window 16", "Bits that decide the weights of a step, 1 to 24."),
    word("vector", "vector 2", "Weights of a step: 1, 2 or 4."),
    word("step", "step 4", "Bits that the window moves forward: 1 to the window's; a list of them repeats."),
    word(
        "bits",
        "bits 4",
        "`bits N for V` is short for `window N`, `vector V` (1 if left out) and `step N`: codes without memory.",
    ),
    word(
        "block",
        "block 2 x 128",
        "Rows x columns that share a stream of bits: even rows, columns a multiple of 32, 65536 weights at most.",
    ),
    word(
        "values",
        "values i8 + 1/2",
        "Type of the entries, `i8` or `i16`, and their offset, 1/2 or none; of a format also `i24`, `i32` and any offset.",
    ),
    word(
        "unit",
        "unit 1/32",
        "Spacing of the entries for weights of variance 1. A weight is (entry + offset) x unit x scale.",
    ),
    word(
        "table",
        "table t[16] = [ … ]",
        "A table of entries: written out, `from \"file\"`, `trained(…) in \"file\"`, or `: type per matrix`.",
    ),
    word(
        "decode",
        "decode w { … }",
        "From the window to the entries of a step: `let` lines, then the result, a vector.",
    ),
    word(
        "field",
        "field s : f16 per 1 x 32",
        "A number that the weights of a cover share, stored beside the codes of a format.",
    ),
    word(
        "weight",
        "weight e { e * s }",
        "What an entry is worth: an expression of entry, fields, tables of the matrix and constants. It makes a format.",
    ),
    word("scale", "scale row", "What a scale covers, `row` or `matrix`. It is the root mean square, in bfloat16."),
    word(
        "rotate",
        "rotate hadamard(seed = 0)",
        "Rotation along the columns before coding: `none`, or `hadamard(seed = S, block = N)`.",
    ),
    word(
        "order",
        "order p { [p / 128, p % 128] }",
        "Where weight p of a block's stream lies in the block: row and column.",
    ),
    word("input", "input su, hadamard(128)", "Steps that activations go through before they are rounded."),
    word("output", "output hadamard(128), sv", "Steps that results go through."),
    word("code", "code { … }", "One code of a mix that is written out; column blocks take the codes in turn."),
];

/// Keywords of layouts.
const OF_LAYOUTS: &[Word] = &[
    word("type", "type 12", "The number by which a container, such as GGUF, calls this layout."),
    word("tensor", "tensor scales : f16[cols / 32, rows]", "A tensor of numbers and its sizes, outermost first."),
    word(
        "record",
        "record block[rows, cols / 32] { … }",
        "A tensor of records, whose members lie one behind the other.",
    ),
];

/// Keywords of fusion patterns.
const OF_FUSIONS: &[Word] = &[word("launch", "launch q + k + v { … }", "Matrices that one launch multiplies.")];

/// Keywords of launches.
const OF_LAUNCHES: &[Word] = &[
    word("prologue", "prologue rms_norm, rotate", "What is done to the input before the products."),
    word("epilogue", "epilogue add_residual", "What is done to the results."),
];

/// Functions of blocks.
const OF_BLOCKS: &[Word] = &[
    word("byte", "byte(h, i)", "Byte i of a word, 0 the lowest; i is constant."),
    word("sum_bytes", "sum_bytes(h)", "The sum of a word's four bytes."),
    word(
        "signs",
        "signs(bit, …)",
        "A vector that is all ones where a bit is set: `v ^ signs(…)` complements such entries.",
    ),
    word("parity", "parity(h)", "The lowest bit of the number of bits set."),
    word("count", "count(h)", "The number of bits set."),
    word("negate", "negate(v, h)", "The vector v, entry i negated where bit i of the word h is set."),
];

/// Functions of constants.
const OF_CONSTANTS: &[Word] = &[
    word("max", "max(a, b)", "The largest of numbers and lists."),
    word("min", "min(a, b)", "The least of numbers and lists."),
    word("log2", "log2(n)", "The logarithm of a power of two."),
];

/// Types of entries and fields.
const TYPES: &[Word] = &[
    word("i8", "i8", "Integer of 8 bits. As entries: one product of a tensor core."),
    word("i16", "i16", "Integer of 16 bits. As entries: two products, of high and low bytes."),
    word("i24", "i24", "Integer of 24 bits: entries of formats."),
    word("i32", "i32", "Integer of 32 bits: entries of formats."),
    word("u4", "u4", "Integer without sign of 4 bits; u1 to u32 are there, and u(n)."),
    word("u8", "u8", "Integer without sign of 8 bits."),
    word("f16", "f16", "Float of 16 bits, 10 of them mantissa."),
    word("bf16", "bf16", "Float of 16 bits, 7 of them mantissa."),
    word("f32", "f32", "Float of 32 bits."),
    word("e8m0", "e8m0", "A power of two: 8 bits of exponent alone."),
    word("e4m3", "e4m3", "Float of 8 bits: 4 of exponent, 3 of mantissa, no infinity."),
    word("e5m2", "e5m2", "Float of 8 bits: 5 of exponent, 2 of mantissa."),
];

/// What shares a number.
const COVERS: &[Word] = &[
    word("row", "row", "One for each row (out feature)."),
    word("column", "column", "One for each column (in feature)."),
    word("matrix", "matrix", "One for all of the matrix."),
    word("flat", "flat 64", "One for so many weights, counted row by row through the matrix."),
];

/// Words within lines.
const OTHERS: &[Word] = &[
    word("per", "per 1 x 32", "What weights share one: `matrix`, `row`, `column`, `flat N`, or rows x columns."),
    word("for", "bits 8 for 4", "The number of weights that share a code."),
    word("none", "rotate none", "No rotation."),
    word(
        "hadamard",
        "hadamard(seed = 0)",
        "Random signs, then Hadamard transforms: of all columns, or with `block = N` of N columns each.",
    ),
    word("seed", "seed = 0", "Seed of random numbers."),
    word("rounds", "rounds = 8", "Rounds of encoding and averaging."),
    word("samples", "samples = 2 ** 20", "Gaussian samples of each round."),
    word(
        "trained",
        "trained(seed = 1, rounds = 8, samples = 2 ** 20) in \"file\"",
        "A table that `qp train-codebook` makes and keeps in the file.",
    ),
    word("from", "from \"file\"", "A table that is read from a file."),
    word("mix", "mix(a, b)", "Column blocks of a matrix take the named quantizers in turn."),
    word("of", "layout gguf of q4_0", "The quantizer or family whose bits are placed."),
    word("in", "code(r, c) in qs[c] bit 4", "Where it lies; of trained tables, the file."),
    word("bit", "bit 4 * (c % 2)", "The lowest bit, counted from the lowest of the element."),
    word("rows", "rows", "Rows of the matrix."),
    word("cols", "cols", "Columns of the matrix."),
    word("if", "if n > 3 then a else b", "A choice by constants."),
    word("x", "2 x 128", "Between rows and columns."),
];

/// What `word` means where it begins an item, a property or a line of a layout.
pub fn keyword(word: &str, block: Block) -> Option<&'static Word> {
    starts(block).iter().find(|w| w.word == word)
}

/// Keywords that begin something in such braces.
pub fn starts(block: Block) -> &'static [Word] {
    match block {
        Block::File => OF_ITEMS,
        Block::Body => OF_PROPERTIES,
        Block::Layout => OF_LAYOUTS,
        Block::Decode | Block::Weight | Block::Function | Block::Read => &OF_PROPERTIES[..1],
        Block::Fusion => OF_FUSIONS,
        Block::Launch => OF_LAUNCHES,
        Block::Record => &[],
    }
}

/// Functions that expressions of a block call.
pub fn functions(block: Block) -> impl Iterator<Item = &'static Word> {
    let of_blocks = matches!(block, Block::Decode | Block::Function | Block::Read);
    OF_BLOCKS.iter().filter(move |_| of_blocks).chain(OF_CONSTANTS)
}

/// Types of fields and members, or of entries.
pub fn types(of_entries: bool) -> &'static [Word] {
    if of_entries { &TYPES[..4] } else { TYPES }
}

/// Covers; of scales only some.
pub fn covers(of_scales: bool) -> impl Iterator<Item = &'static Word> {
    COVERS.iter().filter(move |w| !of_scales || matches!(w.word, "row" | "matrix"))
}

/// The word, wherever it stands.
pub fn any(word: &str) -> Option<&'static Word> {
    all().find(|w| w.word == word)
}

/// All words.
fn all() -> impl Iterator<Item = &'static Word> {
    [OTHERS, TYPES, COVERS, OF_BLOCKS, OF_CONSTANTS, OF_FUSIONS, OF_LAUNCHES, OF_LAYOUTS, OF_PROPERTIES, OF_ITEMS]
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    use qp_codegen::syntax::parser::{ITEMS, PROPERTIES};

    use super::*;

    #[test]
    fn all_keywords_are_explained() {
        let of = |block: Block| starts(block).iter().map(|w| w.word).collect::<Vec<_>>();
        assert_eq!(of(Block::File), ITEMS);
        assert!(PROPERTIES.iter().all(|p| of(Block::Body).contains(p)));
        assert_eq!(of(Block::Decode), ["let"]);
        assert!(starts(Block::Body).iter().all(|w| w.example.starts_with(w.word)));
    }

    #[test]
    fn the_editors_grammars_know_all_words() {
        let text_mate = include_str!("../../../editors/vscode/syntaxes/qspec.tmLanguage.json");
        let tree_sitter = concat!(
            include_str!("../../../editors/tree-sitter-qspec/grammar.js"),
            include_str!("../../../editors/tree-sitter-qspec/queries/highlights.scm"),
        );
        // Names of arguments are names as any; the types u1 to u32 and i1 to i32 are told by a pattern.
        let listed =
            |w: &&Word| !["seed", "rounds", "samples", "u4", "u8", "i8", "i16", "i24", "i32"].contains(&w.word);
        let is_property = |w: &&Word| starts(Block::Body).iter().any(|p| p.word == w.word);
        for w in all().filter(listed).filter(|w| !is_property(w) || PROPERTIES.contains(&w.word)) {
            let mut words = text_mate.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            assert!(w.word == "use" || words.any(|t| t == w.word), "{}", w.word);
            // Types, and what is rotated how, are names there.
            let name = TYPES.iter().any(|t| t.word == w.word) || ["none", "hadamard"].contains(&w.word);
            assert!(name || tree_sitter.contains(&format!("\"{}\"", w.word)), "{}", w.word);
        }
    }
}
