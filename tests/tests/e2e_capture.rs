//! The ways to capture, each with the same behaviours: 1, 2, 9, 13, 33, 44, 48, 49 and recording.
//!
//! `span` captures at a host of its own, which a mirror port of the switch shows what goes to the online host. Root only; each test has
//! labs of its own.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use replayer_common::addr::from_v4;
use replayer_common::hash::{FLOW_SEED, flow_hash, sample_threshold};
use replayer_tests::capture::Capture;
use replayer_tests::capture_ways::{WAYS, Way};
use replayer_tests::clients::{Load, output_of};
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::load::Summary;
use replayer_tests::pairs::{ARRIVAL, NginxPair, StreamPair};
use replayer_tests::process::Process;
use replayer_tests::replay::{Report, Role, service};
use replayer_tests::servers::{Driver, MIRROR_PORT_NIC, mirror_port, start, tool};
use replayer_tests::stream::RequestHeader;
use replayer_tests::wait::{settled, wait_for};
use serde_json::Value;

const HTTP: u16 = 8080;
const STREAM: u16 = 9000;

fn assert_all_answered(summary: &Summary, expected: u64) {
    assert_eq!((summary.responses, summary.errors), (expected, 0), "{summary:?}");
}

fn request(id: u64, body: u32) -> RequestHeader {
    RequestHeader { id, body, response: 100, delay_ms: 0 }
}

#[test]
fn b001_b002_every_way_captures_every_request_whole_and_in_order() -> Result<()> {
    for way in WAYS {
        // With offloads a packet holds up to 64 KiB of an upload.
        for offloads in [true, false] {
            let lab = way.lab(Plan { offloads, ..Plan::default() }, 1)?;
            let nginx = NginxPair::start(&lab, HTTP)?;
            let mut streams = StreamPair::start(&lab, STREAM)?;
            let replay = way.start(&lab, &[HTTP, STREAM], &[])?;
            let host = lab.online().v4();
            let http =
                |more: &str| format!("--connect {host}:{HTTP} --protocol http --expect-server online {more}");
            let short = "--connections 20 --per-connection 1 --requests 2000 --rate 2000";
            assert_all_answered(&Load::run(&lab, "short", &http(short))?, 2000);
            let long =
                "--connections 50 --per-connection 40 --requests 2000 --body 0-3000 --first-id 1000000";
            assert_all_answered(&Load::run(&lab, "long", &http(long))?, 2000);
            let load = format!(
                "--connect {host}:{STREAM} --connections 20 --per-connection 50 --requests 1000 --rate 1000 \
                 --body 10-60000 --response 1-5000"
            );
            assert_all_answered(&Load::run(&lab, "streams", &load)?, 1000);
            nginx.ensure_equal(4000).with_context(|| format!("{way:?}"))?;
            streams.ensure_equal(1000).with_context(|| format!("{way:?}"))?;
            let (report, _) = replay.stop()?;
            let captured = report.counter("packets_captured");
            let taken = ["mirrored", "copied", "redirected"]
                .iter()
                .filter_map(|name| report.kernel[way.name()][name].as_u64())
                .sum::<u64>();
            // What offloads put together is one packet to the programs at tc, and several to the engine.
            ensure!(taken > 0 && (taken == captured || offloads && taken < captured), "{report:#?}");
        }
    }
    Ok(())
}

