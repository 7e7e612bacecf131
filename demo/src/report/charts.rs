//! The report's pictures. All but the last share one time axis, so that they can be read downwards.

use super::svg::{LEFT, RIGHT, Scale, Svg, WIDTH, number, round_up};
use super::{EngineRow, Happening, HappeningKind, Phase, Report};

const CURVE_HEIGHT: f64 = 220.0;
const RATE_HEIGHT: f64 = 130.0;
const LANE: f64 = 34.0;
const BAR: f64 = 18.0;
const ROLL_OUT_HEIGHT: f64 = 170.0;

pub fn reward(report: &Report) -> String {
    let (x, y) = (Scale::horizontal(report.wall_s), Scale::vertical(1.0, CURVE_HEIGHT));
    let mut svg = Svg::new(CURVE_HEIGHT);
    svg.value_axis(&y, "");
    happenings(&mut svg, report, &x, CURVE_HEIGHT);
    let points = |value: fn(&super::CurvePoint) -> f64| -> Vec<(f64, f64)> {
        report.curve.iter().map(|p| (x.at(p.t_s), y.at(value(p)))).collect()
    };
    svg.polyline(&points(|p| p.exact), "curve exact");
    svg.polyline(&points(|p| p.reward), "curve reward");
    for p in &report.curve {
        let tip = format!(
            "step {}: reward {:.3}, exact {:.3}, {} samples in {} micro-batches, lag up to {}",
            p.step, p.reward, p.exact, p.samples, p.microbatches, p.lag
        );
        svg.dot((x.at(p.t_s), y.at(p.reward)), 3.0, "point reward", "", &tip);
    }
    svg.time_axis(&x);
    svg.finish("Mean reward and share of exact answers over time")
}

pub fn token_rate(report: &Report) -> String {
    let top = report.curve.iter().map(|p| p.tokens_per_s).fold(0.0, f64::max);
    let (x, y) = (Scale::horizontal(report.wall_s), Scale::vertical(round_up(top), RATE_HEIGHT));
    let mut svg = Svg::new(RATE_HEIGHT);
    svg.value_axis(&y, "");
    happenings(&mut svg, report, &x, RATE_HEIGHT);
    let mut begin = report.curve.first().map_or(0.0, |p| first_begin(report, p.t_s));
    for p in &report.curve {
        let (left, right, height) = (x.at(begin), x.at(p.t_s), y.at(p.tokens_per_s));
        let tip = format!("step {}: {} tokens/s", p.step, number(p.tokens_per_s));
        let size = ((right - left - 1.0).max(1.0), y.at(0.0) - height);
        svg.rect((left, height), size, "rate", "", &tip);
        begin = p.t_s;
    }
    svg.time_axis(&x);
    svg.finish("Tokens per second in each step")
}

/// The first step has no predecessor to begin at: it is taken to be as long as the second.
fn first_begin(report: &Report, ended_s: f64) -> f64 {
    let length = report.curve.get(1).map_or(ended_s, |second| second.t_s - ended_s);
    (ended_s - length).max(0.0)
}

pub fn timeline(report: &Report) -> String {
    let height = LANE * report.engines.len() as f64 + 44.0;
    let x = Scale::horizontal(report.wall_s);
    let mut svg = Svg::new(height);
    happenings(&mut svg, report, &x, height);
    let last = last_version(report);
    for (lane, engine) in report.engines.iter().enumerate() {
        let y = 14.0 + LANE * lane as f64;
        svg.text((LEFT - 8.0, y + 13.0), "lane end", &engine.id);
        for span in &engine.phases {
            let (from, to) = (x.at(span.from_s), x.at(span.to_s));
            let (class, style, what) = dress(span.phase, last);
            let tip = format!("{}: {what}, {:.1} to {:.1} s", engine.id, span.from_s, span.to_s);
            svg.rect((from, y), (to - from, BAR), class, &style, &tip);
        }
        marks(&mut svg, report, engine, &x, y);
    }
    svg.time_axis(&x);
    svg.finish("Each engine's life, coloured by the weight version that it served")
}

