//! `--clients` and `--exclude-clients`: whose requests are replayed, in every way to capture, and what is counted of the others.
//!
//! Root only; each test has labs of its own. UDP is in `e2e_udp.rs`, files are in `replayer/tests/offline.rs`.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use replayer_tests::capture_ways::WAYS;
use replayer_tests::clients::{Load, Watch, output_of};
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::ledger::Ledger;
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::servers::{start, tool};
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::wait_for;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;
/// Clients 1 to 3 are in the network that is chosen, 2 is excluded again, and 4 is in none.
const CHOSEN: &str = "172.28.1.0/30,fd00:28:0:1::/126";
const EXCLUDED: &str = "172.28.1.2,fd00:28:0:1::2";

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

fn four_clients() -> Plan {
    Plan { client_addresses: 4, offloads: false, ..Plan::default() }
}

/// So many requests over IPv4 and as many over IPv6, of four clients each that take turns, two requests a connection.
fn load_of_all(lab: &Lab, requests: u64) -> Result<()> {
    let client = lab.client();
    for (name, server) in [("v4", IpAddr::from(lab.online().v4())), ("v6", lab.online().v6().into())] {
        let source = |at: u8| match server {
            IpAddr::V4(_) => client.client_v4(at).to_string(),
            IpAddr::V6(_) => client.client_v6(at).to_string(),
        };
        let sources = (0..4).map(source).collect::<Vec<_>>().join(",");
        let load = format!(
            "--connect {} --source {sources} --protocol http --expect-server online --connections 8 \
             --per-connection 2 --requests {requests} --rate 1000",
            SocketAddr::new(server, HTTP)
        );
        assert_all_answered(&Load::run(lab, name, &load)?, requests);
    }
    Ok(())
}

/// The requests of those who were chosen, by client and URI.
fn of_chosen(ledger: &Ledger) -> BTreeSet<(String, u16, String)> {
    let chosen = ["172.28.1.1", "172.28.1.3", "fd00:28:0:1::1", "fd00:28:0:1::3"];
    let entries = ledger.entries.iter().filter(|entry| chosen.contains(&&entry.address[..]));
    entries.map(|entry| (entry.address.clone(), entry.port, entry.uri.clone())).collect()
}

#[test]
fn in_every_way_chosen_clients_are_replayed_and_packets_of_others_are_counted() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(four_clients(), 1)?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let arriving = Watch::arriving(
            lab.online(),
            &[
                ("to_service", &format!("tcp dport {HTTP}")),
                ("others4", &format!("ip saddr {{ 172.28.1.2, 172.28.1.4 }} tcp dport {HTTP}")),
                ("others6", &format!("ip6 saddr {{ fd00:28:0:1::2, fd00:28:0:1::4 }} tcp dport {HTTP}")),
            ],
        )?;
        let service =
            |online, target| format!("{}-{}", SocketAddr::new(online, HTTP), SocketAddr::new(target, HTTP));
        let services = [
            service(lab.online().v4().into(), lab.target().v4().into()),
            service(lab.online().v6().into(), lab.target().v6().into()),
        ];
        let replay = way.start_services(&lab, &services, &["-F", CHOSEN, "--exclude-clients", EXCLUDED])?;
        load_of_all(&lab, 400)?;
        let target = nginx.target.settled_ledger(400, ARRIVAL)?;
        let online = nginx.online.settled_ledger(800, ARRIVAL)?;
        assert_eq!((online.len(), target.len()), (800, 400), "{way:?}");
        assert_eq!(of_chosen(&target), of_chosen(&online), "{way:?}");
        assert_eq!(of_chosen(&target).len(), 400, "{way:?}");

        // Each packet that came in is in one account: captured, of somebody who was not chosen, or an acknowledgment of somebody who was.
        let (report, _) = replay.stop()?;
        let arrived = arriving.packets()?;
        let not_chosen = way.verdict(&report, "client_not_chosen")?;
        assert_eq!(not_chosen, arrived["others4"] + arrived["others6"], "{way:?}: {arrived:?}");
        let captured = report.counter("packets_captured");
        let acks = way.verdict(&report, "pure_ack")?;
        assert_eq!(captured + not_chosen + acks, arrived["to_service"], "{way:?}: {arrived:?} {report:#?}");
    }
    Ok(())
}