#[test]
fn b001_with_two_workers_each_takes_its_share() -> Result<()> {
    for way in [Way::Ring, Way::Span] {
        let lab = way.lab(Plan::default(), 2)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let replay = way.start(&lab, &[STREAM], &["--workers", "2"])?;
        let load = format!(
            "--connect {}:{STREAM} --connections 100 --per-connection 20 --requests 2000 --rate 1500 --body 1-9000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 2000);
        streams.ensure_equal(2000).with_context(|| format!("{way:?}"))?;
        let (report, assistant) = replay.stop()?;
        assert_eq!(report.workers.len(), 2);
        for worker in &report.workers {
            ensure!(worker.sessions_opened > 0 && worker.packets_transmitted > 0, "{way:?}: {report:#?}");
        }
        assert_eq!(report.workers.iter().map(|worker| worker.sessions_opened).sum::<u64>(), 100);
        assert_eq!(assistant["routing"]["conflicts"], 0, "{assistant:#}");
    }
    Ok(())
}

/// A NIC of several queues, with XDP in its driver and without: each queue's worker makes copies of what the NIC gives it, from its share of the
/// pool.
#[test]
fn b041_span_copies_what_arrives_on_several_queues_by_native_and_by_generic_xdp() -> Result<()> {
    for (driver, mode) in [(Driver::NativeXdp, "native"), (Driver::GenericXdp, "generic")] {
        // Generic XDP comes after receive offload, and a socket takes nothing larger than a frame.
        let lab = Lab::up(Plan { onlines: 2, online_queues: 2, offloads: false, ..Plan::default() })?;
        mirror_port(&lab, lab.online(), Way::Span.host(&lab), 2, driver)?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let arguments = ["--workers", "2", "-n", "3", "-c", "172.29.0.0/24"];
        let replay = Way::Span.start(&lab, &[HTTP], &arguments)?;
        let said = replay.online.process.errors();
        ensure!(said.contains(&format!("XDP in {mode} mode")), "not by {mode} XDP: {said}");
        let load = format!(
            "--connect {}:{HTTP} --protocol http --connections 100 --per-connection 10 --requests 1000 --rate 2000 --body 0-3000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 1000);
        let ledger = nginx.target.settled_ledger(3000, ARRIVAL)?;
        ledger.ensure_copied(1000, 3, 10).with_context(|| format!("{driver:?}"))?;
        let (report, assistant) = replay.stop()?;
        assert_eq!(Way::Span.verdict(&report, "redirected")?, report.counter("packets_captured"));
        let sessions: Vec<u64> = report.workers.iter().map(|worker| worker.sessions_opened).collect();
        // Which queue a connection is on is tossed by the switch, evenly, or with one of three sides for the second queue where its end of
        // the cable has three: five standard deviations.
        let least = match driver {
            Driver::NativeXdp => 25,
            Driver::GenericXdp => 9,
        };
        ensure!(
            sessions.len() == 2 && sessions.iter().all(|&count| count > 3 * least),
            "{driver:?}: {sessions:?}"
        );
        assert_eq!(sessions.iter().sum::<u64>(), 300);
        assert_eq!(assistant["routing"]["conflicts"], 0, "{assistant:#}");
    }
    Ok(())
}

/// The host itself knows that its idle connections are between two requests. A mirror port's does not: there a connection is joined at
/// the request that is surely a new one, its second.
#[test]
fn b013_connections_that_were_open_before_are_joined() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan::default(), 1)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let server = (lab.online().v4(), STREAM).into();
        let mut connections: Vec<Conversation> =
            (0..50).map(|_| Conversation::open(lab.client(), server)).collect::<Result<_>>()?;
        for (id, connection) in (1..).zip(&mut connections) {
            connection.ask(request(id, 2000))?;
        }
        let replay = way.start(&lab, &[STREAM], &[])?;
        let mut expected = BTreeSet::new();
        for (id, connection) in (1001..).zip(&mut connections) {
            for round in 0..3 {
                connection.ask(request(id + 1000 * round, 5000))?;
            }
            let ids =
                if way == Way::Span { vec![id + 1000, id + 2000] } else { vec![id, id + 1000, id + 2000] };
            expected.insert((connection.local()?, ids));
        }
        let requests = expected.iter().map(|(_, ids)| ids.len()).sum();
        let target = streams.target.record_of(requests, ARRIVAL)?;
        let there: BTreeSet<_> =
            target.connections.iter().map(|it| (it.peer.clone(), it.ids.clone())).collect();
        assert_eq!(there, expected, "{way:?}");
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("connections_joined"), 50);
    }
    Ok(())
}

