//! Draws a [`Model`]: engines, versions, steps, events.

use anabranch_proto::LoadStage;
use anabranch_views::{EngineState, EngineView, VersionView};
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Paragraph, Row, Table};

use super::model::Model;
use crate::table::{bytes, seconds};

/// Draws one frame.
pub fn draw(frame: &mut Frame, model: &Model) {
    let engines = (model.state.engines.len() as u16 + 3).clamp(5, 16);
    let [head, top, middle, log] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(engines),
        Constraint::Length(9),
        Constraint::Min(4),
    ])
    .areas(frame.area());
    let [versions, work] =
        Layout::horizontal([Constraint::Percentage(60), Constraint::Percentage(40)]).areas(middle);
    draw_head(frame, head, model);
    draw_engines(frame, top, model);
    draw_versions(frame, versions, model);
    draw_work(frame, work, model);
    draw_events(frame, log, model);
}

fn draw_head(frame: &mut Frame, area: Rect, model: &Model) {
    let second = match &model.trouble {
        Some(trouble) => Line::from(format!("cannot see the manager: {trouble}")).red(),
        None => {
            Line::from(format!("{}  up {}  q quits", model.manager, seconds(model.state.uptime_ms)))
                .dim()
        }
    };
    frame.render_widget(Paragraph::new(vec![Line::from(model.line()).bold(), second]), area);
}

fn draw_engines(frame: &mut Frame, area: Rect, model: &Model) {
    let row = |engine: &EngineView| {
        let rate = model.rates.get(&engine.id).copied().unwrap_or(0.0);
        let load = engine.load.as_ref().map_or_else(
            || engine.state.why().to_owned(),
            |load| match load.total {
                0 => format!("{} {}", load.stage, load.version),
                all => format!("{} {} {}%", load.stage, load.version, load.bytes * 100 / all),
            },
        );
        Row::new(vec![
            engine.id.clone(),
            engine.state.to_string(),
            engine.version_text(),
            engine.running.to_string(),
            format!("{rate:.0}"),
            format!("{:.0}%", engine.kv_used * 100.0),
            load,
        ])
        .style(Style::new().fg(color(&engine.state)))
    };
    let widths = [
        Constraint::Fill(2),
        Constraint::Length(11),
        Constraint::Length(8),
        Constraint::Length(8),
        Constraint::Length(9),
        Constraint::Length(5),
        Constraint::Fill(3),
    ];
    let head = Row::new(["engine", "state", "version", "running", "tokens/s", "kv", ""]).dim();
    let table = Table::new(model.state.engines.iter().map(row), widths)
        .header(head)
        .block(Block::bordered().title("engines"));
    frame.render_widget(table, area);
}

fn color(state: &EngineState) -> Color {
    use EngineState::*;
    match state {
        Serving { .. } => Color::Green,
        Joining | Syncing { .. } | Updating { .. } => Color::Yellow,
        Released | Releasing => Color::Blue,
        Suspect { .. } | Draining { .. } | Quarantined | Gone { .. } | Unknown => Color::Red,
    }
}

fn draw_versions(frame: &mut Frame, area: Rect, model: &Model) {
    let row = |version: &VersionView| {
        let active = version.engines.values().filter(|on| on.stage == LoadStage::Active).count();
        let failed = version.engines.values().filter(|on| !on.error.is_empty()).count();
        let mut spread = format!("{active}/{} active", version.engines.len());
        if failed > 0 {
            spread += &format!(", {failed} failed");
        }
        let cells =
            [version.version.to_string(), version.state.to_string(), bytes(version.bytes), spread];
        let style = if version.settled { Style::new() } else { Style::new().fg(Color::Yellow) };
        Row::new(cells).style(style)
    };
    let mut newest: Vec<&VersionView> = model.state.versions.iter().collect();
    newest.sort_by_key(|row| std::cmp::Reverse(row.version.number));
    let widths = [
        Constraint::Length(8),
        Constraint::Length(11),
        Constraint::Length(11),
        Constraint::Fill(1),
    ];
    let table =
        Table::new(newest.into_iter().map(row), widths).block(Block::bordered().title("versions"));
    frame.render_widget(table, area);
}

fn draw_work(frame: &mut Frame, area: Rect, model: &Model) {
    let state = &model.state;
    let step = state.steps.iter().rev().find(|step| !step.over).or(state.steps.last());
    let step = step.map_or_else(
        || "no step".to_owned(),
        |step| {
            let done = step.groups as u64 - u64::from(step.open_groups).min(step.groups as u64);
            format!(
                "step {}: {done}/{} groups done, {} samples out",
                step.step, step.groups, step.delivered
            )
        },
    );
    let queue = &state.queue;
    let lines = vec![
        Line::from(step),
        Line::from(format!(
            "waiting {} (resumed {}, held {})",
            state.samples.waiting, queue.resumed, queue.held
        )),
        Line::from(format!("running {}", state.samples.running)),
        Line::from(format!("tokens {}", state.counters.tokens)),
        Line::from(format!(
            "migrations {}, engine deaths {}",
            state.counters.migrations, state.counters.engine_deaths
        )),
        Line::from(queue.blocked.as_deref().unwrap_or_default()).yellow(),
    ];
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("work")), area);
}

fn draw_events(frame: &mut Frame, area: Rect, model: &Model) {
    let room = area.height.saturating_sub(2) as usize;
    let skip = model.events.len().saturating_sub(room);
    let lines: Vec<Line> = model.events.iter().skip(skip).map(|e| Line::from(e.as_str())).collect();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title("events")), area);
}

#[cfg(test)]
mod tests {
    use anabranch_proto::{Version, VersionState};
    use anabranch_views::{LoadView, ProgressView, StateView, StepView};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn state() -> StateView {
        let version = Version { number: 3, ..Version::default() };
        let stage = LoadStage::Fetching.into();
        let load = LoadView { version, stage, bytes: 50, total: 200, ..LoadView::default() };
        let on = ProgressView { stage: LoadStage::Fetching.into(), ..ProgressView::default() };
        StateView {
            engines: vec![EngineView {
                id: "e1".into(),
                state: EngineState::Updating { from: Version::base(0), to: version },
                running: 7,
                load: Some(load),
                ..EngineView::default()
            }],
            versions: vec![VersionView {
                version,
                state: VersionState::Available.into(),
                bytes: 200,
                engines: [("e1".to_owned(), on)].into(),
                ..VersionView::default()
            }],
            steps: vec![StepView { step: 4, groups: 8, open_groups: 9, ..StepView::default() }],
            ..StateView::default()
        }
    }

    #[test]
    fn the_view_shows_engines_versions_work_and_events_at_any_size() {
        let mut model = Model::new("http://m:5000");
        model.look(state());
        model.event(r#"{"event": "engine_gone", "at_ms": 5, "engine": "e2"}"#);
        for (width, height) in [(100, 40), (20, 5), (1, 1)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("backend");
            terminal.draw(|frame| draw(frame, &model)).expect("drawn");
            if width == 100 {
                let shown = terminal.backend().to_string();
                for part in
                    ["fetching v3 25%", "0/1 active", "step 4: 0/8", "engine gone: engine e2"]
                {
                    assert!(shown.contains(part), "{part} in\n{shown}");
                }
            }
        }
    }
}
