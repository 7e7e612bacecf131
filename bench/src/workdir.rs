//! The folder of a run's logs and records: one that is given, or one of its own that is removed after a run that
//! passed. Owns the folder, and the last words of a run.

use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::report::Report;

/// The folder, and whether it is one of our own.
pub struct WorkDir {
    path: PathBuf,
    ours: bool,
}

impl WorkDir {
    /// Makes the folder `given`, or a temporary one named after `run`.
    pub fn new(given: Option<PathBuf>, run: &str) -> anyhow::Result<Self> {
        let ours = given.is_none();
        let name = format!("anabranch-{run}-{}", std::process::id());
        let path = given.unwrap_or_else(|| std::env::temp_dir().join(name));
        std::fs::create_dir_all(&path)
            .with_context(|| format!("making the work folder {}", path.display()))?;
        Ok(Self { path, ours })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes our own folder if the run passed; otherwise says where it is.
    #[allow(clippy::print_stderr)]
    pub fn close(self, passed: bool) -> anyhow::Result<()> {
        if self.ours && passed {
            return std::fs::remove_dir_all(&self.path)
                .with_context(|| format!("removing {}", self.path.display()));
        }
        eprintln!("logs and records: {}", self.path.display());
        Ok(())
    }
}

/// Prints the table, writes the report, closes the folder.
#[allow(clippy::print_stdout)]
pub fn finish(report: &Report, file: Option<&Path>, dir: WorkDir) -> anyhow::Result<()> {
    print!("{}", report.table());
    if let Some(file) = file {
        report.write(file)?;
        println!("report: {}", file.display());
    }
    dir.close(report.pass)
}
