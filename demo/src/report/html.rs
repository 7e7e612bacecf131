//! The page around the pictures: figures at the top, tables to unfold, a plain summary at the end. One file, no
//! scripts, nothing fetched.

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::charts::{self, css};
use super::{HappeningKind, Phase, Report, Verdict, prose};

/// Makes the text of `report.html`.
pub fn render(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Anabranch demo, seed " (report.seed) }
                style { (PreEscaped(include_str!("style.css"))) }
            }
            body { main {
                (header(report))
                (tiles(report))
                (learning(report))
                (timeline(report))
                (roll_outs(report))
                (engines(report))
                (story(report))
                (complaints(report))
                section.summary {
                    h2 { "In short" }
                    @for sentence in prose::sentences(report) { p { (sentence) } }
                }
            } }
        }
    };
    page.into_string()
}

fn header(report: &Report) -> Markup {
    let (class, verdict) = match report.verdict() {
        Verdict::Kept => ("good", "Every sample came back, exactly once"),
        Verdict::Broken => ("bad", "Samples were lost or came twice"),
    };
    html! {
        header {
            h1 { "Anabranch demo" }
            p.sub {
                "task " (report.task) " · " (report.algorithm) " · seed " (report.seed)
                @if !report.publishing { " · control: engines keep version 0" }
                @else if report.deterministic { " · deterministic" }
            }
            p.verdict.(class) { (verdict) }
        }
    }
}

fn tiles(report: &Report) -> Markup {
    let tiles = [
        (format!("{:.2} → {:.2}", report.exact_before, report.exact_after), "held-out exact match"),
        (thousands(report.trajectories), "samples"),
        (thousands(report.migrations), "moves to another engine"),
        (format!("{} / {}", report.lost, report.duplicated), "lost / duplicated"),
        (report.versions.len().to_string(), "weight versions"),
        (format!("{:.0} s", report.wall_s), "wall time"),
    ];
    html! {
        div.tiles { @for (value, label) in tiles { div.tile { b { (value) } span { (label) } } } }
    }
}

fn learning(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Learning" }
            p.note {
                "Mean reward of each step's samples, and the share that was right as a whole. \
                 Vertical lines: engines that came or went."
            }
            (legend(&[(css(charts::REWARD), "reward"), (css(charts::EXACT), "exact answers, dashed")]))
            figure aria-label="Mean reward and share of exact answers over time" {
                (PreEscaped(charts::reward(report)))
            }
            h2 { "Tokens per second" }
            p.note { "Tokens of a step's samples over the step's whole time, training included." }
            figure aria-label="Tokens per second in each step" {
                (PreEscaped(charts::token_rate(report)))
            }
            (steps(report))
        }
    }
}

fn steps(report: &Report) -> Markup {
    html! {
        details {
            summary { "Each step" }
            table {
                (head(&["step", "ended", "reward", "exact", "tokens/s", "samples", "micro-batches", "lag"]))
                @for p in &report.curve {
                    tr {
                        td { (p.step) } td { (format!("{:.1} s", p.t_s)) }
                        td { (format!("{:.3}", p.reward)) } td { (format!("{:.3}", p.exact)) }
                        td { (thousands(p.tokens_per_s as u64)) } td { (p.samples) }
                        td { (p.microbatches) } td { (p.lag) }
                    }
                }
            }
        }
    }
}

fn timeline(report: &Report) -> Markup {
    let colour = |phase| css(charts::phase_colour(phase, report));
    let stops: Vec<String> = (0..=8).map(|i| css(charts::version_colour(i, 8))).collect();
    let phases = [
        (Phase::Joining, "joining"),
        (Phase::Loading { version: 0 }, "loading weights"),
        (Phase::Released, "memory lent to the trainer"),
        (Phase::Draining, "draining"),
        (Phase::Suspect, "suspect"),
    ];
    html! {
        section {
            h2 { "Engines" }
            p.note { "Each bar is an engine's life; its colour is the weight version that it served." }
            div.legend {
                span.key {
                    "v0" i.ramp style={ "background:linear-gradient(90deg," (stops.join(",")) ")" } {}
                    "v" (charts::last_version(report))
                }
                span.key.joined { "▲ joined" }
                span.key.killed { "✕ killed" }
                span.key.drained { "▼ drained" }
            }
            (legend(&phases.map(|(phase, label)| (colour(phase), label))))
            figure aria-label="Each engine's life, coloured by the weight version that it served" {
                (PreEscaped(charts::timeline(report)))
            }
            (lives(report))
        }
    }
}