#[test]
fn b044_a_sample_is_the_same_connections_in_every_way() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan::default(), 1)?;
        let nginx = NginxPair::start(&lab, HTTP)?;
        let replay = way.start(&lab, &[HTTP], &["-r", "30"])?;
        let load = format!(
            "--connect {}:{HTTP} --protocol http --connections 20 --per-connection 2 --requests 1000 --rate 2000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 1000);
        let online = nginx.online.settled_ledger(1000, ARRIVAL)?;
        let clients = |ledger: &replayer_tests::ledger::Ledger| -> BTreeSet<(String, u16)> {
            ledger.entries.iter().map(|entry| (entry.address.clone(), entry.port)).collect()
        };
        let mut chosen = BTreeSet::new();
        for (address, port) in clients(&online) {
            let IpAddr::V4(ip) = address.parse()? else { bail!("{address} is not IPv4") };
            if u64::from(flow_hash(FLOW_SEED, &from_v4(ip.octets()), port)) < sample_threshold(30.0) {
                chosen.insert((address, port));
            }
        }
        assert!((90..210).contains(&chosen.len()), "{} of 500", chosen.len());
        let target = nginx.target.settled_ledger(2 * chosen.len(), ARRIVAL)?;
        assert_eq!(clients(&target), chosen, "{way:?}");
        let (report, _) = replay.stop()?;
        assert!(way.verdict(&report, "not_sampled")? > 0);
    }
    Ok(())
}

/// While the role does not get to run, what finds no room is lost to the replay and counted, and to nobody else.
#[test]
fn b033_b048_what_finds_no_room_is_counted_and_requests_after_it_arrive() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan { offloads: false, ..Plan::default() }, 1)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let mut replay = way.start(&lab, &[STREAM], &[])?;
        let load = |name: &str, more: &str| {
            let common = format!("--connect {}:{STREAM} {more}", lab.online().v4());
            Load::run(&lab, name, &common)
        };
        assert_all_answered(&load("before", "--connections 10 --requests 100 --body 1-2000")?, 100);
        wait_for("the first requests", ARRIVAL, || {
            streams.target.record().is_ok_and(|record| record.requests() == 100)
        })?;
        replay.online.process.signal(Signal::SIGSTOP)?;
        // More than any of them holds: 64 MiB of clones and as many frames again.
        let more = "--connections 4 --per-connection 12 --requests 48 --body 4000000 --first-id 1000";
        let flood = load("flood", more);
        replay.online.process.signal(Signal::SIGCONT)?;
        assert_all_answered(&flood?, 48);
        // Until it has worked off what there was room for, new packets find none.
        settled(Duration::from_secs(2), Duration::from_secs(60), || {
            streams.target.record().map_or(0, |record| record.bytes())
        });
        assert_all_answered(
            &load("after", "--connections 10 --requests 100 --body 1-2000 --first-id 5000")?,
            100,
        );
        wait_for("the requests after it", Duration::from_secs(20), || {
            streams.target.record().is_ok_and(|record| {
                record.connections.iter().flat_map(|it| &it.ids).filter(|&&id| id >= 5000).count() == 100
            })
        })
        .with_context(|| format!("{way:?}"))?;
        let record = streams.target.record()?;
        assert!(record.connections.iter().all(|it| it.mismatch.is_none()), "{way:?}: {record:?}");
        let report: Value = replay.online.stop()?;
        let typed: Report = serde_json::from_value(report.clone())?;
        typed.check_accounts()?;
        let socket = &report["port"]["capture_socket"];
        let sum = |values: &[&Value]| values.iter().filter_map(|value| value.as_u64()).sum::<u64>();
        let lost = match way {
            Way::Mirror => sum(&[
                &report["kernel"]["mirror"]["mirror_full"],
                &report["kernel"]["mirror_device_dropped"],
                &socket["rx_ring_full"],
                &socket["rx_fill_ring_empty"],
            ]),
            Way::Ring => sum(&[&report["kernel"]["ring"]["ring_full"]]),
            Way::Span => sum(&[&socket["rx_ring_full"], &socket["rx_fill_ring_empty"]]),
        };
        ensure!(lost > 1000, "{way:?} counted {lost} lost packets: {report:#}");
        // Told while it ran, not only at its end.
        let said = replay.online.process.errors();
        let summary = said.find("online: replayed").context("no summary")?;
        let warning =
            said.find(" packets were lost in the capture within the last second").context("no warning")?;
        ensure!(warning < summary && said.contains("--workers"), "{way:?}: {said}");
        ensure!(said[summary..].contains(" packets were lost in the capture ("), "{way:?}: {said}");
        let stats = replay.online.stats().context("no line of statistics")?;
        assert_eq!(
            (stats.packets_lost_in_capture > 1000, typed.packets_lost_in_capture > 1000),
            (true, true)
        );
    }
    Ok(())
}

