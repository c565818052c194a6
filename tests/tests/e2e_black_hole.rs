//! `replayer assistant --keep-dropping`: a black hole that stays when the assistant was killed, on a host that would forward what it lets through.
//!
//! Root only; each test has a lab of its own.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use replayer_tests::clients::{Load, Watch, counter, output_of};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::tool;
use replayer_tests::wait::{holds_within, wait_for};

const STREAM: u16 = 9000;

/// An IP version, as a lab has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn address(self, host: &Host) -> IpAddr {
        match self {
            Family::V4 => host.v4().into(),
            Family::V6 => host.v6().into(),
        }
    }

    /// Has a host forward packets.
    fn forward(self, host: &Host) -> Result<()> {
        let key = match self {
            Family::V4 => "ipv4/ip_forward",
            Family::V6 => "ipv6/conf/all/forwarding",
        };
        host.namespace().set_sysctl(key, "1")
    }

    /// How many packets a host has forwarded.
    fn forwarded(self, host: &Host) -> Result<u64> {
        if self == Family::V4 {
            return counter(host, "Ip:", "ForwDatagrams");
        }
        let text = output_of(host.command("cat").arg("/proc/net/snmp6"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"));
        Ok(count.context("no counter")?.trim().parse()?)
    }
}

/// Without the flag, the same host shows what would have happened.
#[test]
fn b049_b053_a_black_hole_that_stays_lets_nothing_through_until_another_assistant_takes_over() -> Result<()> {
    ensure_nothing_gets_through(Family::V4)
}

#[test]
fn b010_b049_b053_a_black_hole_that_stays_lets_nothing_through_over_ipv6() -> Result<()> {
    ensure_nothing_gets_through(Family::V6)
}

fn ensure_nothing_gets_through(family: Family) -> Result<()> {
    for keep in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let host = lab.assistant();
        family.forward(host)?;
        let online = family.address(lab.online());
        let before = programs(host)?;
        let file = lab.bpf_file_system()?.join("black-hole");
        let keep_dropping = format!("--keep-dropping={}", file.display());
        let arguments = ["--allow-forwarding", &keep_dropping];
        let arguments = if keep { &arguments[..] } else { &arguments[..1] };
        let not_online = match family {
            Family::V4 => format!("ip protocol tcp ip saddr != {online}"),
            Family::V6 => format!("ip6 nexthdr tcp ip6 saddr != {online}"),
        };
        let watch = Watch::arriving(lab.client(), &[("strangers", &not_online)])?;
        let forwarded = || family.forwarded(host);

        let assistant = Role::assistant(&lab, host, arguments)?;
        let target = SocketAddr::new(family.address(lab.target()), STREAM);
        let services = [format!("{STREAM}-{target}")];
        let mut replay = Replay {
            online: Role::online(&lab, lab.online(), &services, family.address(host), &[])?,
            assistant,
        };
        let load = format!(
            "--connect {} --connections 20 --rate 400 --seconds 5 --body 1-3000 --response 1-30000",
            SocketAddr::new(online, STREAM)
        );
        let mut load = Load::start(&lab, lab.client(), "load", &load)?;
        wait_for("requests at the target", ARRIVAL, || {
            streams.target.record().is_ok_and(|record| record.requests() >= 200)
        })?;
        replay.assistant.process.kill()?;
        if !keep {
            wait_for("responses of the target at the client", ARRIVAL, || {
                watch.packets().is_ok_and(|packets| packets["strangers"] > 10)
            })?;
            ensure!(forwarded()? > 10 && programs(host)? == before, "{:?}", programs(host)?);
            continue;
        }
        // The target goes on sending what nobody acknowledges.
        std::thread::sleep(Duration::from_secs(1));
        ensure!(programs(host)? != before && file.exists(), "the program has gone with the assistant");
        replay.assistant = Role::assistant(&lab, host, arguments)?;
        let said = replay.assistant.process.errors();
        let dropped = said.split("which has dropped ").nth(1).and_then(|rest| rest.split(' ').next());
        let dropped: u64 = dropped.and_then(|number| number.parse().ok()).with_context(|| said.clone())?;
        ensure!(dropped > 10 && said.contains(&format!("{target} (TCP): taken over")), "{said}");

        let summary = load.finish()?;
        assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
        let (_, received) =
            streams.ensure_equal_within(summary.requests as usize, Duration::from_secs(10))?;
        assert_eq!(received.connections.len(), 20, "running sessions went on");
        assert_eq!((forwarded()?, watch.packets()?["strangers"]), (0, 0));
        replay.stop()?;
        assert_eq!((programs(host)?, file.exists()), (before, false), "a clean stop ends it");
    }
    Ok(())
}