#[test]
fn b013_open_connections_are_joined_only_of_clients_that_were_chosen() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan { clients: 2, ..Plan::default() }, 1)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let server = (lab.online().v4(), STREAM).into();
        let open = |host| (0..10).map(|_| Conversation::open(host, server)).collect::<Result<Vec<_>>>();
        let (mut chosen, mut excluded) = (open(lab.client())?, open(lab.host("client2"))?);
        let mut ask_all = |round: u64| -> Result<()> {
            for (id, connection) in (1..).zip(chosen.iter_mut().chain(&mut excluded)) {
                connection.ask(RequestHeader {
                    id: 100 * round + id,
                    body: 500,
                    response: 100,
                    delay_ms: 0,
                })?;
            }
            Ok(())
        };
        ask_all(0)?;
        let replay = way.start(&lab, &[STREAM], &["--exclude-clients", "172.28.2.0/24"])?;
        for round in 1..=3 {
            ask_all(round)?;
        }
        // A mirror port's connections are joined at their second request.
        let expected = if way.name() == "span" { 20 } else { 30 };
        let record = streams.target.record_of(expected, ARRIVAL)?;
        assert_eq!(record.requests(), expected, "{way:?}");
        let client = format!("{}:", lab.client().v4());
        ensure!(record.connections.iter().all(|it| it.peer.starts_with(&client)), "{way:?}: {record:?}");
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("connections_joined"), 10, "{way:?}");
        ensure!(way.verdict(&report, "client_not_chosen")? >= 30, "{way:?}: {report:#?}");
    }
    Ok(())
}

#[test]
fn a_recording_has_only_chosen_clients() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(four_clients(), 1)?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let host = way.host(&lab);
        let (file, report) = (lab.dir().join("recorded"), lab.dir().join("record.json"));
        let mut command = host.command(tool("replayer")?);
        command.args(["record", "-i", way.nic(), "--capture", way.name(), "-x"]);
        command.arg(format!("{0}:{HTTP},[{1}]:{HTTP}", lab.online().v4(), lab.online().v6()));
        command.args(["--clients", CHOSEN, "--exclude-clients", EXCLUDED, "-w"]).arg(&file);
        let mut recorder = start(&lab, host, "record", command.arg("--report").arg(&report))?;
        recorder.wait_for_message("ready", Duration::from_secs(15))?;
        load_of_all(&lab, 80)?;
        assert_eq!(nginx.online.settled_ledger(160, ARRIVAL)?.len(), 160);
        ensure!(recorder.stop()?.success(), "{}", recorder.errors());
        let said = recorder.errors();
        ensure!(said.contains("packets of clients that were not chosen"), "{said}");
        let sources = |filter: &str| -> Result<BTreeSet<String>> {
            let mut command = host.command("tcpdump");
            command.args(["-n", "-r"]).arg(lab.dir().join("recorded-00001.pcapng")).arg(filter);
            let text = output_of(&mut command)?;
            // "12:00:00.000000 IP 172.28.1.1.40000 > …"
            let source = |line: &str| Some(line.split(' ').nth(2)?.rsplit_once('.')?.0.to_owned());
            text.lines().map(|line| source(line).with_context(|| line.to_owned())).collect()
        };
        let expected = ["172.28.1.1", "172.28.1.3", "fd00:28:0:1::1", "fd00:28:0:1::3"];
        assert_eq!(sources("tcp")?, expected.map(str::to_owned).into(), "{way:?}");
        let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
        let not_chosen = report["kernel"][way.name()]["client_not_chosen"].as_u64();
        // A SYN, an ACK, a request, another, and a FIN at least of each of 40 connections.
        ensure!(not_chosen >= Some(200), "{way:?}: {report:#}");
    }
    Ok(())
}

/// Nobody was chosen: said while the role runs, with the reason.
#[test]
fn b065_a_choice_that_leaves_everybody_out_is_named_within_ten_seconds() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let way = WAYS[1];
    let mut replay = way.start(&lab, &[HTTP], &["-F", "198.51.100.0/24"])?;
    let load =
        format!("--connect {}:{HTTP} --protocol http --connections 2 --requests 20", lab.online().v4());
    assert_all_answered(&Load::run(&lab, "load", &load)?, 20);
    let said = |text: &str| replay.online.process.errors().contains(text);
    wait_for("a warning", Duration::from_secs(10), || said("--exclude-clients leave out"))?;
    let report = replay.online.stop_online()?;
    assert_eq!(report.counter("packets_captured"), 0);
    ensure!(way.verdict(&report, "client_not_chosen")? > 20, "{report:#?}");
    Ok(())
}