fn lives(report: &Report) -> Markup {
    html! {
        details {
            summary { "Each engine's phases" }
            table {
                (head(&["engine", "from", "to", "phase"]))
                @for engine in &report.engines {
                    @for span in &engine.phases {
                        tr {
                            td { (engine.id) }
                            td { (format!("{:.1} s", span.from_s)) }
                            td { (format!("{:.1} s", span.to_s)) }
                            td { (prose::phase(span.phase)) }
                        }
                    }
                }
            }
        }
    }
}

fn roll_outs(report: &Report) -> Markup {
    let keys: Vec<(String, &str)> = report
        .engines
        .iter()
        .map(|e| (css(charts::engine_colour(report, &e.id)), e.id.as_str()))
        .collect();
    html! {
        section {
            h2 { "Roll-outs" }
            p.note {
                "Seconds from the beginning of a version's publication until each engine served it."
            }
            (legend(&keys))
            figure aria-label="Seconds from publication until an engine served the version" {
                (PreEscaped(charts::roll_outs(report)))
            }
            details {
                summary { "Each version" }
                table {
                    (head(&["version", "published", "bytes", "trainer kept", "served after"]))
                    @for row in &report.versions {
                        tr {
                            td { (row.version) }
                            td { (format!("{:.1} s", row.published_at_s)) }
                            td { (thousands(row.bytes)) }
                            td { (format!("{:.1} ms", row.publish_s * 1000.0)) }
                            td {
                                @for (engine, delay) in &row.active_s {
                                    span.key { (engine) " " (format!("{delay:.2} s")) } " "
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn engines(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Who made the tokens" }
            table {
                (head(&["engine", "joined", "left", "why", "tokens received"]))
                @for e in &report.engines {
                    tr {
                        td { (e.id) }
                        td { (format!("{:.1} s", e.joined_s)) }
                        td { (e.left_s.map_or("stayed".to_owned(), |s| format!("{s:.1} s"))) }
                        td { (e.why.as_deref().unwrap_or("")) }
                        td { (thousands(e.tokens)) }
                    }
                }
            }
        }
    }
}

fn story(report: &Report) -> Markup {
    let class = |kind| match kind {
        HappeningKind::Joined => "joined",
        HappeningKind::Killed => "killed",
        HappeningKind::Drained => "drained",
        HappeningKind::Note => "note",
    };
    html! {
        @if !report.story.is_empty() {
            section {
                h2 { "What happened" }
                ol.story {
                    @for h in &report.story {
                        li.(class(h.kind)) { time { (format!("{:.1} s", h.at_s)) } (h.text) }
                    }
                }
            }
        }
    }
}

fn complaints(report: &Report) -> Markup {
    html! {
        @if !report.complaints.is_empty() {
            section {
                h2 { "What should not have happened" }
                ul { @for complaint in &report.complaints { li { (complaint) } } }
            }
        }
    }
}

fn head(titles: &[&str]) -> Markup {
    html! { thead { tr { @for title in titles { th { (title) } } } } }
}

/// Colours in CSS and what they mean.
fn legend(keys: &[(String, &str)]) -> Markup {
    html! {
        div.legend {
            @for (colour, label) in keys {
                span.key { i.swatch style={ "background:" (colour) } {} (label) }
            }
        }
    }
}

/// `value` with a comma between groups of three digits.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let grouped: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|c| std::str::from_utf8(c).ok()).collect();
    grouped.join(",")
}
