//! The report's pictures, as SVG. All but the last share one time axis, so that they can be read downwards.
//!
//! Owns scales, marks and colours. The words around the pictures are the page's.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{SegmentValue, ValueFormatter};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::{Happening, HappeningKind, Phase, Report};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), DrawingAreaErrorKind<std::io::Error>>;
type Chart<'a, 'b, Y> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, Y>>;

const WIDTH: u32 = 1000;
const CURVE_HEIGHT: u32 = 230;
const RATE_HEIGHT: u32 = 140;
const LANE: u32 = 34;
const ROLL_OUT_HEIGHT: u32 = 180;
const X_LABELS: u32 = 26;
const Y_LABELS: u32 = 84;

// Middle tones: they are read on a light and on a dark page.
/// Colour of the mean reward.
pub const REWARD: RGBColor = RGBColor(0x1f, 0x9a, 0x92);
/// Colour of the share of exact answers.
pub const EXACT: RGBColor = RGBColor(0xd6, 0x7b, 0x2e);
const RATE: RGBColor = RGBColor(0x6f, 0xa5, 0xa1);
const TEXT: RGBColor = RGBColor(0x7d, 0x87, 0x90);
const GOOD: RGBColor = RGBColor(0x2e, 0x9e, 0x66);
const BAD: RGBColor = RGBColor(0xd0, 0x4f, 0x44);
const WARN: RGBColor = RGBColor(0xc4, 0x8a, 0x2a);

/// Draws the mean reward and the share of exact answers of each step.
pub fn reward(report: &Report) -> String {
    svg(CURVE_HEIGHT, |area| {
        let mut chart = over_time(area, report, 0.0..1.0)?;
        let exact = report.curve.iter().map(|p| (p.t_s, p.exact));
        chart.draw_series(DashedLineSeries::new(exact, 5, 4, EXACT.stroke_width(2)))?;
        let reward = || report.curve.iter().map(|p| (p.t_s, p.reward));
        chart.draw_series(LineSeries::new(reward(), REWARD.stroke_width(2)))?;
        chart.draw_series(reward().map(|at| Circle::new(at, 3, REWARD.filled())))?;
        Ok(())
    })
}

/// Draws the tokens per second of each step, as bars from the begin to the end of the step.
pub fn token_rate(report: &Report) -> String {
    let top = report.curve.iter().map(|p| p.tokens_per_s).fold(1.0, f64::max);
    svg(RATE_HEIGHT, |area| {
        let mut chart = over_time(area, report, 0.0..top * 1.05)?;
        let begins = first_begin(report).into_iter().chain(report.curve.iter().map(|p| p.t_s));
        chart.draw_series(begins.zip(&report.curve).map(|(begin, p)| {
            let mut bar = Rectangle::new([(begin, 0.0), (p.t_s, p.tokens_per_s)], RATE.filled());
            bar.set_margin(0, 0, 0, 1);
            bar
        }))?;
        Ok(())
    })
}

/// Time at which the first step began. No earlier step ends there, so the first is taken to be as long as the second.
fn first_begin(report: &Report) -> Option<f64> {
    let first = report.curve.first()?.t_s;
    let length = report.curve.get(1).map_or(first, |second| second.t_s - first);
    Some((first - length).max(0.0))
}

