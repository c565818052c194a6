//! Behaviour 63: what SIGHUP does to each role that runs, and to one whose terminal is gone.
//!
//! Root only; each test has a lab of its own.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use replayer_common::addr::Endpoint;
use replayer_common::hash::{FLOW_SEED, flow_hash, sample_threshold};
use replayer_tests::clients::{Load, Watch};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::pairs::StreamPair;
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::tool;
use replayer_tests::stream::{Connection, Record};
use replayer_tests::wait::wait_for;
use serde_json::Value;

const STREAM: u16 = 9000;
/// How long a role may take to do what a signal asks for.
const SOON: Duration = Duration::from_secs(5);

/// What is in a report now, whole.
fn report(path: &Path) -> Option<Value> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

fn requests(report: &Value) -> u64 {
    report["counters"]["turns_sent"].as_u64().unwrap_or_default()
}

#[test]
fn b063_sighup_has_the_reports_written_and_no_session_notices() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    let arguments = format!(
        "--connect {}:{STREAM} --connections 20 --rate 400 --seconds 5 --body 1-3000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &arguments)?;
    let (online, assistant) =
        (replay.online.report_path().to_owned(), replay.assistant.report_path().to_owned());
    let mut before = 0;
    for wanted in [100, 500, 900] {
        wait_for("further requests", SOON, || {
            streams.target.record().is_ok_and(|record| record.requests() >= wanted)
        })?;
        for (role, path) in [(&mut replay.online, &online), (&mut replay.assistant, &assistant)] {
            let _ = fs::remove_file(path);
            role.process.signal(Signal::SIGHUP)?;
            wait_for("a report", SOON, || report(path).is_some_and(|report| report["running"] == true))?;
        }
        let until_now = report(&online).context("no report")?;
        ensure!(requests(&until_now) > before, "not after {before}: {until_now:#}");
        before = requests(&until_now);
        ensure!(report(&assistant).is_some_and(|it| it["received"].as_u64() > Some(0)), "nothing received");
    }
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.unanswered), (0, 0), "{summary:?}");
    streams.ensure_equal(summary.requests as usize)?;
    let (last, _) = replay.stop()?;
    // No session was opened anew, and no channel.
    assert_eq!((last.counter("sessions_opened"), last.counter("turns_sent")), (20, summary.requests));
    let last = report(&online).context("no report")?;
    assert_eq!((&last["running"], &last["return_channels"][0]["connects"]), (&Value::Null, &1.into()));
    Ok(())
}

#[test]
fn b063_sighup_completes_the_file_of_a_recording_and_has_the_report_of_its_replay_written() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let prefix = lab.dir().join("recorded");
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["record", "-i", NIC, "-x", &STREAM.to_string(), "-w"]).arg(&prefix);
    let mut recording = Process::start(&mut command, "record", &lab.dir())?;
    recording.wait_for_message("record ready", SOON)?;
    let file =
        |number: u32, part: &str| PathBuf::from(format!("{}-{number:05}.pcapng{part}", prefix.display()));
    let load = |name: &str, requests: u32| -> Result<()> {
        let arguments = format!("--connect {}:{STREAM} --requests {requests} --rate 20", lab.online().v4());
        assert_eq!(Load::run(&lab, name, &arguments)?.responses, u64::from(requests));
        Ok(())
    };
    load("first", 10)?;
    // A signal before the first file holds something completes nothing; one packet of the load is enough.
    wait_for("the first file", SOON, || file(1, ".part").exists())?;
    recording.signal(Signal::SIGHUP)?;
    wait_for("the first file's end", SOON, || file(1, "").exists() && !file(1, ".part").exists())?;
    load("second", 20)?;
    wait_for("the second file", SOON, || file(2, ".part").exists())?;
    let status = recording.stop()?;
    ensure!(status.success() && file(2, "").exists(), "{status}: {}", recording.errors());
    let inspect = |files: &[PathBuf]| -> Result<Value> {
        let list: Vec<_> = files.iter().map(|file| file.display().to_string()).collect();
        let output =
            lab.online().command(tool("replayer")?).arg("inspect").args(list).arg("--json").output()?;
        serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let both = inspect(&[file(1, ""), file(2, "")])?;
    assert_eq!(both["services"][0]["requests"], 30, "{both:#}");

    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let written = lab.dir().join("offline.json");
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["offline", "--speed", "0.5", "-x", &service(STREAM, lab.target().v4(), STREAM)]);
    command.args(["-s", &lab.assistant().v4().to_string(), "-f"]).arg(file(1, ""));
    command.arg("-f").arg(file(2, "")).arg("--report").arg(&written);
    let mut offline = Process::start(&mut command, "offline", &lab.dir())?;
    wait_for("the first request", SOON, || streams.target.record().is_ok_and(|it| it.requests() > 0))?;
    offline.signal(Signal::SIGHUP)?;
    wait_for("a report", SOON, || report(&written).is_some_and(|it| it["running"] == true))?;
    let status = offline.wait(Duration::from_secs(20))?;
    ensure!(status.success(), "{status}: {}", offline.errors());
    streams.ensure_equal(30)?;
    let last = report(&written).context("no report")?;
    assert_eq!((&last["role"], requests(&last), &last["running"]), (&"offline".into(), 30, &Value::Null));
    Ok(())
}

