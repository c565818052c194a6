//! Behaviours 50, 55, 63 and 65 to 67: what is no request of a client, how a role ends that cannot go on, what it says of a wrong set-up and of
//! itself, and what it may do.
//!
//! Root only; each test has a lab of its own.

use std::fs::{OpenOptions, Permissions};
use std::io::{BufRead, BufReader, PipeReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use replayer_tests::clients::{Load, Watch, output_of};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::pairs::StreamPair;
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Report, Role, service};
use replayer_tests::servers::{StreamServer, tool};
use replayer_tests::wait::wait_for;
use serde_json::Value;

const STREAM: u16 = 9000;
/// The return channel's port.
const CHANNEL: u16 = 36_524;

#[test]
fn b050_connections_of_the_online_host_itself_to_the_target_are_not_copied() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let strangers = format!("ip protocol tcp ip saddr != {}", lab.online().v4());
    let watch = Watch::arriving(lab.target(), &[("copies", &strangers), ("segments", "ip protocol tcp")])?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    // A health check, say: target and service have the same port, and the answers come in where requests are captured.
    let load = format!(
        "--connect {}:{STREAM} --connections 10 --per-connection 10 --requests 500 --body 1-3000",
        lab.target().v4()
    );
    let summary = Load::start(&lab, lab.online(), "direct", &load)?.finish()?;
    assert_eq!((summary.responses, summary.errors), (500, 0), "{summary:?}");
    let (report, _) = replay.stop()?;
    let packets = watch.packets()?;
    assert!(packets["segments"] > 500, "{packets:?}");
    assert_eq!(packets["copies"], 0);
    assert_eq!((report.counter("packets_captured"), report.counter("segments_sent")), (0, 0));
    assert_eq!((streams.target.record()?.requests(), streams.online.record()?.requests()), (500, 0));
    Ok(())
}

#[test]
fn b063_an_online_role_that_cannot_write_its_report_says_so_and_fails() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let dir = lab.dir().join("gone");
    std::fs::create_dir(&dir)?;
    let report = dir.join("report.json");
    let services = service(STREAM, lab.target().v4(), STREAM);
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["online", "-x", &services, "-s", &lab.assistant().v4().to_string(), "-i", NIC]);
    let mut process = Process::start(command.arg("--report").arg(&report), "fatal", &lab.dir())?;
    process.wait_for_message("online ready", Duration::from_secs(10))?;
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    streams.ensure_equal(10)?;
    // At the start it could be written.
    std::fs::remove_dir_all(&dir)?;
    process.signal(Signal::SIGTERM)?;
    let status = process.wait(Duration::from_secs(10))?;
    ensure!(!status.success() && process.errors().contains("writable"), "{status}: {}", process.errors());
    Ok(())
}

#[test]
fn b063_an_online_role_whose_interface_is_removed_says_so_and_fails() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    streams.ensure_equal(10)?;
    lab.online().namespace().ip(&format!("link del {NIC}\n"))?;
    let status = replay.online.process.wait(Duration::from_secs(10))?;
    let message = replay.online.process.errors();
    ensure!(!status.success() && message.contains("eth0 was removed"), "{status}: {message}");
    Ok(())
}

#[test]
fn b065_a_target_without_its_route_and_a_closed_port_are_named_within_ten_seconds() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let route = format!("172.28.1.0/24 via {} dev {NIC}", lab.assistant().v4());
    let target = lab.target().namespace();
    // The target's answers go to the real client, as before Replayer came.
    target.ip(&format!("route replace 172.28.1.0/24 dev {NIC}\n"))?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let load = format!("--connect {}:{STREAM} --connections 5 --rate 50 --seconds 1", lab.online().v4());
    assert_eq!(Load::run(&lab, "unanswered", &load)?.errors, 0);
    let silent = format!("nothing of {}:{STREAM} came back", lab.target().v4());
    replay.online.process.wait_for_message(&silent, Duration::from_secs(10))?;
    let said = replay.online.process.errors();
    ensure!(said.contains("ip route get"), "no remedy: {said}");
    ensure!(!said.contains("nothing was captured"), "{said}");

    target.ip(&format!("route replace {route}\n"))?;
    streams.target.stop()?;
    assert_eq!(Load::run(&lab, "refused", &load)?.errors, 0);
    let refused = format!("connections to {}:{STREAM} are refused", lab.target().v4());
    replay.online.process.wait_for_message(&refused, Duration::from_secs(10))?;
    assert_eq!(replay.online.process.errors().matches("came back").count(), 1);
    // The run has not done what was asked.
    let status = replay.online.process.stop()?;
    let said = replay.online.process.errors();
    ensure!(
        !status.success() && said.contains("not one session with a target was established"),
        "{status}: {said}"
    );
    replay.assistant.stop::<Value>()?;
    Ok(())
}

