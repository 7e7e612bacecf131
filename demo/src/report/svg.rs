//! A few strokes of SVG: a frame with a time axis, lines, boxes, marks. Owns coordinates, not data.

use std::fmt::Write;

pub const WIDTH: f64 = 960.0;
pub const LEFT: f64 = 84.0;
pub const RIGHT: f64 = 20.0;
const BOTTOM: f64 = 24.0;
const TOP: f64 = 10.0;

/// Maps values to pixels.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    pub max: f64,
    from_px: f64,
    to_px: f64,
}

impl Scale {
    pub fn horizontal(max: f64) -> Self {
        Self { max: max.max(1e-9), from_px: LEFT, to_px: WIDTH - RIGHT }
    }

    /// Zero stands at the bottom of a chart that is `height` high.
    pub fn vertical(max: f64, height: f64) -> Self {
        Self { max: max.max(1e-9), from_px: height - BOTTOM, to_px: TOP }
    }

    pub fn at(&self, value: f64) -> f64 {
        self.from_px + (self.to_px - self.from_px) * (value / self.max).clamp(0.0, 1.0)
    }

    /// About `wanted` round values from 0 to the maximum.
    pub fn ticks(&self, wanted: usize) -> Vec<f64> {
        let raw = self.max / wanted as f64;
        let power = 10f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|m| m * power)
            .find(|step| *step >= raw * 0.999)
            .unwrap_or(raw);
        (0..).map(|i| f64::from(i) * step).take_while(|v| *v <= self.max * 1.001).collect()
    }
}

/// The smallest round number that is not below `value`.
pub fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.max(1e-9).log10().floor());
    [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0]
        .into_iter()
        .map(|m| m * power)
        .find(|round| *round >= value)
        .unwrap_or(value)
}

/// One picture under construction.
pub struct Svg {
    height: f64,
    body: String,
}

impl Svg {
    pub fn new(height: f64) -> Self {
        Self { height, body: String::new() }
    }

    pub fn finish(self, label: &str) -> String {
        format!(
            r#"<svg viewBox="0 0 {WIDTH} {}" role="img" aria-label="{}">{}</svg>"#,
            self.height,
            escape(label),
            self.body
        )
    }

    /// Seconds along the bottom.
    pub fn time_axis(&mut self, x: &Scale) {
        let y = self.height - BOTTOM;
        for tick in x.ticks(10) {
            let (at, label) = (x.at(tick), number(tick));
            self.line((at, y), (at, y + 4.0), "axis");
            self.text((at, y + 16.0), "tick middle", &format!("{label} s"));
        }
        self.line((LEFT, y), (WIDTH - RIGHT, y), "axis");
    }

    /// Grid lines and their values at the left.
    pub fn value_axis(&mut self, y: &Scale, unit: &str) {
        for tick in y.ticks(4) {
            let at = y.at(tick);
            self.line((LEFT, at), (WIDTH - RIGHT, at), "grid");
            self.text((LEFT - 8.0, at + 4.0), "tick end", &format!("{}{unit}", number(tick)));
        }
    }

    pub fn line(&mut self, from: (f64, f64), to: (f64, f64), class: &str) {
        let _ = write!(
            self.body,
            r#"<line x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}" class="{class}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    pub fn polyline(&mut self, points: &[(f64, f64)], class: &str) {
        let path: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = write!(self.body, r#"<polyline points="{}" class="{class}"/>"#, path.join(" "));
    }

    /// `style` is inline CSS, `tip` what the pointer shows.
    pub fn rect(&mut self, at: (f64, f64), size: (f64, f64), class: &str, style: &str, tip: &str) {
        let _ = write!(
            self.body,
            r#"<rect x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}" class="{class}" style="{style}"><title>{}</title></rect>"#,
            at.0,
            at.1,
            size.0.max(0.6),
            size.1,
            escape(tip)
        );
    }

    pub fn dot(&mut self, at: (f64, f64), radius: f64, class: &str, style: &str, tip: &str) {
        let _ = write!(
            self.body,
            r#"<circle cx="{:.1}" cy="{:.1}" r="{radius}" class="{class}" style="{style}"><title>{}</title></circle>"#,
            at.0,
            at.1,
            escape(tip)
        );
    }

    pub fn text(&mut self, at: (f64, f64), class: &str, text: &str) {
        let _ = write!(
            self.body,
            r#"<text x="{:.1}" y="{:.1}" class="{class}">{}</text>"#,
            at.0,
            at.1,
            escape(text)
        );
    }

    /// A path relative to `at`.
    pub fn glyph(&mut self, at: (f64, f64), path: &str, class: &str, tip: &str) {
        let _ = write!(
            self.body,
            r#"<path transform="translate({:.1} {:.1})" d="{path}" class="{class}"><title>{}</title></path>"#,
            at.0,
            at.1,
            escape(tip)
        );
    }
}

pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// Short for axes: no more digits than the value needs.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        v if v >= 1000.0 && v % 1000.0 == 0.0 => format!("{:.0}k", value / 1000.0),
        v if v >= 1000.0 => format!("{:.1}k", value / 1000.0),
        v if v == v.round() => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}").trim_end_matches('0').trim_end_matches('.').to_owned(),
    }
}