#[test]
fn b063_sighup_gives_a_recording_the_limits_that_its_file_has_now() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _streams = StreamPair::start(&lab, STREAM)?;
    let (file, prefix) = (lab.dir().join("replayer.toml"), lab.dir().join("recorded"));
    let write = |limits: &str| {
        let text = format!(
            "[record]\nservice = {STREAM}\ninterface = '{NIC}'\nwrite = '{}'\n{limits}\n",
            prefix.display()
        );
        fs::write(&file, text)
    };
    write("")?;
    let mut command = lab.online().command(tool("replayer")?);
    let mut recording =
        Process::start(command.args(["record", "--config"]).arg(&file), "record", &lab.dir())?;
    recording.wait_for_message("record ready", SOON)?;
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    write("files = 0")?;
    recording.signal(Signal::SIGHUP)?;
    recording.wait_for_message("keep at least 1; everything stays as it is", SOON)?;
    ensure!(recording.ended()?.is_none(), "{}", recording.tail());
    // It has as many already, and ends by itself.
    write("packets = 5")?;
    recording.signal(Signal::SIGHUP)?;
    let status = recording.wait(SOON)?;
    ensure!(
        status.success() && recording.errors().contains("says: packets"),
        "{status}: {}",
        recording.tail()
    );
    Ok(())
}

/// A configuration file for both roles. The online role has `of_online` in it, and the key that both have.
fn write_file(lab: &Lab, key: &str, of_online: &str) -> Result<PathBuf> {
    let path = lab.dir().join("replayer.toml");
    let service = service(STREAM, lab.target().v4(), STREAM);
    let text = format!(
        "[assistant]\ninterface = '{NIC}'\nkey = '{key}'\n[online]\ninterface = '{NIC}'\nkey = '{key}'\nservice = '{service}'\n\
         stats = 1\nstats-format = 'json'\n{of_online}"
    );
    fs::write(&path, text)?;
    Ok(path)
}

/// Two assistants, an online role that names the first of them in the file that all three have, and 400 requests/s that are replayed.
struct Replayed {
    streams: StreamPair,
    assistants: [Role; 2],
    online: Role,
    load: Load,
}

impl Replayed {
    fn through_the_first(lab: &Lab, hosts: [&Host; 2], key: &str) -> Result<Replayed> {
        let streams = StreamPair::start(lab, STREAM)?;
        let file = write_file(lab, key, &format!("assistant = '{}'", hosts[0].v4()))?;
        let [first, second] = hosts.map(|host| Role::configured(lab, host, "assistant", &file));
        let assistants = [first?, second?];
        let online = Role::configured(lab, lab.online(), "online", &file)?;
        let load = format!(
            "--connect {}:{STREAM} --connections 20 --rate 400 --seconds 6 --body 1-3000",
            lab.online().v4()
        );
        let load = Load::start(lab, lab.client(), "load", &load)?;
        Ok(Replayed { streams, assistants, online, load })
    }
}

