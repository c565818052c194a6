//! What a role writes of itself: its report, with the accounts, and lines of figures.

use crate::privileges;
use crate::say::{self, caution, say, told};
use anyhow::{Result, bail};
use replayer_engine::histogram::Histogram;
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::path::Path;

/// Makes sure of the place of a report before a role starts: at its end, after hours perhaps, would be late to hear of it. What is in
/// the file stays until then, and where there is none, none is left.
///
/// # Errors
/// When the file cannot be written.
pub fn check_writable(path: Option<&Path>) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut options = OpenOptions::new();
    match options.append(true).create_new(true).open(path) {
        Ok(_) => std::fs::remove_file(path),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            options.create_new(false).create(true).open(path).map(drop)
        }
        Err(error) => Err(error),
    }
    .map_err(|error| unwritable(path, error))
}

/// A report as it is written: with the accounts at the end, and told from a final one while the role goes on.
#[derive(Serialize)]
struct Written<'a, R> {
    #[serde(flatten)]
    report: &'a R,
    #[serde(skip_serializing_if = "<[Identity]>::is_empty")]
    accounting: &'a [Identity],
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    running: bool,
}

/// Writes a role's report where `--report` says, with its accounts if it has any.
///
/// # Errors
/// When the file cannot be written.
pub fn write(path: &Path, report: &impl Serialize, accounting: &[Identity]) -> Result<()> {
    write_as(path, &Written { report, accounting, running: false })
}

/// Writes the report of a role that goes on, and says so. The accounts are not in it: that they add up can be seen when everything stands
/// still.
pub(crate) fn write_interim(path: Option<&Path>, report: &impl Serialize) {
    let Some(path) = path else {
        say!("SIGHUP: there is no report to write (--report FILE)");
        return;
    };
    match write_as(path, &Written { report, accounting: &[], running: true }) {
        Ok(()) => say!("SIGHUP: the report until now is in {}", path.display()),
        Err(error) => caution!("{}", told(&error)),
    }
}

fn write_as(path: &Path, report: &impl Serialize) -> Result<()> {
    // Sorted, for a person who looks for a name.
    let report = serde_json::to_value(report)?;
    std::fs::write(path, format!("{report:#}\n")).map_err(|error| unwritable(path, error))
}

fn unwritable(path: &Path, error: io::Error) -> anyhow::Error {
    let remedy = privileges::remedy(path, &error);
    let text = format!("cannot write the report to {}; choose a writable path{remedy}", path.display());
    anyhow::Error::new(error).context(text)
}

/// Prints a line of figures to standard output. Whoever reads them may go away: that ends no replay.
///
/// # Errors
/// None that is known.
pub fn print(line: &impl Serialize) -> Result<()> {
    say::figures(&serde_json::to_string(line)?);
    Ok(())
}

/// Two sums of an account, which differ by a defect only.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Identity {
    /// What is added up.
    #[serde(rename = "identity")]
    name: &'static str,
    left: u64,
    right: u64,
    holds: bool,
}

impl Identity {
    /// The one sum and the other.
    pub fn new(name: &'static str, left: u64, right: u64) -> Identity {
        Identity { name, left, right, holds: left == right }
    }

    /// # Errors
    /// When the sums differ.
    pub fn ensure(self) -> Result<()> {
        let Identity { name, left, right, holds } = self;
        if !holds {
            bail!("the accounts do not add up: {name}: {left} against {right}; please report this");
        }
        Ok(())
    }
}

/// A histogram's values that are reported.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    /// Values in it.
    pub count: u64,
    /// The median.
    pub p50: u32,
    /// Of ten values nine are at most this.
    pub p90: u32,
    /// Of a hundred, 99.
    pub p99: u32,
    /// Of a thousand, 999.
    pub p999: u32,
    /// The largest.
    pub max: u32,
}

impl Quantiles {
    /// Those of a histogram, in its unit.
    pub fn of(h: &Histogram) -> Quantiles {
        Quantiles {
            count: h.count(),
            p50: h.quantile(0.5),
            p90: h.quantile(0.9),
            p99: h.quantile(0.99),
            p999: h.quantile(0.999),
            max: h.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_look_whether_a_report_can_be_written_leaves_everything_as_it_was() {
        let dir = std::env::temp_dir().join(format!("replayer-report-{}", std::process::id()));
        let path = dir.join("report.json");
        let error = check_writable(Some(&path)).unwrap_err().to_string();
        assert!(error.contains("writable path") && error.contains("report.json"), "{error}");
        std::fs::create_dir(&dir).unwrap();
        check_writable(Some(&path)).unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "of the run before").unwrap();
        check_writable(Some(&path)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "of the run before");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