#[test]
fn b063_b065_only_the_target_is_named_that_does_not_answer_also_while_an_assistant_is_away() -> Result<()> {
    let lab = Lab::up(Plan { targets: 2, assistants: 2, ..Plan::default() })?;
    let _streams = StreamPair::start(&lab, STREAM)?;
    let silent = lab.host("target2");
    let _server = StreamServer::start(&lab, silent, STREAM, &[])?;
    // Its answers go to the real client, as before Replayer came.
    silent.namespace().ip(&format!("route replace 172.28.1.0/24 dev {NIC}\n"))?;
    let assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let mut other = Role::assistant(&lab, lab.host("assistant2"), &[])?;
    // Nothing listens at the last one's port.
    let services = [
        service(STREAM, lab.target().v4(), STREAM),
        service(STREAM, silent.v4(), STREAM),
        service(STREAM, lab.target().v4(), STREAM + 1),
    ];
    let assistants = [lab.assistant().v4().into(), lab.host("assistant2").v4().into()];
    let mut online = Role::online_with(&lab, lab.online(), &services, &assistants, &[])?;
    other.process.kill()?;
    online.process.wait_for_message("trying again", Duration::from_secs(10))?;
    let load = format!("--connect {}:{STREAM} --connections 5 --rate 50 --seconds 8", lab.online().v4());
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    let said = format!("nothing of {}:{STREAM} came back", silent.v4());
    online.process.wait_for_message(&said, Duration::from_secs(10))?;
    assert_eq!(load.finish()?.errors, 0);
    let said = online.process.errors();
    assert!(said.contains("1 of 2 assistants cannot be reached"), "{said}");
    let refused = format!("connections to {}:{} are refused", lab.target().v4(), STREAM + 1);
    assert!(said.contains(&refused), "{said}");
    assert_eq!((said.matches("came back").count(), said.matches(" are refused").count()), (1, 1), "{said}");
    // Two of three targets got nothing: the run has not done what was asked.
    let status = online.process.stop()?;
    let said = online.process.errors();
    let last = said.lines().find(|line| line.contains("nothing was replayed to")).context("no such line")?;
    assert_eq!(status.code(), Some(1), "{said}");
    for absent in [format!("{}:{STREAM}", silent.v4()), format!("{}:{}", lab.target().v4(), STREAM + 1)] {
        assert!(last.contains(&absent), "{last}");
    }
    assert!(!last.contains(&format!("{}:{STREAM} ", lab.target().v4())), "{last}");
    let report: Report = serde_json::from_slice(&std::fs::read(online.report_path())?)?;
    report.check_accounts()?;
    drop(assistant);
    let of = |target: String| {
        report
            .services
            .iter()
            .find(|service| service.target == target)
            .context("no such target in the report")
    };
    let good = of(format!("{}:{STREAM}", lab.target().v4()))?;
    assert!(
        good.sessions_opened == 5 && good.sessions_established == 5 && good.sessions_ended == 5,
        "{good:?}"
    );
    let silent = of(format!("{}:{STREAM}", silent.v4()))?;
    assert!(silent.sessions_opened >= 5 && silent.sessions_established == 0, "{silent:?}");
    let closed = of(format!("{}:{}", lab.target().v4(), STREAM + 1))?;
    assert!(closed.sessions_refused >= 1 && closed.sessions_refused == closed.sessions_ended, "{closed:?}");
    Ok(())
}

#[test]
fn b065_a_capture_that_sees_nothing_says_so_within_ten_seconds() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    replay.online.process.wait_for_message("nothing was captured on eth0", Duration::from_secs(10))?;
    ensure!(replay.online.process.errors().contains("port 9000"), "{}", replay.online.process.errors());
    replay.stop()?;
    Ok(())
}