/// Waits until the target has got so many requests.
fn arrived(streams: &mut StreamPair, wanted: usize) -> Result<()> {
    wait_for("further requests", SOON, || {
        streams.target.record().is_ok_and(|record| record.requests() >= wanted)
    })
}

#[test]
fn b063_sighup_takes_over_other_assistants_and_a_key_and_no_session_notices() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let hosts = [lab.assistant(), lab.host("assistant2")];
    let [first, second] = hosts.map(Host::v4);
    let Replayed { mut streams, assistants: [mut old, mut new], mut online, mut load } =
        Replayed::through_the_first(&lab, hosts, "one")?;
    let mut requests = |wanted: usize| arrived(&mut streams, wanted);
    requests(100)?;

    // The second one can be reached with the new key only.
    write_file(&lab, "two", &format!("assistant = ['{first}', '{second}']\nmax-sessions = 5000"))?;
    for assistant in [&mut old, &mut new] {
        assistant.process.signal(Signal::SIGHUP)?;
        assistant.process.wait_for_message("replayer.toml says: key", SOON)?;
    }
    online.process.signal(Signal::SIGHUP)?;
    online.process.wait_for_message(&format!("connected to the assistant at {second}:"), SOON)?;
    online.process.wait_for_message("replayer.toml says: assistant, key", SOON)?;
    online.process.wait_for_message("needs a restart: max-sessions", SOON)?;
    requests(500)?;

    lab.route_through(lab.target(), "172.28.1.0/24", hosts[1])?;
    write_file(&lab, "two", &format!("assistant = '{second}'"))?;
    online.process.signal(Signal::SIGHUP)?;
    online.process.wait_for_message(&format!("the assistant at {first}:"), SOON)?;
    old.process.kill()?;
    requests(1000)?;

    // A mistake, and an assistant that is not there.
    for (text, says) in [
        ("sampel = 3", "there is sample"),
        ("assistant = '172.28.0.250:7'", "cannot reach the assistant at 172.28.0.250:7"),
    ] {
        write_file(&lab, "two", text)?;
        online.process.signal(Signal::SIGHUP)?;
        online.process.wait_for_message(says, SOON)?;
    }
    ensure!(
        online.process.errors().matches("everything stays as it is").count() == 2,
        "{}",
        online.process.tail()
    );

    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.unanswered), (0, 0), "{summary:?}");
    streams.ensure_equal(summary.requests as usize)?;
    let report = online.stop_online()?;
    assert_eq!((report.counter("sessions_opened"), report.counter("turns_sent")), (20, summary.requests));
    new.stop::<Value>()?;
    Ok(())
}

