use super::*;

fn report() -> Report {
    let serving =
        |from_s, to_s, version| PhaseSpan { from_s, to_s, phase: Phase::Serving { version } };
    Report {
        seed: 1,
        task: "strand".to_owned(),
        algorithm: "GRPO".to_owned(),
        publishing: true,
        wall_s: 20.0,
        warmup_s: 1.0,
        steps: 2,
        exact_after: 0.75,
        trajectories: 1512,
        engines: vec![EngineRow {
            id: "engine-1".to_owned(),
            left_s: Some(9.0),
            why: Some("killed <by> the script".to_owned()),
            tokens: 12_345,
            phases: vec![serving(1.0, 4.0, 0), serving(4.5, 9.0, 1)],
            ..EngineRow::default()
        }],
        versions: vec![VersionRow {
            version: 1,
            bytes: 332_544,
            publish_s: 0.004,
            active_s: [("engine-1".to_owned(), 0.5)].into(),
            ..VersionRow::default()
        }],
        curve: (1..=2)
            .map(|step| CurvePoint {
                step,
                t_s: 9.0 * step as f64,
                reward: 0.4,
                ..CurvePoint::default()
            })
            .collect(),
        story: vec![Happening {
            at_s: 9.0,
            kind: HappeningKind::Killed,
            engine: Some("engine-1".to_owned()),
            text: "engine-1 was killed".to_owned(),
        }],
        ..Report::default()
    }
}

#[test]
fn a_report_reads_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    report().write(dir.path()).unwrap();
    let text = fs::read_to_string(dir.path().join("report.json")).unwrap();
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report());
    let page = fs::read_to_string(dir.path().join("report.html")).unwrap();
    assert_eq!(page, render(&report()));
}

#[test]
fn the_page_stands_alone_and_escapes_what_others_said() {
    let page = render(&report());
    for outside in ["http://", "https://", "<script", "src=", "@import"] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("killed &lt;by&gt; the script"));
    assert!(page.contains("12,345") && page.contains("1,512"));
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
}

#[test]
fn the_page_says_when_samples_were_lost_or_weights_withheld() {
    assert!(render(&report()).contains("exactly once"));
    assert!(render(&Report { lost: 3, ..report() }).contains("3 were lost"));
    let control = render(&Report { publishing: false, ..report() });
    assert!(control.contains("never given the new weights"));
}

#[test]
fn an_empty_report_is_drawn_without_numbers_that_are_none() {
    let page = render(&Report::default());
    assert!(!page.contains("NaN") && !page.contains("inf"));
}