#[test]
fn b065_clients_outside_the_sample_are_not_said_to_be_missing() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _streams = StreamPair::start(&lab, STREAM)?;
    // Within the first seconds of a day nobody is in it.
    let replay = Replay::start(&lab, &[STREAM], &["-g", "86400"])?;
    let started = Instant::now();
    let load = format!("--connect {}:{STREAM} --requests 3", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 3);
    // When it would be said, and a look more.
    std::thread::sleep(Duration::from_secs(10).saturating_sub(started.elapsed()));
    let said = replay.online.process.errors();
    ensure!(!said.contains("nothing was captured"), "{said}");
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("packets_captured"), 0);
    Ok(())
}

#[test]
fn b065_a_host_that_begins_to_forward_is_told_of_by_the_running_assistant() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let says = "this host forwards IP packets";
    lab.assistant().namespace().set_sysctl("ipv4/ip_forward", "1")?;
    assistant.process.signal(Signal::SIGHUP)?;
    assistant.process.wait_for_message(says, Duration::from_secs(5))?;
    // Once is enough.
    assistant.process.signal(Signal::SIGHUP)?;
    assistant.process.wait_for_message("SIGHUP", Duration::from_secs(5))?;
    assistant.stop::<Value>()?;
    let said = assistant.process.errors();
    assert_eq!(
        (said.matches(says).count(), said.contains("sysctl -w net.ipv4.conf.all.forwarding=0")),
        (1, true)
    );
    Ok(())
}

#[test]
fn an_assistant_says_before_it_attaches_xdp_to_what_is_no_veth() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    lab.assistant().namespace().ip("link add bridge0 type bridge\nlink set bridge0 up\n")?;
    let says = "attaching XDP to";
    for (interface, said) in [(NIC, None), ("bridge0", Some("attaching XDP to bridge0 (driver bridge)"))] {
        let mut command = lab.assistant().command(tool("replayer")?);
        let mut process =
            Process::start(command.args(["assistant", "-i", interface]), interface, &lab.dir())?;
        process.wait_for_message("assistant ready", Duration::from_secs(10))?;
        let errors = process.errors();
        match said {
            None => assert!(!errors.contains(says), "{errors}"),
            Some(said) => assert!(errors.find(said) < errors.find("assistant ready"), "{errors}"),
        }
        assert!(said.is_none_or(|said| errors.contains(said)), "{errors}");
        ensure!(process.stop()?.success(), "{}", process.errors());
    }
    Ok(())
}

#[test]
fn b063_an_assistant_whose_interface_was_replaced_says_so_and_fails() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    // The same name, and another device, before it can look.
    assistant.process.signal(Signal::SIGSTOP)?;
    lab.assistant().namespace().ip(&format!("link del {NIC}\nlink add {NIC} type veth peer name other\n"))?;
    assistant.process.signal(Signal::SIGCONT)?;
    // It looks every ten seconds.
    let status = assistant.process.wait(Duration::from_secs(15))?;
    let message = assistant.process.errors();
    ensure!(!status.success() && message.contains("eth0 is gone"), "{status}: {message}");
    Ok(())
}

/// Which capabilities each thread of a process has, as bits, by the thread's name.
fn capabilities(pid: Pid) -> Result<Vec<(String, u64)>> {
    let mut threads = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        threads.push((field("Name:").to_owned(), u64::from_str_radix(field("CapPrm:"), 16)?));
    }
    Ok(threads)
}