#[test]
fn b044_b063_sighup_changes_the_sample_of_a_running_role() -> Result<()> {
    const CONNECTIONS: u64 = 40;
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let write = |percent: u32| {
        write_file(&lab, "", &format!("assistant = '{}'\nsample = {percent}", lab.assistant().v4()))
    };
    let file = write(100)?;
    let _assistant = Role::configured(&lab, lab.assistant(), "assistant", &file)?;
    let mut online = Role::configured(&lab, lab.online(), "online", &file)?;
    let load = format!(
        "--connect {}:{STREAM} --connections {CONNECTIONS} --rate 400 --seconds 15 --body 1-3000",
        lab.online().v4()
    );
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    let live = |online: &Role| online.stats().map(|stats| stats.sessions_live);
    wait_for("all sessions", SOON, || live(&online) == Some(CONNECTIONS))?;

    write(20)?;
    online.process.signal(Signal::SIGHUP)?;
    online.process.wait_for_message("replayer.toml says: sample", SOON)?;
    let after = online.stats().context("no figures")?.t;
    // By then every session outside has been closed, and nothing of it came again.
    wait_for("three seconds", SOON, || online.stats().is_some_and(|stats| stats.t > after + 3.0))?;
    let kept = live(&online).context("no figures")?;

    write(100)?;
    online.process.signal(Signal::SIGHUP)?;
    wait_for("all sessions again", SOON, || live(&online) == Some(CONNECTIONS))?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.unanswered), (0, 0), "{summary:?}");
    let in_sample = |local: &str| -> Result<bool> {
        let local = Endpoint::from(local.parse::<SocketAddr>()?);
        Ok(u64::from(flow_hash(FLOW_SEED, &local.ip, local.port)) < sample_threshold(20.0))
    };
    let mut whole = Vec::new();
    for connection in &summary.connections {
        if in_sample(&connection.local)? {
            whole.push(connection.local.clone());
        }
    }
    assert_eq!(kept, whole.len() as u64, "sessions of a sample of 20 %");
    let report = online.stop_online()?;
    // Each of the others was closed and joined again.
    assert_eq!(report.counter("sessions_opened"), 2 * CONNECTIONS - kept, "{:?}", report.counters);
    let (at_online, at_target) = (streams.online.record()?, streams.target.record()?);
    let of = |record: &Record, local: &String| {
        let ids = |connection: &Connection| (connection.peer == *local).then(|| connection.ids.clone());
        record.connections.iter().filter_map(ids).collect::<Vec<_>>()
    };
    for local in &whole {
        assert_eq!(of(&at_online, local), of(&at_target, local), "{local}");
    }
    assert!(at_target.connections.iter().all(|it| it.at_boundary && it.mismatch.is_none()), "{at_target:?}");
    Ok(())
}

#[test]
fn b063_sighup_has_the_assistants_names_looked_up_again() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let hosts = [lab.assistant(), lab.host("assistant2")];
    let [mut old, _new] = [Role::assistant(&lab, hosts[0], &[])?, Role::assistant(&lab, hosts[1], &[])?];
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let names = lab.dir().join("hosts");
    fs::write(&names, format!("{} moving.test\n", hosts[0].v4()))?;
    // In a mount namespace of its own it has a file of names of its own.
    let mut command = lab.online().command("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]).arg(&names);
    command.arg(tool("replayer")?).args(["online", "-i", NIC, "-s", "moving.test"]);
    command.args(["-x", &service(STREAM, lab.target().v4(), STREAM)]);
    let mut online = Process::start(&mut command, "online", &lab.dir())?;
    online.wait_for_message("online ready", SOON)?;
    let load = |name: &str, first: u64| -> Result<()> {
        let arguments = format!(
            "--connect {}:{STREAM} --connections 5 --requests 50 --first-id {first}",
            lab.online().v4()
        );
        assert_eq!(Load::run(&lab, name, &arguments)?.responses, 50);
        Ok(())
    };
    load("first", 1)?;
    streams.ensure_equal(50)?;

    lab.route_through(lab.target(), "172.28.1.0/24", hosts[1])?;
    fs::write(&names, format!("{} moving.test\n", hosts[1].v4()))?;
    online.signal(Signal::SIGHUP)?;
    online.wait_for_message(&format!("connected to the assistant at {}:", hosts[1].v4()), SOON)?;
    old.process.kill()?;
    load("second", 1001)?;
    streams.ensure_equal(100)?;
    // A name that is gone leaves the channels as they are.
    fs::write(&names, "")?;
    online.signal(Signal::SIGHUP)?;
    online.wait_for_message("everything stays as it is", Duration::from_secs(30))?;
    load("third", 2001)?;
    streams.ensure_equal(150)?;
    ensure!(online.stop()?.success(), "{}", online.tail());
    Ok(())
}

