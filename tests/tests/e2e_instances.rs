//! Behaviours 6, 7, 43 and 45: several online hosts, assistants, instances and targets.
//!
//! Root only; each test has a lab of its own.

use std::net::IpAddr;
use std::process::Command;

use anyhow::{Context, Result};
use replayer_tests::clients::{Load, output_of};
use replayer_tests::lab::{Host, Lab, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::ARRIVAL;
use replayer_tests::replay::{Replay, Report, Role, service};
use replayer_tests::servers::StreamServer;
use replayer_tests::stream::{self, Record};
use serde_json::Value;

const STREAM: u16 = 9000;
const OTHER_STREAM: u16 = 9001;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

/// A load from a client to a server, whose ids begin at `first_id`.
fn load(server: IpAddr, port: u16, first_id: u64) -> String {
    format!(
        "--connect {server}:{port} --connections 40 --per-connection 50 --requests 2000 --rate 2000 --body 1-5000 \
         --response 1-5000 --first-id {first_id}"
    )
}

/// No record of the target's answers was for a session that is not there, and no identity was taken from somebody else.
fn assert_no_stray_records(reports: &[&Report], assistant: &Value) {
    for report in reports {
        assert_eq!(report.counter("responses_unknown"), 0, "{:?}", report.counters);
        assert!(report.counter("responses_received") > 1000, "{:?}", report.counters);
    }
    assert_eq!(assistant["routing"]["conflicts"], 0, "{assistant}");
    assert_eq!(assistant["channel"]["records_dropped"], 0, "{assistant}");
}

/// All connections of several records.
fn together(records: Vec<Record>) -> Record {
    Record { connections: records.into_iter().flat_map(|record| record.connections).collect() }
}

#[test]
fn b006_two_online_hosts_share_a_target_and_an_assistant() -> Result<()> {
    let lab = Lab::up(Plan { clients: 2, onlines: 2, ..Plan::default() })?;
    let onlines = [lab.online(), lab.host("online2")];
    let clients = [lab.client(), lab.host("client2")];
    let mut servers = onlines.map(|host| StreamServer::start(&lab, host, STREAM, &[]));
    let mut target = StreamServer::start(&lab, lab.target(), STREAM, &[])?;
    let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let channel = lab.assistant().v4().into();
    let mut roles = onlines.map(|host| Role::online(&lab, host, &services, channel, &[]));

    let loads = [0, 1].map(|at: usize| {
        // Both use the same ports: what tells their sessions apart is the address alone.
        let load = load(onlines[at].v4().into(), STREAM, 1 + 10_000 * at as u64) + " --source-port 20000";
        Load::start(&lab, clients[at], "load", &load)
    });
    for load in loads {
        assert_all_answered(&load?.finish()?, 2000);
    }
    let at_target = target.record_of(4000, ARRIVAL)?;
    let mut at_onlines = Vec::new();
    for server in &mut servers {
        at_onlines.push(server.as_mut().ok().context("an online server")?.record()?);
    }
    let comparison = stream::compare(&together(at_onlines), &at_target);
    assert!(comparison.differences.is_empty(), "{comparison:#?}");
    assert_eq!(at_target.requests(), 4000);

    let mut reports = Vec::new();
    for role in &mut roles {
        reports.push(role.as_mut().ok().context("an online role")?.stop_online()?);
    }
    for report in &reports {
        assert_eq!(report.counter("sessions_opened"), 40, "{:?}", report.counters);
    }
    assert_no_stray_records(&reports.iter().collect::<Vec<_>>(), &assistant.stop()?);
    Ok(())
}

#[test]
fn b007_two_assistants_split_the_return_traffic() -> Result<()> {
    let lab = Lab::up(Plan { assistants: 2, ..Plan::default() })?;
    let hosts = [lab.assistant(), lab.host("assistant2")];
    let mut servers = [lab.online(), lab.target()].map(|host| StreamServer::start(&lab, host, STREAM, &[]));
    // Half of the connections' answers go to each.
    lab.target().namespace().set_sysctl("ipv4/fib_multipath_hash_policy", "1")?;
    let [first, second] = hosts.map(Host::v4);
    lab.target().namespace().ip(&format!(
        "route replace 172.28.1.0/24 nexthop via {first} dev eth0 weight 1 nexthop via {second} dev eth0 weight 1\n"
    ))?;
    let mut assistants = hosts.map(|host| Role::assistant(&lab, host, &[]));
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    let channels = hosts.map(|host| host.v4().into());
    let mut online = Role::online_with(&lab, lab.online(), &services, &channels, &[])?;

    assert_all_answered(&Load::run(&lab, "load", &load(lab.online().v4().into(), STREAM, 1))?, 2000);
    let [at_online, at_target] = servers
        .each_mut()
        .map(|server| server.as_mut().ok().context("a server")?.ended_record_of(2000, ARRIVAL));
    let comparison = stream::compare(&at_online?, &at_target?);
    assert!(comparison.differences.is_empty(), "{comparison:#?}");
    assert_eq!(comparison.compared, 40);

    let report = online.stop_online()?;
    assert_eq!(report.counter("sessions_completed"), 40, "{:?}", report.counters);
    for assistant in &mut assistants {
        let report: Value = assistant.as_mut().ok().context("an assistant")?.stop()?;
        let returned = report["channel"]["records_sent"].as_u64().context("records_sent")?;
        assert!(returned > 500, "{report}");
    }
    Ok(())
}

#[test]
fn b043_two_instances_on_one_host_with_disjoint_pools() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    // Each instance transmits on a queue of its own.
    output_of(lab.online().command("ethtool").args(["-L", "eth0", "tx", "2"]))?;
    let mut servers = [
        StreamServer::start(&lab, lab.online(), STREAM, &[])?,
        StreamServer::start(&lab, lab.online(), OTHER_STREAM, &[])?,
    ];
    let mut target = StreamServer::start(&lab, lab.target(), STREAM, &[])?;
    let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let instance = |port, pool| {
        let services = [service(port, lab.target().v4(), STREAM)];
        Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), &["-c", pool])
    };
    let mut roles = [instance(STREAM, "172.29.1.1")?, instance(OTHER_STREAM, "172.29.2.1")?];

    let online = lab.online().v4().into();
    let mut first = Load::start(&lab, lab.client(), "first", &load(online, STREAM, 1))?;
    let second = Load::run(&lab, "second", &load(online, OTHER_STREAM, 10_001))?;
    assert_all_answered(&first.finish()?, 2000);
    assert_all_answered(&second, 2000);
    let at_target = target.record_of(4000, ARRIVAL)?;
    for (server, pool) in servers.iter_mut().zip(["172.29.1.1:", "172.29.2.1:"]) {
        let of_pool = at_target.connections.iter().filter(|it| it.peer.starts_with(pool)).cloned().collect();
        let comparison = stream::compare_copies(&server.record()?, &Record { connections: of_pool }, 1);
        assert!(comparison.differences.is_empty(), "{pool} {comparison:#?}");
        assert_eq!(comparison.compared, 40);
    }
    assert_eq!(at_target.connections.len(), 80);

    let reports = [roles[0].stop_online()?, roles[1].stop_online()?];
    assert_no_stray_records(&[&reports[0], &reports[1]], &assistant.stop()?);
    Ok(())
}

