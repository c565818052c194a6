//! Clients on hosts of a lab, and what arrives at their NIC.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{Host, Lab, NIC};
use crate::load::Summary;
use crate::process::Process;
use crate::servers::{start, tool};

/// No load of a test takes longer.
const LOAD_LIMIT: Duration = Duration::from_secs(120);

/// A run of `loadgen`.
#[derive(Debug)]
pub struct Load {
    /// Its process.
    pub process: Process,
    out: PathBuf,
}

impl Load {
    /// Starts `loadgen` on a host; `arguments` as on a command line, separated by spaces. `name` tells it from others there.
    pub fn start(lab: &Lab, host: &Host, name: &str, arguments: &str) -> Result<Self> {
        let out = lab.dir().join(format!("{}-{name}.json", host.name()));
        let mut command = host.command(tool("loadgen")?);
        command.args(arguments.split_ascii_whitespace()).arg("--out").arg(&out);
        Ok(Self { process: start(lab, host, name, &mut command)?, out })
    }

    /// Waits for its end; what it did and saw.
    pub fn finish(&mut self) -> Result<Summary> {
        let status = self.process.wait(LOAD_LIMIT)?;
        ensure!(status.success(), "{} ended with {status}: {}", self.process.name(), self.process.tail());
        let text =
            fs::read_to_string(&self.out).with_context(|| format!("reading {}", self.out.display()))?;
        serde_json::from_str(&text).with_context(|| format!("reading {}", self.out.display()))
    }

    /// Runs `loadgen` on the first client to its end.
    pub fn run(lab: &Lab, name: &str, arguments: &str) -> Result<Summary> {
        Self::start(lab, lab.client(), name, arguments)?.finish()
    }
}

/// Runs a command to its end, which must be good; what it printed.
pub fn output_of(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// A counter of a host's kernel, from /proc/net/snmp (`Tcp:`) or /proc/net/netstat (`TcpExt:`, `IpExt:`, `MPTcpExt:`): lines of names, each
/// followed by one of values.
pub fn counter(host: &Host, group: &str, name: &str) -> Result<u64> {
    let file = if group.ends_with("Ext:") { "/proc/net/netstat" } else { "/proc/net/snmp" };
    let text = output_of(host.command("cat").arg(file))?;
    let mut lines = text.lines().filter(|line| line.starts_with(group));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let column =
        names.split(' ').position(|column| column == name).with_context(|| format!("no counter {name}"))?;
    Ok(values.split(' ').nth(column).context("too few values")?.parse()?)
}

/// What no client may get: resets, and anything that is not from its server (behaviour 4).
#[derive(Debug)]
pub struct Unnoticed<'a>(Watch<'a>);

impl<'a> Unnoticed<'a> {
    /// Watches what arrives at the first client, whose servers are the first online host's.
    pub fn by_client(lab: &'a Lab) -> Result<Self> {
        let from_target = format!("ip saddr {}", lab.target().v4());
        let from_elsewhere = format!("ip protocol tcp ip saddr != {}", lab.online().v4());
        let watch = Watch::arriving(
            lab.client(),
            &[
                ("resets", "tcp flags & rst == rst"),
                ("target", &from_target),
                ("elsewhere", &from_elsewhere),
                ("segments", "ip protocol tcp"),
            ],
        )?;
        Ok(Self(watch))
    }

    /// Until now nothing of that came, among more than `segments` TCP segments.
    pub fn ensure(&self, segments: u64) -> Result<()> {
        let packets = self.0.packets()?;
        ensure!(packets["segments"] > segments, "not all was seen: {packets:?}");
        let strange = ["resets", "target", "elsewhere"].map(|name| packets[name]);
        ensure!(strange == [0, 0, 0], "the client got what is not its server's: {packets:?}");
        Ok(())
    }
}

/// Counters of packets that arrive at a host's NIC, before its kernel does anything with them.
#[derive(Debug)]
pub struct Watch<'a> {
    host: &'a Host,
}

impl<'a> Watch<'a> {
    /// Counts packets that match nftables expressions, by name: `("resets", "tcp flags & rst == rst")`.
    pub fn arriving(host: &'a Host, expressions: &[(&str, &str)]) -> Result<Self> {
        let counters: String =
            expressions.iter().map(|(name, _)| format!("counter {name} {{ }}\n")).collect();
        let rules: String = expressions
            .iter()
            .map(|(name, expression)| format!("{expression} counter name {name}\n"))
            .collect();
        host.namespace().nft(&format!(
            "table netdev watch {{\n{counters}\
             chain arriving {{ type filter hook ingress device {NIC} priority 0;\n{rules}}}\n}}\n"
        ))?;
        Ok(Self { host })
    }

    /// Packets until now, by name.
    pub fn packets(&self) -> Result<BTreeMap<String, u64>> {
        let text = output_of(self.host.command("nft").args(["list", "counters"]))?;
        Ok(parse_counters(&text))
    }
}

/// Reads what `nft list counters` prints: `counter NAME {` and, on the next line, `packets N bytes N`.
fn parse_counters(text: &str) -> BTreeMap<String, u64> {
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    words
        .windows(5)
        .filter(|window| window[0] == "counter" && window[2] == "{" && window[3] == "packets")
        .filter_map(|window| Some((window[1].to_owned(), window[4].parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "table netdev watch {\n\tcounter resets {\n\t\tpackets 3 bytes 120\n\t}\n\tcounter all {\n\t\tpackets 10 bytes 1\n\t}\n}\n";
        assert_eq!(parse_counters(text), BTreeMap::from([("resets".into(), 3), ("all".into(), 10)]));
    }
}