/// A name server that never answers: a look-up takes ten seconds and more.
#[test]
fn b040_b063_while_names_are_looked_up_the_figures_go_on_and_a_stop_is_prompt() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let server = lab.host("assistant2");
    let asked = Watch::arriving(server, &[("questions", "udp dport 53")])?;
    server.namespace().nft(
        "table inet silence { chain in { type filter hook input priority 0;\nudp dport 53 drop\n}\n}\n",
    )?;
    let (names, resolver) = (lab.dir().join("hosts"), lab.dir().join("resolv.conf"));
    fs::write(&names, format!("{} moving.test\n", lab.assistant().v4()))?;
    fs::write(&resolver, format!("nameserver {}\n", server.v4()))?;
    let mut command = lab.online().command("unshare");
    let own_files =
        "mount --bind \"$0\" /etc/hosts && mount --bind \"$1\" /etc/resolv.conf && shift && exec \"$@\"";
    command.args(["--mount", "sh", "-c", own_files]).arg(&names).arg(&resolver);
    let written = lab.dir().join("online.json");
    command.arg(tool("replayer")?).args(["online", "-i", NIC, "-s", "moving.test", "--stats", "1"]);
    command.args(["-x", &service(STREAM, lab.target().v4(), STREAM), "--report"]).arg(&written);
    let mut online = Process::start(&mut command, "online", &lab.dir())?;
    online.wait_for_message("online ready", SOON)?;
    let load = format!("--connect {}:{STREAM} --connections 20 --rate 400 --seconds 60", lab.online().v4());
    let mut load = Load::start(&lab, lab.client(), "load", &load)?;
    wait_for("requests", SOON, || streams.target.record().is_ok_and(|record| record.requests() > 100))?;

    fs::write(&names, "")?;
    for _ in 0..3 {
        online.signal(Signal::SIGHUP)?;
    }
    wait_for("a question", SOON, || asked.packets().is_ok_and(|packets| packets["questions"] > 0))?;
    let lines = |online: &Process| online.errors().matches(" requests/s").count();
    let before = lines(&online);
    wait_for("three lines of figures", SOON, || lines(&online) >= before + 3)?;
    online.signal(Signal::SIGTERM)?;
    let status = online.wait(Duration::from_secs(3))?;
    ensure!(status.success() && !online.errors().contains("stays as it is"), "{status}: {}", online.tail());
    let last = report(&written).context("no report")?;
    ensure!(last["running"].is_null() && requests(&last) > 100, "{last:#}");
    load.process.kill()?;
    Ok(())
}

#[test]
fn b063_before_anything_is_attached_a_stop_waits_for_nothing() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let silent = lab.host("assistant2");
    let asked = Watch::arriving(silent, &[("syns", "tcp flags & (syn | ack) == syn")])?;
    silent.namespace().nft(
        "table inet silence { chain in { type filter hook input priority 0;\ntcp dport 36524 drop\n}\n}\n",
    )?;
    let capture = lab.dir().join("nothing.pcap");
    fs::write(&capture, "")?;
    let started = |number: u64, role: &str| -> Result<Process> {
        let mut command = lab.online().command(tool("replayer")?);
        command.args(role.split(' ')).args(["-s", &silent.v4().to_string()]);
        command.args(["-x", &service(STREAM, lab.target().v4(), STREAM)]);
        if role.contains("offline") {
            command.arg("-f").arg(&capture);
        }
        let role = Process::start(&mut command, "role", &lab.dir())?;
        wait_for("a SYN", SOON, || asked.packets().is_ok_and(|packets| packets["syns"] >= number))?;
        Ok(role)
    };
    for (number, role) in (1..).zip(["online", "check online", "offline"]) {
        let mut process = started(number, role)?;
        process.signal(Signal::SIGTERM)?;
        let status = process.wait(Duration::from_secs(1))?;
        // It did nothing: that is no success, least of all of a check.
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{role}: {}", process.tail());
    }
    Ok(())
}