#[test]
fn b067_roles_run_with_named_capabilities_and_keep_hardly_any() -> Result<()> {
    // include/uapi/linux/capability.h
    let (dac_override, net_admin) = (1u64 << 1, 1u64 << 12);
    let named = "-all,+cap_12,+cap_13,+cap_14,+cap_21,+cap_38,+cap_39";
    let (inherited, ambient) = (format!("--inh-caps={named}"), format!("--ambient-caps={named}"));
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", &inherited, &ambient];
    let roots: [&str; 1] = ["env"];
    for (runner, way) in [(&roots[..], "ring"), (&nobody[..], "ring"), (&nobody[..], "mirror")] {
        let lab = Lab::up(Plan::default())?;
        let devices = || output_of(lab.online().command("ls").arg("/sys/class/net"));
        let before = devices()?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let start = |host: &Host, name, arguments: &str| -> Result<Process> {
            let mut command = host.command(runner[0]);
            command.args(&runner[1..]).arg(tool("replayer")?).args(arguments.split_whitespace());
            let mut process = Process::start(&mut command, name, &lab.dir())?;
            process.wait_for_message("ready", Duration::from_secs(10))?;
            Ok(process)
        };
        let mut assistant = start(lab.assistant(), "assistant", &format!("assistant -i {NIC}"))?;
        let service = service(STREAM, lab.target().v4(), STREAM);
        // With a ramp, which goes on writing to a map.
        let arguments =
            format!("online -x {service} -s {} -i {NIC} -g 1 --capture {way}", lab.assistant().v4());
        let mut online = start(lab.online(), "online", &arguments)?;
        // Beside it a recorder, into a directory of anybody's.
        let dir = lab.dir().join("anybody");
        std::fs::create_dir(&dir)?;
        std::fs::set_permissions(&dir, Permissions::from_mode(0o777))?;
        let to = format!("record -i {NIC} --capture {way} -x {STREAM} -w {}/recorded", dir.display());
        let mut recorder = start(lab.online(), "record", &to)?;

        let main = if runner == nobody { net_admin } else { net_admin | dac_override };
        let of_online = [("memory", 0), ("network", net_admin), ("replayer", main), ("worker 0", 0)];
        for (role, own) in [
            (&assistant, &[("replayer", 0)][..]),
            (&online, &of_online[..]),
            (&recorder, &[("replayer", main)][..]),
        ] {
            // In each, two that write what it says.
            let mut expected = [&[("messages", 0); 2], own].concat();
            let mut threads = capabilities(role.pid())?;
            threads.sort();
            expected.sort();
            let expected: Vec<_> = expected.into_iter().map(|(name, bits)| (name.to_owned(), bits)).collect();
            assert_eq!(threads, expected, "{} by {way}", role.name());
        }

        std::thread::sleep(Duration::from_millis(1500)); // The ramp's end.
        let load = format!("--connect {}:{STREAM} --connections 10 --requests 100", lab.online().v4());
        assert_eq!(Load::run(&lab, "load", &load)?.responses, 100);
        streams.ensure_equal(100)?;
        for process in [&mut online, &mut assistant, &mut recorder] {
            process.signal(Signal::SIGTERM)?;
            let status = process.wait(Duration::from_secs(10))?;
            ensure!(status.success(), "{status}: {}", process.errors());
            ensure!(!process.errors().contains("rights"), "{}", process.errors());
        }
        // With what they kept they could take down what they had made, and complete what they were writing.
        wait_for("the devices of before", Duration::from_secs(3), || {
            devices().is_ok_and(|now| now == before)
        })?;
        let recorded = std::fs::metadata(dir.join("recorded-00001.pcapng"))?.len();
        ensure!(recorded > 100 * 24, "{recorded} bytes recorded");
    }
    Ok(())
}

#[test]
fn b063_a_role_goes_on_when_nobody_reads_what_it_says_or_its_terminal_is_gone() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let report = lab.dir().join("unheard.json");
    let service = service(STREAM, lab.target().v4(), STREAM);
    let mut command = lab.online().command("nohup");
    command
        .arg(tool("replayer")?)
        .args(["online", "-x", &service, "-s", &lab.assistant().v4().to_string(), "-i", NIC, "--stats", "1"])
        .arg("--report")
        .arg(&report)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let pid = Pid::from_raw(child.id() as i32);
    let ended = (|| -> Result<_> {
        let mut lines = BufReader::new(child.stderr.take().context("no error output")?).lines();
        let ready = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("online ready")));
        ensure!(ready.is_some(), "it did not start");
        // The pipe breaks; then comes what a terminal sends when it goes.
        drop(lines);
        kill(pid, Signal::SIGHUP)?;
        let load = format!("--connect {}:{STREAM} --rate 50 --seconds 2.5", lab.online().v4());
        let summary = Load::run(&lab, "load", &load)?;
        assert!(summary.errors == 0 && summary.responses > 100, "{summary:?}");
        streams.ensure_equal(summary.responses as usize)?;
        ensure!(child.try_wait()?.is_none(), "it has ended");
        Ok(())
    })();
    kill(pid, if ended.is_ok() { Signal::SIGTERM } else { Signal::SIGKILL })?;
    let status = child.wait()?;
    ended?;
    ensure!(status.success(), "{status}");
    ensure!(std::fs::read_to_string(&report)?.contains("\"turns_sent\""), "no report");
    Ok(())
}

