//! Behaviour 63: what SIGHUP does to each role that runs, and to one whose terminal is gone.
//!
//! Root only; each test has a lab of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use replayer_tests::clients::Load;
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::pairs::StreamPair;
use replayer_tests::process::Process;
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::tool;
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
