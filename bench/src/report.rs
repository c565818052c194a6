//! Figures, what each is compared with, and where they were taken.

use serde::Serialize;
use std::process::Command;

/// What a figure has to be.
#[derive(Clone, Copy, Debug, Serialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

impl Wanted {
    fn holds(self, value: f64) -> bool {
        match self {
            Wanted::AtMost(limit) => value <= limit,
            Wanted::AtLeast(limit) => value >= limit,
        }
    }
}

/// What was measured in the same run for comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Beside {
    /// What it is.
    pub what: String,
    /// Its value, in the figure's unit.
    pub value: f64,
}

/// One measured value.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// What was measured, with its parameters.
    pub name: String,
    /// The median of `samples`, or the only one.
    pub value: f64,
    /// The unit.
    pub unit: &'static str,
    /// The single measurements, in the order in which they were made.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<f64>,
    /// What it is compared with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside: Option<Beside>,
    /// What it has to be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Wanted>,
}

impl Figure {
    /// A value measured once, or one that does not vary.
    pub fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Figure {
        Figure { name: name.into(), value, unit, samples: Vec::new(), beside: None, wanted: None }
    }

    /// The median of several measurements; none is left out of the result's file.
    pub fn median(name: impl Into<String>, samples: Vec<f64>, unit: &'static str) -> Figure {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let value = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        Figure { samples, ..Figure::new(name, value, unit) }
    }

    /// Says what it is compared with.
    #[must_use]
    pub fn beside(mut self, what: impl Into<String>, value: f64) -> Figure {
        self.beside = Some(Beside { what: what.into(), value });
        self
    }

    /// Says what it has to be.
    #[must_use]
    pub fn wanted(mut self, wanted: Wanted) -> Figure {
        self.wanted = Some(wanted);
        self
    }
}

/// Where and when.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// The processor's model name.
    pub cpu: String,
    /// Processors that the kernel shows.
    pub cpus: usize,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// The kernel's release.
    pub kernel: String,
    /// `/sys/kernel/mm/transparent_hugepage/enabled`.
    pub transparent_huge_pages: String,
}

impl Machine {
    /// This one.
    pub fn here() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default();
            line.split_once(':').map_or(String::new(), |(_, value)| value.trim().to_owned())
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        Machine {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory.trim_end_matches(" kB").parse::<u64>().unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            transparent_huge_pages: read("/sys/kernel/mm/transparent_hugepage/enabled").trim().to_owned(),
        }
    }
}

/// A subject's result.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The subject.
    pub subject: &'static str,
    /// UTC, `2026-01-31T12:00:00Z`.
    pub date: String,
    /// The commit that was measured; `-dirty` when the tree had changes.
    pub commit: String,
    /// Where.
    pub machine: Machine,
    /// What.
    pub figures: Vec<Figure>,
}

impl Report {
    /// A result, taken here and now.
    pub fn new(subject: &'static str, figures: Vec<Figure>) -> Report {
        Report {
            subject,
            date: output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
            commit: output("git", &["describe", "--always", "--dirty", "--exclude=*"]),
            machine: Machine::here(),
            figures,
        }
    }

    /// The result as a table for a person.
    pub fn table(&self, what: &str) -> String {
        let Machine { cpu, cpus, kernel, .. } = &self.machine;
        let mut text = format!(
            "{}: {what}\n{cpu}, {cpus} cpus, Linux {kernel}, {}, {}\n\n",
            self.subject, self.date, self.commit
        );
        let width = self.figures.iter().map(|figure| figure.name.chars().count()).max().unwrap_or(0);
        for figure in &self.figures {
            let number = |value: f64| {
                if value.abs() >= 1000.0 { format!("{value:.0}") } else { format!("{value:.1}") }
            };
            let mut line =
                format!("{:<width$} {:>12} {:<12}", figure.name, number(figure.value), figure.unit);
            if let Some(wanted) = figure.wanted {
                let (sign, limit) = match wanted {
                    Wanted::AtMost(limit) => ('≤', limit),
                    Wanted::AtLeast(limit) => ('≥', limit),
                };
                let verdict = if wanted.holds(figure.value) { "ok" } else { "NOT REACHED" };
                line += &format!(" {verdict} (wanted {sign} {})", number(limit));
            }
            if let Some(beside) = &figure.beside {
                let ratio = figure.value / beside.value;
                line += &format!("  {}: {} ({ratio:.2} times)", beside.what, number(beside.value));
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map_or(String::new(), |output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_shown_and_every_sample_kept() {
        let figure = Figure::median("a", vec![9.0, 1.0, 5.0], "ns").wanted(Wanted::AtMost(4.0));
        assert_eq!((figure.value, figure.samples.len()), (5.0, 3));
        let table = Report::new("test", vec![figure]).table("nothing");
        assert!(table.contains("NOT REACHED"), "{table}");
    }
}