/// A role whose output goes into a pipe that nobody empties any more, as that of a log service that stands still.
struct Unheard {
    child: Child,
    _pipe: PipeReader,
}

impl Drop for Unheard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Unheard {
    /// From `ready` on it is not heard.
    fn start(mut command: Command, ready: &str) -> Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let this = Self { child: command.spawn()?, _pipe: reader.try_clone()? };
        // With it go this process's ends, so that the role's end is an end here too.
        drop(command);
        let mut said = BufReader::new(reader).lines().map_while(Result::ok);
        ensure!(said.any(|line| line.contains(ready)), "it has ended before it was ready");
        // Opened anew: how the role writes is not changed.
        let pipe = format!("/proc/{}/fd/2", this.child.id());
        let mut pipe = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(pipe)?;
        for piece in [4096, 1] {
            while pipe.write(&vec![b' '; piece]).is_ok() {}
        }
        Ok(this)
    }

    fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)?;
        wait_for("the end", Duration::from_secs(5), || !matches!(self.child.try_wait(), Ok(None)))?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}");
        Ok(())
    }
}

#[test]
fn b040_b063_a_reader_that_stands_still_keeps_no_role_from_working_or_stopping() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut command = lab.assistant().command(tool("replayer")?);
    // It says whose responses it takes before it takes them.
    command.args(["assistant", "-i", NIC, "--stats", "1"]);
    let assistant = Unheard::start(command, "assistant ready")?;
    let (report, service) = (lab.dir().join("unheard.json"), service(STREAM, lab.target().v4(), STREAM));
    let mut command = lab.online().command(tool("replayer")?);
    command.args([
        "online",
        "-x",
        &service,
        "-s",
        &lab.assistant().v4().to_string(),
        "-i",
        NIC,
        "--stats",
        "1",
    ]);
    command.args(["--stats-format", "json", "--report"]).arg(&report);
    let online = Unheard::start(command, "online ready")?;
    let load = format!("--connect {}:{STREAM} --rate 50 --seconds 4", lab.online().v4());
    let summary = Load::run(&lab, "load", &load)?;
    assert!(summary.errors == 0 && summary.responses > 100, "{summary:?}");
    streams.ensure_equal(summary.responses as usize)?;
    kill(Pid::from_raw(online.child.id() as i32), Signal::SIGHUP)?;
    let written = || std::fs::read_to_string(&report).is_ok_and(|text| text.contains("\"running\": true"));
    wait_for("a report", Duration::from_secs(5), written)?;
    online.stop()?;
    assistant.stop()?;
    let report: Report = serde_json::from_slice(&std::fs::read(&report)?)?;
    assert_eq!(report.counter("turns_sent"), summary.requests);
    Ok(())
}