#[test]
fn b043_a_second_instance_without_a_queue_says_what_it_needs() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let services = [service(OTHER_STREAM, lab.target().v4(), STREAM)];
    let refused = Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), &[]);
    let message = format!("{:#}", refused.err().context("a second instance started on the only queue")?);
    assert!(message.contains("in use") && message.contains("ethtool -L eth0 tx 2"), "{message}");
    // What the message says is enough.
    let remedy = message.split('`').find(|text| text.starts_with("ethtool")).context("a command")?;
    let words: Vec<&str> = remedy.split(' ').collect();
    let mut command: Command = lab.online().command(words[0]);
    output_of(command.args(&words[1..]))?;
    Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), &[])?.stop_online()?;
    replay.stop()?;
    Ok(())
}

#[test]
fn b045_one_service_is_copied_to_two_targets() -> Result<()> {
    let lab = Lab::up(Plan { targets: 2, ..Plan::default() })?;
    let targets = [lab.target(), lab.host("target2")];
    let mut online = StreamServer::start(&lab, lab.online(), STREAM, &[])?;
    // The second answers so late that the first is never at the same turn.
    let mut servers = [
        StreamServer::start(&lab, targets[0], STREAM, &[])?,
        StreamServer::start(&lab, targets[1], STREAM, &["--delay-ms", "30"])?,
    ];
    let services = targets.map(|target| service(STREAM, target.v4(), STREAM));
    let replay = Replay::start_services(&lab, &services, lab.assistant().v4().into(), &[])?;
    assert_all_answered(&Load::run(&lab, "load", &load(lab.online().v4().into(), STREAM, 1))?, 2000);
    let expected = online.record()?;
    for server in &mut servers {
        let comparison = stream::compare(&expected, &server.ended_record_of(2000, ARRIVAL)?);
        assert!(comparison.differences.is_empty(), "{comparison:#?}");
        assert_eq!(comparison.compared, 40);
    }
    let (report, assistant) = replay.stop()?;
    assert_eq!(report.counter("sessions_completed"), 80, "{:?}", report.counters);
    assert_no_stray_records(&[&report], &assistant);
    Ok(())
}