/// What is attached to a host's NICs, how they are, and which there are.
fn traces(host: &Host) -> Result<(usize, BTreeSet<String>, String)> {
    let (_, programs) = host
        .namespace()
        .enter(|| SchedClassifier::query_tcx(NIC, TcAttachType::Ingress))?
        .context("asking for programs")?;
    let devices = output_of(host.command("ls").arg("/sys/class/net"))?;
    let links = output_of(host.command("ip").args(["-d", "-o", "link", "show"]))?;
    // Counters of promiscuous users and XDP programs are in there, changing ones are not.
    Ok((programs.len(), devices.split_whitespace().map(str::to_owned).collect(), links))
}

#[test]
fn b049_nothing_is_left_of_any_way_after_an_end_or_a_kill() -> Result<()> {
    for way in WAYS {
        for signal in [Signal::SIGKILL, Signal::SIGTERM] {
            let lab = way.lab(Plan::default(), 1)?;
            let nginx = NginxPair::start(&lab, HTTP)?;
            let host = way.host(&lab);
            let before = traces(host)?;
            let mut replay = way.start(&lab, &[HTTP], &[])?;
            let during = traces(host)?;
            match way {
                Way::Mirror => ensure!(during.0 > before.0 && during.1 != before.1, "{during:?}"),
                Way::Ring => ensure!(during.0 > before.0 && during.1 == before.1, "{during:?}"),
                Way::Span => {
                    ensure!(during.2.contains("xdp") && during.2.contains("promiscuity 1"), "{during:?}");
                }
            }
            let load = format!(
                "--connect {}:{HTTP} --protocol http --expect-server online --connections 10 --rate 1000 --seconds 2",
                lab.online().v4()
            );
            let mut load = Load::start(&lab, lab.client(), "load", &load)?;
            wait_for("requests at the target", Duration::from_secs(5), || {
                nginx.target.ledger().is_ok_and(|ledger| ledger.len() > 300)
            })?;
            replay.online.process.signal(signal)?;
            wait_for("the host as it was", Duration::from_secs(5), || {
                traces(host).is_ok_and(|now| now == before)
            })
            .with_context(|| format!("{way:?} {signal}: {before:#?} {:#?}", traces(host)))?;
            let summary = load.finish()?;
            assert_eq!((summary.errors, summary.unanswered, summary.responses), (0, 0, summary.requests));
        }
    }
    Ok(())
}