fn dress(phase: Phase, last: u64) -> (&'static str, String, String) {
    match phase {
        Phase::Joining => ("joining", String::new(), "joining".to_owned()),
        Phase::Serving { version } => {
            let style = format!("fill:{}", version_colour(version, last));
            ("serving", style, format!("serving version {version}"))
        }
        Phase::Loading { version } => {
            ("loading", String::new(), format!("loading version {version}"))
        }
        Phase::Released => ("released", String::new(), "its memory lent to the trainer".to_owned()),
        Phase::Suspect => ("suspect", String::new(), "suspect".to_owned()),
        Phase::Draining => ("draining", String::new(), "draining".to_owned()),
    }
}

fn marks(svg: &mut Svg, report: &Report, engine: &EngineRow, x: &Scale, y: f64) {
    let own = |h: &&Happening| h.engine.as_deref() == Some(engine.id.as_str());
    for happening in report.story.iter().filter(own) {
        let at = (x.at(happening.at_s), y + BAR / 2.0);
        let (path, class) = match happening.kind {
            HappeningKind::Joined => ("M-6 6 L0 -6 L6 6 Z", "mark joined"),
            HappeningKind::Killed => ("M-6 -6 L6 6 M6 -6 L-6 6", "mark killed"),
            HappeningKind::Drained => ("M-6 -6 L6 -6 L0 6 Z", "mark drained"),
            HappeningKind::Note => continue,
        };
        svg.glyph(at, path, class, &format!("{:.1} s: {}", happening.at_s, happening.text));
    }
}

/// How long each engine took to serve each version.
pub fn roll_outs(report: &Report) -> String {
    let delays = report.versions.iter().flat_map(|v| v.active_s.values().copied());
    let y = Scale::vertical(round_up(delays.fold(0.0, f64::max)), ROLL_OUT_HEIGHT);
    let mut svg = Svg::new(ROLL_OUT_HEIGHT);
    svg.value_axis(&y, " s");
    let last = last_version(report).max(1);
    let at =
        |version: u64| LEFT + 10.0 + (WIDTH - LEFT - RIGHT - 20.0) * version as f64 / last as f64;
    for row in &report.versions {
        for (engine, delay) in &row.active_s {
            let style = format!("fill:{}", engine_colour(report, engine));
            let tip = format!("version {} on {engine}: {delay:.2} s", row.version);
            svg.dot((at(row.version), y.at(*delay)), 4.0, "roll", &style, &tip);
        }
    }
    let bottom = ROLL_OUT_HEIGHT - 24.0;
    svg.line((LEFT, bottom), (WIDTH - RIGHT, bottom), "axis");
    for tick in (Scale::horizontal(last as f64)).ticks(10).into_iter().filter(|t| t.fract() == 0.0)
    {
        svg.text((at(tick as u64), bottom + 16.0), "tick middle", &format!("v{tick}"));
    }
    svg.finish("Seconds from publication until an engine served the version")
}

/// Faint lines through every chart where an engine came or went.
fn happenings(svg: &mut Svg, report: &Report, x: &Scale, height: f64) {
    for happening in &report.story {
        let class = match happening.kind {
            HappeningKind::Joined => "event joined",
            HappeningKind::Killed => "event killed",
            HappeningKind::Drained => "event drained",
            HappeningKind::Note => continue,
        };
        let at = x.at(happening.at_s);
        svg.line((at, 4.0), (at, height - 24.0), class);
    }
}

pub fn last_version(report: &Report) -> u64 {
    report.versions.iter().map(|v| v.version).max().unwrap_or(0)
}

/// From deep violet over teal to yellow: later versions are lighter.
pub fn version_colour(version: u64, last: u64) -> String {
    let t = version as f64 / last.max(1) as f64;
    let (light, hue) = (0.42 + 0.42 * t, 300.0 - 195.0 * t);
    format!("oklch({light:.3} 0.13 {hue:.0})")
}

pub fn engine_colour(report: &Report, id: &str) -> String {
    let index = report.engines.iter().position(|e| e.id == id).unwrap_or(0);
    format!("oklch(0.64 0.15 {})", (250 + index * 75) % 360)
}
