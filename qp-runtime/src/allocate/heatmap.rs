//! A plan as a picture: one column a block, one row a matrix, colour by bits; layers of one launch are joined.

use std::fmt::Write;

use qp_codegen::spec::Matrix;

use super::problem::{Allocation, Problem, Role};
use crate::svg::{self, Picture, escape};

const CELL_WIDTH: f64 = 34.0;
const CELL_HEIGHT: f64 = 26.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 54.0;

/// The picture as SVG text.
pub fn svg(problem: &Problem, allocation: &Allocation, title: &str) -> String {
    let chosen = allocation.candidates();
    let bits: Vec<f64> = chosen.iter().map(|&c| problem.candidates[c].bits).collect();
    let all = || problem.candidates.iter().map(|c| c.bits);
    let range = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
    let blocks = problem.layers.iter().filter_map(|l| match l.role {
        Role::Block { block, matrix: _ } => Some(block + 1),
        Role::Alone => None,
    });
    let blocks = blocks.max().unwrap_or(0);
    let alone: Vec<usize> = (0..problem.layers.len()).filter(|&i| problem.layers[i].role == Role::Alone).collect();
    // A layer's place: column and row. Those that are alone stand below the blocks.
    let place = |i: usize| match problem.layers[i].role {
        Role::Block { block, matrix } => (block as usize, matrix as usize),
        Role::Alone => (0, Matrix::ALL.len() + alone.iter().position(|&a| a == i).unwrap_or(0)),
    };
    let rows = Matrix::ALL.len() + alone.len();
    let (width, height) =
        ((LEFT + CELL_WIDTH * f64::from(blocks.max(8)) + 24.0).max(460.0), TOP + CELL_HEIGHT * rows as f64 + 70.0);
    let mut picture = Picture::new(width, height, LEFT, title);
    for b in 0..blocks {
        let x = LEFT + CELL_WIDTH * (f64::from(b) + 0.5);
        picture.put(format!("<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\" fill=\"#555\">{b}</text>", TOP - 8.0));
    }
    let names = Matrix::ALL.iter().map(|m| m.name()).chain(alone.iter().map(|&i| problem.layers[i].name.as_str()));
    for (r, name) in names.enumerate() {
        let y = TOP + CELL_HEIGHT * (r as f64 + 0.5) + 4.0;
        picture.put(format!("<text x=\"{}\" y=\"{y}\" text-anchor=\"end\">{}</text>", LEFT - 8.0, escape(name)));
    }
    for (i, layer) in problem.layers.iter().enumerate() {
        let (c, r) = place(i);
        let (x, y) = (LEFT + CELL_WIDTH * c as f64, TOP + CELL_HEIGHT * r as f64);
        let (fill, ink) = colour(bits[i], range);
        picture.put(format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{fill}\"><title>{}: {}</title></rect>",
            x + 1.0,
            y + 1.0,
            CELL_WIDTH - 2.0,
            CELL_HEIGHT - 2.0,
            escape(&layer.name),
            escape(&problem.candidates[chosen[i]].name),
        ));
        picture.put(format!(
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"10\" fill=\"{ink}\">{}</text>",
            x + CELL_WIDTH / 2.0,
            y + CELL_HEIGHT / 2.0 + 3.5,
            (bits[i] * 100.0).round() / 100.0
        ));
    }
    for launch in allocation.launches.iter().filter(|l| l.layers.len() > 1) {
        picture.put(join(launch.layers.iter().map(|&i| place(i))));
    }
    legend(&mut picture, range, TOP + CELL_HEIGHT * rows as f64 + 26.0);
    picture.finish()
}

/// A line down the left edges of the cells of one launch, with a dot at each.
fn join(cells: impl Iterator<Item = (usize, usize)>) -> String {
    let middles: Vec<(f64, f64)> =
        cells.map(|(c, r)| (LEFT + CELL_WIDTH * c as f64 + 5.0, TOP + CELL_HEIGHT * (r as f64 + 0.5))).collect();
    let mut out = String::from("<g stroke=\"white\" stroke-width=\"2\" fill=\"white\">");
    for pair in middles.windows(2) {
        let ((x, y), (x2, y2)) = (pair[0], pair[1]);
        let _ = write!(out, "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    }
    for (x, y) in middles {
        let _ = write!(out, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" stroke=\"none\"/>");
    }
    out.push_str("</g>");
    out
}

fn legend(picture: &mut Picture, range: (f64, f64), y: f64) {
    let steps = 40;
    for i in 0..steps {
        let b = range.0 + (range.1 - range.0) * f64::from(i) / f64::from(steps - 1);
        let x = LEFT + 4.0 * f64::from(i);
        picture.put(format!("<rect x=\"{x}\" y=\"{y}\" width=\"4.2\" height=\"10\" fill=\"{}\"/>", colour(b, range).0));
    }
    picture.put(format!("<text x=\"{LEFT}\" y=\"{}\">{} bits</text>", y + 24.0, range.0));
    picture.put(format!("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{} bits</text>", LEFT + 160.0, y + 24.0, range.1));
    picture.put(format!(
        "<text x=\"{}\" y=\"{}\" fill=\"#555\">dots joined by a line: one launch</text>",
        LEFT + 180.0,
        y + 9.0
    ));
}

/// Fill, and a colour of text that can be read on it.
fn colour(bits: f64, range: (f64, f64)) -> (String, &'static str) {
    let t = if range.1 > range.0 { (bits - range.0) / (range.1 - range.0) } else { 0.5 };
    (svg::colour(t), if t > 0.6 { "black" } else { "white" })
}