#[test]
fn b066_figures_of_both_roles_for_prometheus() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let listen = ["--metrics", "127.0.0.1:9464"];
    let mut assistant = Role::assistant(&lab, lab.assistant(), &listen)?;
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let mut online = Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), &listen)?;
    let load = format!("--connect {}:{STREAM} --connections 5 --requests 100", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 100);
    streams.ensure_equal(100)?;
    let value = |host: &Host, sample: &str| -> Result<f64> {
        let url = "http://127.0.0.1:9464/metrics";
        let text = output_of(host.command("curl").args(["--silent", "--fail", "--max-time", "5", url]))?;
        let line = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(line.with_context(|| format!("no {sample} in\n{text}"))?.parse()?)
    };
    wait_for("a hundred turns", Duration::from_secs(3), || {
        value(lab.online(), "replayer_turns_sent_total").is_ok_and(|count| count == 100.0)
    })?;
    let copied = "replayer_kernel_packets_total{program=\"ring\",verdict=\"copied\"}";
    let captured = value(lab.online(), "replayer_packets_captured_total")?;
    assert!(captured >= 100.0 && value(lab.online(), copied)? >= captured);
    assert_eq!(value(lab.online(), "replayer_assistants_connected")?, 1.0);
    wait_for("the assistant's figures", Duration::from_secs(3), || {
        value(lab.assistant(), "replayer_assistant_frames_received_total").is_ok_and(|count| count >= 100.0)
    })?;
    assert_eq!(value(lab.assistant(), "replayer_assistant_workers")?, 1.0);

    // The same for a person who watches: each role from its host, while requests come.
    let load = format!("--connect {}:{STREAM} --connections 5 --rate 200 --seconds 12", lab.online().v4());
    let mut load = Load::start(&lab, lab.client(), "watched", &load)?;
    let top =
        |host: &Host| output_of(host.command(tool("replayer")?).args(["top", "--once", "127.0.0.1:9464"]));
    wait_for("requests of the load", Duration::from_secs(3), || {
        value(lab.online(), "replayer_turns_sent_total").is_ok_and(|count| count > 300.0)
    })?;
    let shown = |text: &str, what: &str| -> Result<f64> {
        let part = text.split([':', ',']).find(|part| part.trim_end().ends_with(what));
        let words = part.with_context(|| format!("no {what} in {text}"))?.split_whitespace();
        Ok(words.rev().nth(what.split(' ').count()).context("no value")?.parse()?)
    };
    // On a busy machine a second's load may come in the next one.
    let mut of_online = String::new();
    wait_for("a second with 200 requests, more or less", Duration::from_secs(8), || {
        of_online = top(lab.online()).unwrap_or_else(|error| error.to_string());
        shown(&of_online, "requests/s").is_ok_and(|rate| (150.0..250.0).contains(&rate))
    })
    .with_context(|| of_online.clone())?;
    assert_eq!(shown(&of_online, "sessions")?, 5.0, "{of_online}");
    assert!(of_online.starts_with("online at 127.0.0.1:9464") && of_online.contains("1 of 1 assistants"));
    let of_assistant = top(lab.assistant())?;
    assert!(shown(&of_assistant, "responses/s")? > 0.0, "{of_assistant}");
    assert!(of_assistant.starts_with("assistant at") && of_assistant.contains("1 workers"), "{of_assistant}");
    assert_eq!(load.finish()?.errors, 0);
    online.stop_online()?;
    assistant.stop::<serde_json::Value>()?;
    Ok(())
}

/// What a process has said, each line an object.
fn said_as_json(process: &Process) -> Result<Vec<Value>> {
    let text = process.errors();
    let parsed = |line: &str| serde_json::from_str::<Value>(line).with_context(|| line.to_owned());
    let lines: Vec<Value> = text.lines().map(parsed).collect::<Result<_>>()?;
    for line in &lines {
        for field in ["time", "level", "role", "message"] {
            ensure!(line[field].as_str().is_some_and(|it| !it.is_empty()), "no {field} in {line}");
        }
        let time = line["time"].as_str().unwrap_or_default();
        ensure!(time.len() == "2026-01-31T23:59:59.999Z".len() && time.ends_with('Z'), "{time}");
    }
    Ok(lines)
}

#[test]
fn b066_logs_are_one_json_object_a_line_when_asked_for() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let json = ["--log-format", "json"];
    let mut assistant = Role::assistant(&lab, lab.assistant(), &json)?;
    let services = service(STREAM, lab.target().v4(), STREAM);
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["online", "-x", &services, "-s", &lab.assistant().v4().to_string(), "-i", NIC]);
    let mut online = Process::start(command.args(["--stats", "1"]).args(json), "online", &lab.dir())?;
    online.wait_for_message("nothing was captured", Duration::from_secs(15))?;
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    streams.ensure_equal(10)?;
    let counted = |lines: &[Value]| {
        lines.iter().filter_map(|line| line["figures"]["turns_sent"].as_u64()).next_back() == Some(10)
    };
    wait_for("a line of figures", Duration::from_secs(5), || {
        said_as_json(&online).is_ok_and(|lines| counted(&lines))
    })?;
    ensure!(online.stop()?.success(), "{}", online.errors());
    let lines = said_as_json(&online)?;
    let about = |lines: &[Value], text: &str| {
        let has = |line: &&Value| line["message"].as_str().is_some_and(|message| message.contains(text));
        lines.iter().find(has).cloned().with_context(|| format!("nothing about \"{text}\": {lines:#?}"))
    };
    let warning = about(&lines, "nothing was captured")?;
    assert_eq!((&warning["level"], &warning["trouble"]), (&"warn".into(), &"nothing_captured".into()));
    let last = about(&lines, "replayed 10 requests")?;
    assert_eq!((&last["level"], &last["role"]), (&"info".into(), &"online".into()));
    assistant.stop::<Value>()?;
    let lines = said_as_json(&assistant.process)?;
    assert_eq!(about(&lines, "taking the responses of")?["role"], "assistant");
    about(&lines, "frames received")?;

    // What it ends with, too.
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["online", "-x", &services, "-s", &lab.assistant().v4().to_string(), "-i", "none0"]);
    let mut wrong = Process::start(command.args(json), "wrong", &lab.dir())?;
    ensure!(!wrong.wait(Duration::from_secs(10))?.success(), "it started at none0");
    assert_eq!(about(&said_as_json(&wrong)?, "none0")?["level"], "error");
    Ok(())
}

