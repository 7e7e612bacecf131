//! Draws `report.html` again from a `report.json`: `report JSON HTML`.

use anabranch_demo::report::{Report, render};
use anyhow::{Context, Result};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (json, html) = args.next().zip(args.next()).context("usage: report JSON HTML")?;
    let text = std::fs::read_to_string(&json).with_context(|| format!("cannot read {json}"))?;
    let report: Report =
        serde_json::from_str(&text).with_context(|| format!("{json} is not a demo's report"))?;
    std::fs::write(&html, render(&report)).with_context(|| format!("cannot write {html}"))
}