/// A target that sends all the time, and no worker that names it to the new assistant: what the one before took is dropped before, while and
/// after the new one takes its place, and no longer after a clean stop.
#[test]
fn there_is_no_moment_between_two_assistants() -> Result<()> {
    ensure_no_moment_between(Family::V4)
}

#[test]
fn b010_there_is_no_moment_between_two_assistants_over_ipv6() -> Result<()> {
    ensure_no_moment_between(Family::V6)
}

fn ensure_no_moment_between(family: Family) -> Result<()> {
    const PORT: u16 = 5353;
    let lab = Lab::up(Plan::default())?;
    let (host, target) = (lab.assistant(), lab.target());
    family.forward(host)?;
    let keep_dropping = format!("--keep-dropping={}", lab.bpf_file_system()?.join("black-hole").display());
    let arguments = ["--allow-forwarding", &keep_dropping];
    let mut first = Role::assistant(&lab, host, &arguments)?;
    let services = [format!("udp:{}", service(PORT, family.address(target), PORT))];
    let mut online = Role::online(&lab, lab.online(), &services, family.address(host), &[])?;
    let leaked = Watch::arriving(lab.client(), &[("datagrams", &format!("udp sport {PORT}"))])?;
    let socket = target.namespace().enter(|| UdpSocket::bind((family.address(target), PORT)))??;
    let to = SocketAddr::from((family.address(lab.client()), 40_000));
    let (count, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| -> Result<()> {
        let _ends = Ends(&over);
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                count.fetch_add(u64::from(socket.send_to(b"late", to).is_ok()), Ordering::Relaxed);
                std::thread::sleep(Duration::from_micros(200));
            }
        });
        let sends_more = |number: u64| {
            let until = count.load(Ordering::Relaxed) + number;
            wait_for("datagrams", ARRIVAL, || count.load(Ordering::Relaxed) > until)
        };
        sends_more(500)?;
        online.process.signal(Signal::SIGSTOP)?;
        first.process.kill()?;
        sends_more(500)?;
        let mut second = Role::assistant(&lab, host, &arguments)?;
        sends_more(500)?;
        assert_eq!(leaked.packets()?["datagrams"], 0, "of {}", count.load(Ordering::Relaxed));
        let report: serde_json::Value = second.stop()?;
        ensure!(report["received"].as_u64() > Some(300), "the second took none: {report:#}");
        wait_for("datagrams after a clean stop", ARRIVAL, || {
            leaked.packets().is_ok_and(|packets| packets["datagrams"] > 100)
        })?;
        Ok(())
    })
}

/// Has a thread end, whatever the test comes to.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The numbers of the XDP programs of a host's NIC.
fn programs(host: &Host) -> Result<Vec<u32>> {
    // … prog/xdp id 34 name responses tag …
    let links = output_of(host.command("ip").args(["-d", "-o", "link", "show", NIC]))?;
    let mut programs = Vec::new();
    for of_program in links.split("prog/xdp id ").skip(1) {
        programs.push(of_program.split(' ').next().context("no number")?.parse()?);
    }
    ensure!(programs.is_empty() != links.contains("xdp"), "{links}");
    Ok(programs)
}

/// An assistant as a user starts it, on a host where this BPF file system, if any, is in its usual place.
fn assistant(lab: &Lab, host: &Host, bpf: Option<&Path>, arguments: &str) -> Result<Process> {
    assistant_by("", lab, host, bpf, arguments)
}

/// The same by a command that runs it.
fn assistant_by(
    runner: &str,
    lab: &Lab,
    host: &Host,
    bpf: Option<&Path>,
    arguments: &str,
) -> Result<Process> {
    let mount = bpf.map_or_else(String::new, |dir| format!("mount --bind {} /sys/fs/bpf && ", dir.display()));
    let mut command = host.command("sh");
    command
        .arg("-c")
        .arg(format!("{mount}exec {runner} {} {arguments} -i {NIC}", tool("replayer")?.display()));
    Process::start(&mut command, "assistant", &lab.dir())
}

