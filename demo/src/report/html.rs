//! The page around the pictures: figures at the top, a plain summary at the end. One file, no
//! scripts, nothing fetched.

use super::charts;
use super::svg::escape;
use super::{EngineRow, HappeningKind, Report, Verdict};

pub fn render(report: &Report) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>Anabranch demo, seed {seed}</title><style>{style}</style></head><body><main>\
         {header}{tiles}{reward}{rate}{timeline}{rolls}{engines}{story}{complaints}{summary}\
         </main></body></html>\n",
        seed = report.seed,
        style = include_str!("style.css"),
        header = header(report),
        tiles = tiles(report),
        reward = section(
            "Learning",
            "Mean reward of each step's samples, and the share that was right as a whole. Vertical \
             lines: engines that came or went.",
            &(legend(&[("line-reward", "reward"), ("line-exact", "exact answers")])
                + &charts::reward(report)),
        ),
        rate = section(
            "Tokens per second",
            "Tokens of a step's samples over the step's whole time, training included.",
            &charts::token_rate(report),
        ),
        timeline = timeline(report),
        rolls = roll_outs(report),
        engines = engine_table(report),
        story = story(report),
        complaints = complaints(report),
        summary = summary(report),
    )
}

fn header(report: &Report) -> String {
    let (class, verdict) = match report.verdict() {
        Verdict::Kept => ("good", "Every sample came back, exactly once"),
        Verdict::Broken => ("bad", "Samples were lost or came twice"),
    };
    let mode = match (report.publishing, report.deterministic) {
        (false, _) => " · control: engines keep version 0",
        (true, true) => " · deterministic",
        (true, false) => "",
    };
    format!(
        "<header><h1>Anabranch demo</h1><p class=\"sub\">task {} · {} · seed {}{mode}</p>\
         <p class=\"verdict {class}\">{verdict}</p></header>",
        escape(&report.task),
        escape(&report.algorithm),
        report.seed,
    )
}

fn tiles(report: &Report) -> String {
    let tile = |value: String, label: &str| {
        format!("<div class=\"tile\"><b>{value}</b><span>{label}</span></div>")
    };
    let exact = format!("{:.2} → {:.2}", report.exact_before, report.exact_after);
    format!(
        "<div class=\"tiles\">{}{}{}{}{}{}</div>",
        tile(exact, "held-out exact match"),
        tile(thousands(report.trajectories), "samples"),
        tile(thousands(report.migrations), "moves to another engine"),
        tile(format!("{} / {}", report.lost, report.duplicated), "lost / duplicated"),
        tile(report.versions.len().to_string(), "weight versions"),
        tile(format!("{:.0} s", report.wall_s), "wall time"),
    )
}

fn timeline(report: &Report) -> String {
    let last = charts::last_version(report);
    let stops: Vec<String> = (0..=8).map(|i| charts::version_colour(i, 8)).collect();
    let ramp = format!(
        "<span class=\"key\">v0<i class=\"ramp\" style=\"background:linear-gradient(90deg,{})\"></i>v{last}</span>",
        stops.join(",")
    );
    let keys = legend(&[
        ("joining", "joining"),
        ("loading", "loading weights"),
        ("released", "memory lent to the trainer"),
        ("draining", "draining"),
        ("suspect", "suspect"),
    ]);
    let marks = "<div class=\"legend\"><span class=\"key joined\">▲ joined</span>\
                 <span class=\"key killed\">✕ killed</span>\
                 <span class=\"key drained\">▼ drained</span></div>";
    section(
        "Engines",
        "Each bar is an engine's life; its colour is the weight version that it served.",
        &format!("<div class=\"legend\">{ramp}</div>{keys}{marks}{}", charts::timeline(report)),
    )
}

fn roll_outs(report: &Report) -> String {
    let key = |engine: &EngineRow| {
        let colour = charts::engine_colour(report, &engine.id);
        let id = escape(&engine.id);
        format!(
            "<span class=\"key\"><i class=\"dot\" style=\"background:{colour}\"></i>{id}</span>"
        )
    };
    let keys: String = report.engines.iter().map(key).collect();
    section(
        "Roll-outs",
        "Seconds from the beginning of a version's publication until each engine served it.",
        &format!("<div class=\"legend\">{keys}</div>{}", charts::roll_outs(report)),
    )
}

fn engine_table(report: &Report) -> String {
    let row = |e: &EngineRow| {
        let left = e.left_s.map_or("stayed".to_owned(), |s| format!("{s:.1} s"));
        format!(
            "<tr><td>{}</td><td>{:.1} s</td><td>{left}</td><td>{}</td><td class=\"num\">{}</td></tr>",
            escape(&e.id),
            e.joined_s,
            escape(e.why.as_deref().unwrap_or("")),
            thousands(e.tokens),
        )
    };
    let rows: String = report.engines.iter().map(row).collect();
    format!(
        "<section><h2>Who made the tokens</h2><table><thead><tr><th>engine</th><th>joined</th>\
         <th>left</th><th>why</th><th class=\"num\">tokens received</th></tr></thead>\
         <tbody>{rows}</tbody></table></section>"
    )
}