/// Whoever moves the target's route has some time for it, before or after.
#[test]
fn b063_after_sighup_responses_that_come_through_a_former_assistant_still_count() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let hosts = [lab.assistant(), lab.host("assistant2")];
    let second = hosts[1].v4();
    let Replayed { mut streams, assistants: [mut old, mut new], mut online, mut load } =
        Replayed::through_the_first(&lab, hosts, "")?;
    let mut requests = |wanted: usize| arrived(&mut streams, wanted);
    requests(100)?;
    let file = write_file(&lab, "", &format!("assistant = '{second}'"))?;
    // Figures for people tell of assistants that are away.
    fs::write(&file, fs::read_to_string(&file)?.replace("stats-format = 'json'\n", ""))?;
    online.process.signal(Signal::SIGHUP)?;
    online.process.wait_for_message("replayer.toml says: assistant", SOON)?;
    requests(1000)?;
    lab.route_through(lab.target(), "172.28.1.0/24", hosts[1])?;
    let summary = load.finish()?;
    assert_eq!((summary.errors, summary.unanswered), (0, 0), "{summary:?}");
    streams.ensure_equal(summary.requests as usize)?;
    // It is not missed.
    old.stop::<Value>()?;
    let lines = |online: &Role| online.process.errors().matches(" requests/s").count();
    let before = lines(&online);
    wait_for("three lines of figures", SOON, || lines(&online) >= before + 3)?;
    ensure!(!online.process.errors().contains("unreachable"), "{}", online.process.tail());
    let report = online.stop_online()?;
    // Each went when the one before was answered, and none for it had waited long enough.
    let counted = ["sessions_opened", "turns_sent", "turns_released_by_hold_limit"];
    assert_eq!(counted.map(|name| report.counter(name)), [20, summary.requests, 0]);
    new.stop::<Value>()?;
    Ok(())
}

#[test]
fn b063_the_first_line_of_figures_after_sighup_is_of_the_time_since() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let file = lab.dir().join("replayer.toml");
    let service = service(STREAM, lab.target().v4(), STREAM);
    let write = |more: &str| {
        let assistant = lab.assistant().v4();
        fs::write(&file, format!("[online]\nservice = '{service}'\nassistant = '{assistant}'\n{more}"))
    };
    write("")?;
    let mut command = lab.online().command(tool("replayer")?);
    let written = lab.dir().join("online.json");
    command.args(["online", "-i", NIC, "--report"]).arg(&written).arg("--config").arg(&file);
    let mut online = Process::start(&mut command, "online", &lab.dir())?;
    online.wait_for_message("online ready", SOON)?;
    let load = format!("--connect {}:{STREAM} --requests 200", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 200);
    streams.ensure_equal(200)?;
    // A worker makes its figures known a little later.
    let pid = online.pid();
    wait_for("the figures of all requests", SOON, || {
        let asked = kill(pid, Signal::SIGHUP).is_ok();
        asked && report(&written).is_some_and(|it| requests(&it) == 200)
    })?;
    write("stats = 1")?;
    online.signal(Signal::SIGHUP)?;
    online.wait_for_message("requests/s", SOON)?;
    let said = online.errors();
    let line = said.lines().find(|line| line.contains(" requests/s")).context("no line")?;
    let rate = line.split(" requests/s").next().and_then(|before| before.split_whitespace().last());
    assert_eq!(rate, Some("0"), "{line}");
    ensure!(online.stop()?.success(), "{}", online.tail());
    Ok(())
}