#[test]
fn b065_a_check_names_what_is_missing_and_replays_nothing() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let (target, assistant) = (lab.target().v4(), lab.assistant().v4());
    let check = |name: &str| -> Result<(bool, String)> {
        let service = service(STREAM, target, STREAM);
        let mut command = lab.online().command(tool("replayer")?);
        command.args(["check", "online", "-x", &service, "-s", &assistant.to_string(), "-i", NIC]);
        let mut process = Process::start(&mut command, name, &lab.dir())?;
        let status = process.wait(Duration::from_secs(10))?;
        Ok((status.success(), process.errors()))
    };
    let of_assistant = |name: &str, arguments: &[&str]| -> Result<(bool, String)> {
        let mut command = lab.assistant().command(tool("replayer")?);
        let mut process =
            Process::start(command.args(["check", "assistant"]).args(arguments), name, &lab.dir())?;
        let status = process.wait(Duration::from_secs(10))?;
        Ok((status.success(), process.errors()))
    };
    let (good, said) = of_assistant("nic", &["-i", NIC])?;
    assert!(good && said.contains("everything is there"), "{said}");
    let (good, said) = of_assistant("wrong-nic", &["-i", "none0"])?;
    assert!(!good && said.contains("no interface none0"), "{said}");
    let (good, said) = check("without-assistant")?;
    assert!(!good && said.contains("replayer assistant"), "{said}");
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let (good, said) = of_assistant("port", &["-i", NIC])?;
    assert!(!good && said.contains("36524"), "{said}");
    let (good, said) = check("without-server")?;
    assert!(!good && said.contains(&format!("nothing listens on {target}:{STREAM}")), "{said}");
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let tap = Watch::arriving(lab.target(), &[("syns", "tcp flags & (syn | ack) == syn")])?;
    let (good, said) = check("complete")?;
    assert!(good && said.contains("everything is there") && !said.contains("online ready"), "{said}");
    assert_eq!((tap.packets()?["syns"], streams.target.record()?.requests()), (1, 0));
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["check", "offline", "-f", "none.pcap", "-x", &service(STREAM, target, STREAM)]);
    let mut process = Process::start(command.args(["-s", &assistant.to_string()]), "offline", &lab.dir())?;
    let status = process.wait(Duration::from_secs(10))?;
    ensure!(!status.success() && process.errors().contains("none.pcap"), "{}", process.errors());
    Ok(())
}