fn story(report: &Report) -> String {
    if report.story.is_empty() {
        return String::new();
    }
    let line = |h: &super::Happening| {
        let class = match h.kind {
            HappeningKind::Joined => "joined",
            HappeningKind::Killed => "killed",
            HappeningKind::Drained => "drained",
            HappeningKind::Note => "note",
        };
        format!("<li class=\"{class}\"><time>{:.1} s</time>{}</li>", h.at_s, escape(&h.text))
    };
    let lines: String = report.story.iter().map(line).collect();
    format!("<section><h2>What happened</h2><ol class=\"story\">{lines}</ol></section>")
}

fn complaints(report: &Report) -> String {
    if report.complaints.is_empty() {
        return String::new();
    }
    let lines: String =
        report.complaints.iter().map(|c| format!("<li>{}</li>", escape(c))).collect();
    format!("<section><h2>What should not have happened</h2><ul>{lines}</ul></section>")
}

/// What the run showed, for someone who reads nothing else.
fn summary(report: &Report) -> String {
    let sentences = [
        learning(report),
        samples(report),
        weights(report),
        format!(
            "The supervised warm-up took {:.1} s, {:.0}% of the {:.0} s; it showed the form of an \
             answer with the wrong content.",
            report.warmup_s,
            100.0 * report.warmup_s / report.wall_s.max(1e-9),
            report.wall_s
        ),
    ];
    let paragraphs: String = sentences.iter().map(|s| format!("<p>{}</p>", escape(s))).collect();
    format!("<section class=\"summary\"><h2>In short</h2>{paragraphs}</section>")
}

fn learning(report: &Report) -> String {
    let gain = report.exact_after - report.exact_before;
    let change = match gain {
        g if g >= 0.005 => "rose",
        g if g <= -0.005 => "fell",
        _ => "did not move",
    };
    let mut text = format!(
        "Over {} optimizer steps, greedy exact match on problems that were never trained on {change}: \
         {:.3} before, {:.3} after.",
        report.steps, report.exact_before, report.exact_after
    );
    if !report.publishing {
        text += " This was the control: the engines were never given the new weights.";
    }
    text
}

fn samples(report: &Report) -> String {
    let fate = match report.verdict() {
        Verdict::Kept => "None was lost and none came twice.".to_owned(),
        Verdict::Broken => {
            format!("{} were lost and {} came twice.", report.lost, report.duplicated)
        }
    };
    let gone = report.engines.iter().filter(|e| e.left_s.is_some()).count();
    format!(
        "{} engines made {} samples ({} tokens); {gone} of them left before the end. {} times a sample \
         went on on another engine, after its last token; {} samples hold tokens of several engines, \
         {} of several weight versions. {fate} {} tokens were made by an engine and never received.",
        report.engines.len(),
        thousands(report.trajectories),
        thousands(report.tokens),
        thousands(report.migrations),
        thousands(report.across_engines),
        thousands(report.across_versions),
        thousands(report.discarded_tokens),
    )
}

fn weights(report: &Report) -> String {
    let mut delays: Vec<f64> =
        report.versions.iter().flat_map(|v| v.active_s.values().copied()).collect();
    delays.sort_by(f64::total_cmp);
    let (Some(slowest), Some(largest)) =
        (delays.last(), report.versions.iter().map(|v| v.bytes).max())
    else {
        return "No new weights were published.".to_owned();
    };
    let kept = report.versions.iter().map(|v| v.publish_s).fold(0.0, f64::max);
    format!(
        "{} versions of up to {} kB were published. An engine served a new one after {:.2} s at the \
         median and {slowest:.2} s at the slowest; the trainer itself was kept for at most {:.0} ms.",
        report.versions.len(),
        thousands(largest.div_ceil(1000)),
        delays[delays.len() / 2],
        kept * 1000.0,
    )
}

fn section(title: &str, note: &str, body: &str) -> String {
    format!("<section><h2>{title}</h2><p class=\"note\">{note}</p>{body}</section>")
}

fn legend(keys: &[(&str, &str)]) -> String {
    let key = |(class, label): &(&str, &str)| {
        format!("<span class=\"key\"><i class=\"swatch {class}\"></i>{label}</span>")
    };
    format!("<div class=\"legend\">{}</div>", keys.iter().map(key).collect::<String>())
}

fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let grouped: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().filter_map(|c| std::str::from_utf8(c).ok()).collect();
    grouped.join(",")
}
