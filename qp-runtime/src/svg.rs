//! Pictures as SVG text: the frame, and the colours of a scale.

/// A picture being drawn, a line of text an element.
pub struct Picture(String);

/// Colours of the scale, from low to high: dark blue over green to yellow.
const SCALE: [(f64, f64, f64); 5] =
    [(68.0, 1.0, 84.0), (59.0, 82.0, 139.0), (33.0, 145.0, 140.0), (94.0, 201.0, 98.0), (253.0, 231.0, 37.0)];

impl Picture {
    /// A white picture of so many pixels, with a title that begins at `left`.
    pub fn new(width: f64, height: f64, left: f64, title: &str) -> Picture {
        let mut picture = Picture(String::new());
        picture.put(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"11\">"
        ));
        picture.put(format!("<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>"));
        picture.put(format!("<text x=\"{left}\" y=\"20\" font-size=\"14\">{}</text>", escape(title)));
        picture
    }

    /// Adds an element.
    pub fn put(&mut self, element: impl AsRef<str>) {
        self.0.push_str(element.as_ref());
        self.0.push('\n');
    }

    /// The text.
    pub fn finish(mut self) -> String {
        self.put("</svg>");
        self.0
    }
}

/// Text as it may stand between tags.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The colour of the scale at `t`, 0 to 1.
pub fn colour(t: f64) -> String {
    let at = t.clamp(0.0, 1.0) * (SCALE.len() - 1) as f64;
    let i = (at as usize).min(SCALE.len() - 2);
    let mix = |a: f64, b: f64| (a + (b - a) * (at - i as f64)).round() as u8;
    let (a, b) = (SCALE[i], SCALE[i + 1]);
    format!("#{:02x}{:02x}{:02x}", mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}