/// Draws each engine's life as a lane, coloured by the weight version that it served.
pub fn timeline(report: &Report) -> String {
    let lanes = report.engines.len().max(1);
    // The first engine stands on top. Plotters counts the range's end as a lane too: it stays empty.
    let lane = |index: usize| lanes - 1 - index;
    let name = |at: &SegmentValue<usize>| match at {
        SegmentValue::CenterOf(at) if *at < report.engines.len() => {
            report.engines[lane(*at)].id.clone()
        }
        _ => String::new(),
    };
    svg(LANE * lanes as u32 + X_LABELS + 10, |area| {
        let mut chart =
            frame(area).build_cartesian_2d(time(report), (0..lanes).into_segmented())?;
        mesh(&mut chart, &seconds, lanes, &name)?;
        let (top, bottom) = (SegmentValue::Last, SegmentValue::Exact(0));
        happenings(&mut chart, report, bottom..top)?;
        for (index, engine) in report.engines.iter().enumerate() {
            let at = lane(index);
            chart.draw_series(engine.phases.iter().map(|span| {
                let corners = [
                    (span.from_s, SegmentValue::Exact(at)),
                    (span.to_s, SegmentValue::Exact(at + 1)),
                ];
                let mut bar = Rectangle::new(corners, phase_colour(span.phase, report).filled());
                bar.set_margin(8, 8, 0, 0);
                bar
            }))?;
            let own = |h: &&Happening| h.engine.as_deref() == Some(engine.id.as_str());
            for happening in report.story.iter().filter(own) {
                mark(&mut chart, happening, SegmentValue::CenterOf(at))?;
            }
        }
        Ok(())
    })
}

fn mark<Y>(chart: &mut Chart<'_, '_, Y>, happening: &Happening, y: Y::ValueType) -> Drawn
where
    Y: Ranged,
    Y::ValueType: Clone + 'static,
{
    let at = [(happening.at_s, y)];
    match happening.kind {
        HappeningKind::Joined => {
            chart.draw_series(at.map(|at| TriangleMarker::new(at, 8, GOOD.filled())))?;
        }
        HappeningKind::Drained => {
            chart.draw_series(at.map(|at| TriangleMarker::new(at, -8, WARN.filled())))?;
        }
        HappeningKind::Killed => {
            chart.draw_series(at.map(|at| Cross::new(at, 6, BAD.stroke_width(3))))?;
        }
        HappeningKind::Note => {}
    }
    Ok(())
}

/// Draws the seconds that each engine took to serve each version.
pub fn roll_outs(report: &Report) -> String {
    let delays = report.versions.iter().flat_map(|v| v.active_s.values().copied());
    let (top, last) = (delays.fold(0.1, f64::max) * 1.1, last_version(report).max(1));
    svg(ROLL_OUT_HEIGHT, |area| {
        let mut chart = frame(area).build_cartesian_2d(0.0..last as f64 + 0.5, 0.0..top)?;
        let version = |v: &f64| if v.fract() == 0.0 { format!("v{v}") } else { String::new() };
        mesh(&mut chart, &version, 5, &|seconds| format!("{seconds:.1} s"))?;
        for row in &report.versions {
            chart.draw_series(row.active_s.iter().map(|(engine, delay)| {
                let colour = engine_colour(report, engine);
                Circle::new((row.version as f64, *delay), 4, colour.filled())
            }))?;
        }
        Ok(())
    })
}

/// Largest version that was published; 0 where none was.
pub fn last_version(report: &Report) -> u64 {
    report.versions.iter().map(|v| v.version).max().unwrap_or(0)
}

/// Colour of `version`, from deep violet over teal to yellow: later versions are lighter.
pub fn version_colour(version: u64, last: u64) -> RGBColor {
    let t = version as f64 / last.max(1) as f64;
    rgb(HSLColor((275.0 - 220.0 * t) / 360.0, 0.55, 0.42 + 0.16 * t))
}

/// Colour of the engine `id` in the chart of roll-outs.
pub fn engine_colour(report: &Report, id: &str) -> RGBColor {
    let index = report.engines.iter().position(|e| e.id == id).unwrap_or(0);
    rgb(HSLColor(((210 + index * 75) % 360) as f64 / 360.0, 0.6, 0.5))
}

/// Colour of a bar in the timeline.
pub fn phase_colour(phase: Phase, report: &Report) -> RGBColor {
    match phase {
        Phase::Joining => RGBColor(0xc9, 0xc6, 0xbf),
        Phase::Serving { version } => version_colour(version, last_version(report)),
        Phase::Loading { .. } => TEXT,
        Phase::Released => RGBColor(0xe0, 0xde, 0xd8),
        Phase::Suspect => BAD,
        Phase::Draining => WARN,
    }
}