/// Its message, where it ends by itself.
fn ended(mut process: Process, well: bool) -> Result<String> {
    let status = process.wait(Duration::from_secs(10))?;
    ensure!(status.success() == well, "{status}: {}", process.errors());
    Ok(process.errors())
}

#[test]
fn a_black_hole_that_stays_is_found_and_can_be_removed() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let host = lab.assistant();
    let none = programs(host)?;
    // The hosts of a lab have a /sys of their own, without a BPF file system.
    for role in ["assistant", "check assistant"] {
        let message = ended(assistant(&lab, host, None, &format!("{role} --keep-dropping"))?, false)?;
        ensure!(message.contains("mount -t bpf bpf /sys/fs/bpf"), "{message}");
    }
    let bpf = lab.bpf_file_system()?;
    let file = bpf.join(format!("replayer/assistant-{NIC}"));
    let usual = format!("/sys/fs/bpf/replayer/assistant-{NIC}");
    let start = || -> Result<Process> {
        let mut process = assistant(&lab, host, Some(&bpf), "assistant --keep-dropping")?;
        process.wait_for_message("ready", ARRIVAL)?;
        ensure!(process.errors().contains(&usual), "{}", process.errors());
        Ok(process)
    };
    let said = ended(assistant(&lab, host, Some(&bpf), "check assistant --keep-dropping")?, true)?;
    ensure!(!said.contains(&usual) && !file.exists() && !bpf.join("replayer").exists(), "{said}");

    // Killed: it is named by a check and by an assistant that was not told to take it over, and another host's is not touched.
    start()?.kill()?;
    let left = programs(host)?;
    ensure!(none.is_empty() && left.len() == 1 && file.exists(), "nothing has stayed: {left:?}");
    for arguments in ["check assistant --keep-dropping", "check assistant"] {
        let said = ended(assistant(&lab, host, Some(&bpf), arguments)?, true)?;
        ensure!(said.contains(&format!("rm {usual}")) && said.contains("everything is there"), "{said}");
    }
    let said = ended(assistant(&lab, host, Some(&bpf), "assistant")?, false)?;
    ensure!(said.contains(&format!("--keep-dropping takes it over, `rm {usual}` removes it")), "{said}");
    let other = lab.host("assistant2");
    let said = ended(assistant(&lab, other, Some(&bpf), "assistant --keep-dropping")?, false)?;
    ensure!(said.contains("is not of eth0") && said.contains(&format!("rm {usual}")), "{said}");
    assert_eq!((programs(host)?, programs(other)?), (left.clone(), none.clone()));

    // Taken over and killed again; removed by hand.
    let mut second = start()?;
    ensure!(second.errors().contains("taken over"), "{}", second.errors());
    let taken_over = programs(host)?;
    ensure!(taken_over.len() == 1 && taken_over != left, "{taken_over:?} in the place of {left:?}");
    second.kill()?;
    std::fs::remove_file(&file)?;
    let is_gone = || programs(host).is_ok_and(|now| now == none);
    ensure!(holds_within(ARRIVAL, is_gone), "after rm: {:?}", programs(host)?);

    // A clean stop leaves nothing, neither that of a process that is not root.
    let nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups \
                  --inh-caps=-all,+cap_12,+cap_13,+cap_14,+cap_21,+cap_38,+cap_39 \
                  --ambient-caps=-all,+cap_12,+cap_13,+cap_14,+cap_21,+cap_38,+cap_39";
    std::fs::remove_dir(bpf.join("replayer"))?;
    for runner in ["", nobody] {
        let mut process = assistant_by(runner, &lab, host, Some(&bpf), "assistant --keep-dropping")?;
        process.wait_for_message("ready", ARRIVAL)?;
        ensure!(file.exists(), "no file");
        process.signal(Signal::SIGTERM)?;
        ensure!(process.wait(ARRIVAL)?.success(), "{}", process.errors());
        ensure!(
            holds_within(ARRIVAL, is_gone) && !file.exists() && !bpf.join("replayer").exists(),
            "{:?}",
            programs(host)?
        );
    }

    // With the interface goes what would keep the next one from starting.
    let mut last = start()?;
    host.namespace().ip(&format!("link del {NIC}\n"))?;
    let status = last.wait(Duration::from_secs(15))?;
    ensure!(!status.success() && last.errors().contains("eth0 is gone"), "{status}: {}", last.errors());
    ensure!(!file.exists(), "the file has outlived the interface");
    Ok(())
}