/// It has given up root's rights by then, which a person may not think of.
#[test]
fn b063_b067_an_assistant_that_may_not_read_its_file_again_says_so_and_how_it_may() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let file = lab.dir().join("assistant.toml");
    fs::write(&file, format!("[assistant]\ninterface = '{NIC}'\n"))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    chown(&file, Some(65_534), Some(65_534))?;
    let mut command = lab.assistant().command(tool("replayer")?);
    let mut assistant =
        Process::start(command.args(["assistant", "--config"]).arg(&file), "assistant", &lab.dir())?;
    let remedy = format!("`chown 0 {}`", file.display());
    assistant.wait_for_message("assistant ready", SOON)?;
    // Told before it is needed, too.
    assistant.wait_for_message("SIGHUP will not", SOON)?;
    ensure!(assistant.errors().contains(&remedy), "{}", assistant.tail());
    assistant.signal(Signal::SIGHUP)?;
    assistant.wait_for_message("everything stays as it is", SOON)?;
    assert_eq!(assistant.errors().matches(&remedy).count(), 2, "{}", assistant.tail());
    chown(&file, Some(0), None)?;
    assistant.signal(Signal::SIGHUP)?;
    assistant.wait_for_message("says what it said before", SOON)?;
    // So with the report.
    let report = lab.dir().join("assistant.json");
    fs::write(&report, "")?;
    chown(&report, Some(65_534), None)?;
    fs::write(&file, format!("[assistant]\ninterface = '{NIC}'\nreport = '{}'\n", report.display()))?;
    assistant.signal(Signal::SIGHUP)?;
    assistant.wait_for_message(&format!("`chown 0 {}`", report.display()), SOON)?;
    ensure!(assistant.stop()?.success(), "{}", assistant.tail());
    Ok(())
}

/// A role in a terminal of its own, in which nobody types.
struct Typed {
    terminal: Process,
    role: Pid,
    report: PathBuf,
    errors: PathBuf,
}

impl Drop for Typed {
    fn drop(&mut self) {
        // It leads a session of its own, which its terminal's end may not have ended.
        let _ = kill(self.role, Signal::SIGKILL);
    }
}

impl Typed {
    fn start(lab: &Lab) -> Result<Typed> {
        let (report, errors) = (lab.dir().join("typed.json"), lab.dir().join("typed.err"));
        let line = format!(
            "exec {} online -x {} -s {} -i {NIC} --report {} 2>{}",
            tool("replayer")?.display(),
            service(STREAM, lab.target().v4(), STREAM),
            lab.assistant().v4(),
            report.display(),
            errors.display()
        );
        let mut command = lab.online().command("script");
        // As its session's leader, for which the shell makes room.
        let mut terminal = Process::start(
            command.args(["--quiet", "--command", &line, "/dev/null"]).env("SHELL", "/bin/sh"),
            "terminal",
            &lab.dir(),
        )?;
        wait_for("the role in its terminal", SOON, || {
            fs::read_to_string(&errors).is_ok_and(|said| said.contains("online ready"))
        })
        .with_context(|| fs::read_to_string(&errors).unwrap_or_default() + &terminal.tail())?;
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", terminal.pid()))?;
        let role = children.split_whitespace().next().context("script has no child")?.parse()?;
        ensure!(terminal.ended()?.is_none(), "{}", terminal.tail());
        Ok(Typed { terminal, role: Pid::from_raw(role), report, errors })
    }
}

#[test]
fn b063_sighup_ends_a_role_whose_terminal_is_gone_and_no_other() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let mut typed = Typed::start(&lab)?;
    let load = format!("--connect {}:{STREAM} --requests 10", lab.online().v4());
    assert_eq!(Load::run(&lab, "load", &load)?.responses, 10);
    streams.ensure_equal(10)?;
    // Twice: unlike with SIGTERM, the second does not end it at once either.
    for _ in 0..2 {
        kill(typed.role, Signal::SIGHUP)?;
        wait_for("a report", SOON, || report(&typed.report).is_some_and(|it| it["running"] == true))?;
        fs::remove_file(&typed.report)?;
    }
    // What holds the other end of the terminal goes, and the terminal with it.
    typed.terminal.kill()?;
    wait_for("the final report", SOON, || report(&typed.report).is_some_and(|it| requests(&it) == 10))
        .with_context(|| fs::read_to_string(&typed.errors).unwrap_or_default())?;
    let last = report(&typed.report).context("no report")?;
    ensure!(last["running"].is_null() && last["accounting"].is_array(), "{last:#}");
    wait_for("the role's end", SOON, || kill(typed.role, None).is_err())?;
    Ok(())
}