#[test]
fn recordings_of_every_way_hold_the_same_requests() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan::default(), 1)?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let host = way.host(&lab);
        let file = lab.dir().join("recorded");
        let report = lab.dir().join("record.json");
        let mut command = host.command(tool("replayer")?);
        command.args(["record", "-i", way.nic(), "--capture", way.name()]);
        command.args(["-x", &format!("{}:{STREAM}", lab.online().v4())]);
        command.arg("-w").arg(&file).arg("--report").arg(&report);
        let mut recorder = start(&lab, host, "record", &mut command)?;
        recorder.wait_for_message("ready", Duration::from_secs(15))?;
        let load = format!(
            "--connect {}:{STREAM} --connections 10 --per-connection 20 --requests 200 --rate 400 --body 1-60000",
            lab.online().v4()
        );
        assert_all_answered(&Load::run(&lab, "load", &load)?, 200);
        streams.online.ended_record_of(200, ARRIVAL)?;
        ensure!(recorder.stop()?.success(), "{}", recorder.errors());
        let said: Value = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
        assert_eq!(said["packets_lost"], 0, "{said:#}");

        // Replayed from the file, the target gets the same streams.
        let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
        let mut command = lab.online().command(tool("replayer")?);
        command.arg("offline").arg("-f").arg(lab.dir().join("recorded-00001.pcapng"));
        command.args(["-x", &service(STREAM, lab.target().v4(), STREAM), "-s"]);
        command.arg(lab.assistant().v4().to_string());
        let mut offline = start(&lab, lab.online(), "offline", &mut command)?;
        ensure!(offline.wait(Duration::from_secs(30))?.success(), "{}", offline.errors());
        streams.ensure_equal(200).with_context(|| format!("{way:?}"))?;
    }
    Ok(())
}

/// A ring is looked at now and then, and many packets at a time: they would have the time of the look.
#[test]
fn a_recording_by_ring_says_when_the_kernel_had_each_packet() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _nginx = NginxPair::start(&lab, HTTP)?;
    let file = lab.dir().join("recorded");
    let mut command = lab.online().command(tool("replayer")?);
    command.args(["record", "-i", NIC, "--capture", "ring", "-x", &HTTP.to_string(), "-w"]).arg(&file);
    let mut recorder = start(&lab, lab.online(), "record", &mut command)?;
    recorder.wait_for_message("ready", Duration::from_secs(15))?;
    let tcpdump = Capture::on_cable(&lab, lab.online(), &format!("tcp dst port {HTTP}"))?;
    let load = format!(
        "--connect {}:{HTTP} --protocol http --connections 20 --requests 4000 --rate 4000 --arrivals poisson",
        lab.online().v4()
    );
    assert_all_answered(&Load::run(&lab, "load", &load)?, 4000);
    // Its last block is at most a second late.
    std::thread::sleep(Duration::from_millis(1500));
    let on_the_wire = times_of_requests(&lab, &tcpdump.stop()?)?;
    ensure!(recorder.stop()?.success(), "{}", recorder.errors());
    let recorded = times_of_requests(&lab, &lab.dir().join("recorded-00001.pcapng"))?;
    assert_eq!((on_the_wire.len(), recorded.len()), (4000, 4000));
    let mut late: Vec<f64> = on_the_wire.iter().zip(&recorded).map(|(wire, ring)| ring - wire).collect();
    late.sort_by(f64::total_cmp);
    let median = late[late.len() / 2];
    assert!((-1e-6..100e-6).contains(&median), "{median} s later than on the wire");
    Ok(())
}

/// When each packet of a capture file that ends a request was captured, in seconds, in their order.
fn times_of_requests(lab: &Lab, file: &Path) -> Result<Vec<f64>> {
    let mut command = lab.online().command("tcpdump");
    command
        .args(["-n", "-tt", "--time-stamp-precision=nano", "-r"])
        .arg(file)
        .arg("tcp[tcpflags] & tcp-push != 0");
    let text = output_of(&mut command)?;
    let times = text.lines().map(|line| line.split(' ').next().unwrap_or_default().parse());
    times.collect::<Result<_, _>>().with_context(|| text.clone())
}

