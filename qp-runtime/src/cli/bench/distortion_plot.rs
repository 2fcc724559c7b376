//! How far codes are from the rate-distortion bound, as a picture.

use crate::svg::{Picture, escape};

/// Codes of one kind: a name and points of bits a weight and bits lost, ½ log₂(D / 2^(-2R)), in order of bits.
pub struct Series {
    /// For the legend.
    pub name: String,
    /// Bits a weight, bits lost.
    pub points: Vec<(f64, f64)>,
    /// Somebody else's: hollow marks, dashed lines.
    pub published: bool,
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 150.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 46.0;

const COLOURS: [&str; 8] = ["#33638d", "#d1495b", "#3a9d5d", "#e0a030", "#7b5ea7", "#20a0a0", "#8c6d46", "#666666"];

/// The picture as SVG text. Series of the same colour stand side by side in `series`: the published ones take the colour
/// of those before them.
pub fn svg(series: &[Series]) -> String {
    let points = || series.iter().flat_map(|s| &s.points);
    let most_bits = points().fold(0.0f64, |m, p| m.max(p.0)).ceil();
    let most_lost = (points().fold(0.0f64, |m, p| m.max(p.1)) * 20.0).ceil() / 20.0;
    let x = |bits: f64| LEFT + (bits - 1.0) / (most_bits - 1.0).max(1.0) * (WIDTH - LEFT - RIGHT);
    let y = |lost: f64| HEIGHT - BOTTOM - lost / most_lost.max(0.05) * (HEIGHT - TOP - BOTTOM);
    let title = "Bits lost against the rate-distortion bound, Gaussian source";
    let mut picture = Picture::new(WIDTH, HEIGHT, LEFT, title);
    let mut put = |element: String| picture.put(element);
    for i in 0..=(most_lost / 0.05).round() as u32 {
        let lost = f64::from(i) * 0.05;
        let at = y(lost);
        put(format!("<path d=\"M{LEFT} {at:.1}H{:.1}\" stroke=\"#ddd\"/>", WIDTH - RIGHT));
        put(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{lost:.2}</text>", LEFT - 6.0, at + 4.0));
    }
    for bits in 1..=most_bits as u32 {
        let at = x(f64::from(bits));
        put(format!("<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{bits}</text>", HEIGHT - BOTTOM + 16.0));
    }
    put(format!(
        "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">bits a weight</text>",
        (LEFT + WIDTH - RIGHT) / 2.0,
        HEIGHT - 8.0
    ));
    let mut colour = 0;
    for (i, s) in series.iter().enumerate() {
        if i > 0 && !s.published {
            colour += 1;
        }
        let ink = COLOURS[colour % COLOURS.len()];
        let (fill, dash) = if s.published { ("white", " stroke-dasharray=\"4 3\"") } else { (ink, "") };
        let path: Vec<String> = s.points.iter().map(|p| format!("{:.1} {:.1}", x(p.0), y(p.1))).collect();
        put(format!("<path d=\"M{}\" fill=\"none\" stroke=\"{ink}\"{dash}/>", path.join("L")));
        for p in &s.points {
            put(format!(
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" stroke=\"{ink}\" fill=\"{fill}\"><title>{}: {} bits, {:.3} lost</title></circle>",
                x(p.0),
                y(p.1),
                escape(&s.name),
                p.0,
                p.1
            ));
        }
        let (lx, ly) = (WIDTH - RIGHT + 18.0, TOP + 8.0 + 18.0 * i as f64);
        put(format!("<circle cx=\"{lx}\" cy=\"{ly}\" r=\"3.5\" stroke=\"{ink}\" fill=\"{fill}\"/>"));
        put(format!("<text x=\"{}\" y=\"{}\">{}</text>", lx + 10.0, ly + 4.0, escape(&s.name)));
    }
    picture.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_inside_the_picture() {
        let series = [
            Series { name: "ours".into(), points: vec![(1.5, 0.02), (5.0, 0.11)], published: false },
            Series { name: "theirs".into(), points: vec![(2.0, 0.31)], published: true },
        ];
        let text = svg(&series);
        let number = |part: &str| part.split('"').next().and_then(|n| n.parse::<f64>().ok()).expect("a number");
        for part in text.split("cx=\"").skip(1) {
            assert!((LEFT..WIDTH).contains(&number(part)));
        }
        for part in text.split("cy=\"").skip(1) {
            assert!((TOP..HEIGHT - BOTTOM).contains(&number(part)));
        }
        assert_eq!(text.matches("<title>").count(), 3);
        // One colour, since the second series is the first one's comparison.
        assert!(!text.contains(COLOURS[1]));
    }
}