#[test]
fn b055_the_key_may_come_from_the_environment_and_a_worker_without_it_is_refused() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let start = |host: &Host, name: &str, key: Option<&str>, arguments: &str| -> Result<Process> {
        let mut command = host.command(tool("replayer")?);
        command.args(arguments.split_whitespace()).envs(key.map(|key| ("REPLAYER_KEY", key)));
        Process::start(&mut command, name, &lab.dir())
    };
    let mut assistant = start(lab.assistant(), "assistant", Some("a key"), &format!("assistant -i {NIC}"))?;
    assistant.wait_for_message("ready", Duration::from_secs(10))?;
    ensure!(!assistant.errors().contains("without a key"), "{}", assistant.errors());
    let service = service(STREAM, lab.target().v4(), STREAM);
    let arguments = format!("online -x {service} -s {} -i {NIC}", lab.assistant().v4());
    for (name, key) in [("none", None), ("another", Some("a kez"))] {
        let mut refused = start(lab.online(), name, key, &arguments)?;
        let status = refused.wait(Duration::from_secs(10))?;
        ensure!(!status.success() && refused.errors().contains("key"), "{status}: {}", refused.errors());
    }
    // A variable that is empty is none: the file has the word.
    let file = lab.dir().join("key.toml");
    std::fs::write(&file, "[online]\nkey = 'a key'\n")?;
    let exposed = format!("chmod 600 {}", file.display());
    let arguments = format!("{arguments} --config {}", file.display());
    let start_with_mode = |mode: u32, name: &str| -> Result<Process> {
        std::fs::set_permissions(&file, Permissions::from_mode(mode))?;
        let mut online = start(lab.online(), name, Some(""), &arguments)?;
        online.wait_for_message("online ready", Duration::from_secs(10))?;
        Ok(online)
    };
    let mut careless = start_with_mode(0o640, "careless")?;
    ensure!(careless.errors().contains(&exposed), "{}", careless.errors());
    careless.stop()?;
    let online = start_with_mode(0o600, "online")?;
    ensure!(!online.errors().contains(&exposed), "{}", online.errors());
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    streams.ensure_equal(10)?;
    Ok(())
}

/// Strangers of every kind, while 400 requests a second are replayed: the assistant says of each why it was refused.
#[test]
fn b055_strangers_are_refused_with_a_reason_in_the_log_while_requests_are_replayed() -> Result<()> {
    const HELLO: u8 = 1;
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let mut assistant = Role::assistant(&lab, lab.assistant(), &["--key", "a key"])?;
    let channel = lab.assistant().v4();
    let mut online = Role::online(&lab, lab.online(), &services, channel.into(), &["--key", "a key"])?;
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --rate 400 --seconds 8 --body 1-3000 --response 1-3000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("requests at the target", Duration::from_secs(5), || {
        streams.target.record().is_ok_and(|record| record.requests() > 100)
    })?;

    let connect = || -> Result<TcpStream> {
        Ok(lab.client().namespace().enter(|| TcpStream::connect((channel, CHANNEL)))??)
    };
    let refused = |stranger: &TcpStream, reason: &str| {
        let line = format!("refused {}: {reason}", stranger.local_addr()?);
        wait_for(&line, Duration::from_secs(5), || assistant.process.errors().contains(&line))
    };
    let mut garbage = connect()?;
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n")?;
    refused(&garbage, "not the return channel's protocol")?;
    let mut newer = connect()?;
    newer.write_all(&[&[HELLO, 0, 10, 0][..], b"replayer", &u16::MAX.to_le_bytes()].concat())?;
    refused(&newer, "another version of the protocol")?;
    let half_open = connect()?;
    refused(&half_open, "no complete hello in time")?;
    // A hello of 30 bytes, four of them in a second.
    let mut slow = connect()?;
    for byte in [&[HELLO, 0, 30, 0][..], b"replayer"].concat() {
        // What comes after the refusal may find the connection closed.
        let _ = slow.write_all(&[byte]);
        std::thread::sleep(Duration::from_millis(250));
    }
    refused(&slow, "no complete hello in time")?;
    // A scan that leaves its connections open: the oldest make room.
    let scan = (0..100).map(|_| connect()).collect::<Result<Vec<_>>>()?;
    refused(&scan[0], "too many connections")?;
    drop(scan);
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["online", "-x", &services[0], "-s", &channel.to_string(), "-i", NIC, "--key", "a kez"]);
    let mut other_key = Process::start(&mut command, "other-key", &lab.dir())?;
    ensure!(!other_key.wait(Duration::from_secs(10))?.success(), "{}", other_key.errors());
    let said = assistant.process.errors();
    let of_the_key =
        |line: &str| line.contains(&format!("refused {}:", lab.online().v4())) && line.contains("wrong key");
    ensure!(said.lines().any(of_the_key), "{said}");

    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.responses), (0, summary.requests), "{summary:?}");
    let (_, target) = streams.ensure_equal(summary.requests as usize)?;
    assert_eq!(target.connections.len(), 20);
    online.stop_online()?;
    let report: Value = assistant.stop()?;
    assert_eq!(report["channel"]["records_dropped"], 0, "{report:#}");
    assert_eq!(report["channel"]["silent"], 0, "{report:#}");
    Ok(())
}