/// Runs `replayer online` on a host with arguments that it must refuse; its message.
fn refused(lab: &Lab, host: &Host, arguments: &str) -> Result<String> {
    let assistant = lab.assistant().v4().to_string();
    let mut command = host.command(tool("replayer")?);
    command.args(["online", "-s", &assistant]).args(arguments.split(' '));
    let mut process = Process::start(&mut command, "refused", &lab.dir())?;
    let status = process.wait(Duration::from_secs(10))?;
    let message = process.errors();
    ensure!(!status.success() && !message.contains("panicked"), "{arguments}: {status}: {message}");
    Ok(message)
}

#[test]
fn b009_span_is_refused_where_it_would_take_something_away() -> Result<()> {
    let lab = Way::Span.lab(Plan::default(), 2)?;
    let monitor = Way::Span.host(&lab);
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let to_target = service(HTTP, lab.target().v4(), HTTP);
    let whole = format!("{}:{to_target}", lab.online().v4());
    let address = monitor.v4().to_string();
    let before = traces(monitor)?;
    let cases = [
        (format!("--capture span -i {NIC} -x {whole}"), vec![&address[..], "--capture ring", "mirror port"]),
        (format!("--capture span -i span -x {to_target}"), vec!["-x IP:", "name the server's address"]),
        (
            format!("--capture span -i span -x {whole} --workers 1"),
            vec!["2 receive queues", "--workers 2", "ethtool -L span"],
        ),
        (format!("--capture span -i span -x {whole} -n 3 --workers 2"), vec!["-c", "ethtool -L span"]),
        (format!("--capture ring --zero-copy -i {NIC} -x {whole}"), vec!["--capture span"]),
    ];
    let ensure_refused = |arguments: &str, words: &[&str]| -> Result<()> {
        let message = refused(&lab, monitor, arguments)?;
        for word in words {
            ensure!(message.contains(word), "`{arguments}` does not say {word:?}: {message}");
        }
        Ok(())
    };
    for (arguments, words) in &cases {
        ensure_refused(arguments, words)?;
    }
    // What else a NIC may do for its host.
    let span = format!("--capture span -i span -x {whole}");
    for (set, undo, words) in [
        (
            "addr add 203.0.113.9/24 dev span",
            "addr flush dev span scope global",
            ["203.0.113.9", "ip addr del"],
        ),
        (
            "route add 203.0.113.0/24 dev span",
            "route flush dev span scope link",
            ["routes", "ip route flush dev span"],
        ),
        ("link set span master shared", "link set span nomaster", ["a port of shared", "nomaster"]),
        (
            "link add top link span up type macvlan",
            "link del top",
            ["top is made on top of it", "link set top down"],
        ),
    ] {
        if set.contains("master") {
            monitor.namespace().ip("link add name shared type bridge\n")?;
        }
        monitor.namespace().ip(&format!("{set}\n"))?;
        ensure_refused(&span, &words)?;
        monitor.namespace().ip(&format!("{undo}\n"))?;
        if set.contains("master") {
            monitor.namespace().ip("link del shared\n")?;
        }
    }
    ensure!(traces(monitor)?.1 == before.1, "something was left behind");
    Ok(())
}

#[test]
fn auto_takes_the_ring_where_requests_are_served_and_span_where_nobody_is() -> Result<()> {
    let lab = Way::Span.lab(Plan::default(), 1)?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let address = SocketAddr::new(lab.online().v4().into(), HTTP);
    let services = [format!("{address}-{}:{HTTP}", lab.target().v4())];
    let assistants = [lab.assistant().v4().into()];
    for (host, nic, services, expected) in [
        (lab.online(), NIC, &services, "ring: eth0 serves this host"),
        (lab.host("online2"), MIRROR_PORT_NIC, &services, "span: span serves nobody"),
        (
            lab.host("online2"),
            MIRROR_PORT_NIC,
            &[service(HTTP, lab.target().v4(), HTTP)],
            "ring: span serves nobody, but",
        ),
    ] {
        let mut online = Role::online_at(&lab, host, nic, services, &assistants, &[])?;
        let said = online.process.errors();
        ensure!(said.contains(expected), "{expected:?} is not in: {said}");
        online.stop_online()?;
    }
    Ok(())
}