/// `colour` as CSS writes it.
pub fn css(colour: RGBColor) -> String {
    let RGBColor(r, g, b) = colour;
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn rgb(colour: HSLColor) -> RGBColor {
    let (r, g, b) = colour.rgb();
    RGBColor(r, g, b)
}

/// One picture, for use inside HTML, where SVG needs no namespace.
fn svg(height: u32, draw: impl FnOnce(&Area<'_>) -> Drawn) -> String {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, (WIDTH, height)).into_drawing_area();
    draw(&area).and_then(|()| area.present()).expect("drawing into a string does no I/O");
    drop(area);
    text.replacen(r#" xmlns="http://www.w3.org/2000/svg""#, "", 1)
}

fn frame<'a, 'b>(area: &'a Area<'b>) -> ChartBuilder<'a, 'b, SVGBackend<'b>> {
    let mut chart = ChartBuilder::on(area);
    chart.margin(5).margin_right(20).x_label_area_size(X_LABELS).y_label_area_size(Y_LABELS);
    chart
}

fn time(report: &Report) -> Range<f64> {
    0.0..report.wall_s.max(1.0)
}

fn over_time<'a, 'b>(
    area: &'a Area<'b>,
    report: &Report,
    values: Range<f64>,
) -> Result<Chart<'a, 'b, RangedCoordf64>, DrawingAreaErrorKind<std::io::Error>> {
    let mut chart = frame(area).build_cartesian_2d(time(report), values.clone())?;
    mesh(&mut chart, &seconds, 5, &|value| short(*value))?;
    happenings(&mut chart, report, values)?;
    Ok(chart)
}

fn seconds(at: &f64) -> String {
    format!("{at:.0} s")
}

/// Axes and horizontal lines. `y_labels` is about the number of labels at the left, `y_label` their wording.
fn mesh<Y>(
    chart: &mut Chart<'_, '_, Y>,
    x_label: &dyn Fn(&f64) -> String,
    y_labels: usize,
    y_label: &dyn Fn(&Y::ValueType) -> String,
) -> Drawn
where
    Y: Ranged + ValueFormatter<Y::ValueType>,
{
    chart
        .configure_mesh()
        .disable_x_mesh()
        .axis_style(TEXT.mix(0.6))
        .bold_line_style(TEXT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .label_style(label())
        .x_labels(10)
        .x_label_formatter(&x_label)
        .y_labels(y_labels)
        .y_label_formatter(&y_label)
        .draw()
}

fn label() -> TextStyle<'static> {
    ("sans-serif", 14).with_color(TEXT).into_text_style(&(WIDTH, LANE))
}

/// Faint lines from the bottom to the top of a chart where an engine came or went.
fn happenings<Y>(chart: &mut Chart<'_, '_, Y>, report: &Report, y: Range<Y::ValueType>) -> Drawn
where
    Y: Ranged,
    Y::ValueType: Clone + 'static,
{
    for happening in &report.story {
        let colour = match happening.kind {
            HappeningKind::Joined => GOOD,
            HappeningKind::Killed => BAD,
            HappeningKind::Drained => WARN,
            HappeningKind::Note => continue,
        };
        let ends = [(happening.at_s, y.start.clone()), (happening.at_s, y.end.clone())];
        chart.draw_series([PathElement::new(ends, colour.mix(0.5))])?;
    }
    Ok(())
}

/// A number with no more digits than an axis needs.
fn short(value: f64) -> String {
    match value {
        v if v >= 1000.0 => format!("{}k", v / 1000.0),
        v if v.fract() == 0.0 => format!("{v:.0}"),
        v => format!("{v:.1}"),
    }
}
