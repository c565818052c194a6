//! Services of UDP, live and from files: what the online server received is what the target received.
//!
//! Root only; each test has a lab of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use replayer_common::addr::from_std;
use replayer_common::hash::{FLOW_SEED, flow_hash, sample_threshold};
use replayer_tests::capture::Capture;
use replayer_tests::capture_ways::{WAYS, Way};
use replayer_tests::lab::{Host, Lab, NIC, POOL_V4, Plan};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::{Replay, Report, Role};
use replayer_tests::servers::{start, tool};
use replayer_tests::wait::{settled, wait_for};

const PORT: u16 = 5353;
const CLIENTS: usize = 50;
const EACH: usize = 10;
const ALL: u64 = (CLIENTS * EACH) as u64;
/// How long an answer of the online server may take.
const ANSWER: Duration = Duration::from_secs(5);

/// A datagram that a server received: from where, and its payload.
type Received = (SocketAddr, Vec<u8>);

/// Answers each datagram with its name and the same bytes, and remembers it.
struct Server {
    received: Arc<Mutex<Vec<Received>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(host: &Host, port: u16, name: &'static str) -> Result<Server> {
        let socket = host.namespace().enter(|| UdpSocket::bind(("::", port)))??;
        // Room for all datagrams of a test: what a slow server drops is not what is tested.
        setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (all, ends) = (received.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while !ends.load(Ordering::Relaxed) {
                let Ok((len, from)) = socket.recv_from(&mut buffer) else { continue };
                let from_ip = match from.ip() {
                    IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4),
                    ip => ip,
                };
                let payload = buffer[..len].to_vec();
                let answer = [name.as_bytes(), &payload].concat();
                all.lock().unwrap().push((SocketAddr::new(from_ip, from.port()), payload));
                // A client that is gone is none of the server's business.
                let _ = socket.send_to(&answer, from);
            }
        });
        Ok(Server { received, stop, thread: Some(thread) })
    }

    /// What it has received when `count` datagrams are there and no more come.
    fn ledger(&self, count: usize) -> Vec<Received> {
        let len = || self.received.lock().unwrap().len();
        // When it fails, the caller's comparison says what is missing.
        let _ = wait_for("datagrams", ARRIVAL, || len() >= count);
        settled(Duration::from_millis(200), ARRIVAL, len);
        self.received.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Clients with a socket each that ask in turn, and check that the online server answers, and nobody else. The sockets stay.
fn ask(lab: &Lab, to: SocketAddr, each: usize) -> Result<Vec<UdpSocket>> {
    ask_from(lab.client(), to, each)
}

/// The same from a certain host.
fn ask_from(host: &Host, to: SocketAddr, each: usize) -> Result<Vec<UdpSocket>> {
    let sockets = clients(host, to)?;
    for request in 0..each {
        ask_once(&sockets, request)?;
    }
    Ok(sockets)
}

/// Sockets of clients.
fn clients(host: &Host, to: SocketAddr) -> Result<Vec<UdpSocket>> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let sockets: Vec<UdpSocket> =
        host.namespace().enter(|| (0..CLIENTS).map(|_| UdpSocket::bind(any)).collect::<Result<_, _>>())??;
    for socket in &sockets {
        socket.connect(to)?;
        socket.set_read_timeout(Some(ANSWER))?;
    }
    Ok(sockets)
}

/// Each client asks once.
fn ask_once(sockets: &[UdpSocket], request: usize) -> Result<()> {
    let mut buffer = [0; 2000];
    for (client, socket) in sockets.iter().enumerate() {
        let payload = payload(client, request);
        socket.send(&payload)?;
        let len = socket.recv(&mut buffer).context("the online server's answer")?;
        ensure!(buffer[..len] == [&b"online"[..], &payload].concat(), "another answer than expected");
    }
    Ok(())
}

/// Of many lengths, odd ones too.
fn payload(client: usize, request: usize) -> Vec<u8> {
    let mut payload = format!("{client} {request} ").into_bytes();
    payload.resize(payload.len() + (client * 31 + request * 7) % 1300, b'x');
    payload
}

/// How often each payload came.
fn counts(ledger: &[Received]) -> BTreeMap<&[u8], usize> {
    let mut counts = BTreeMap::new();
    for (_, payload) in ledger {
        *counts.entry(payload.as_slice()).or_default() += 1;
    }
    counts
}

/// The same datagrams from the same addresses, in any order.
#[track_caller]
fn assert_same(mut found: Vec<Received>, mut expected: Vec<Received>) {
    found.sort();
    expected.sort();
    let missing = expected.iter().filter(|one| found.binary_search(one).is_err()).count();
    assert_eq!((found.len(), missing), (expected.len(), 0), "datagrams, and how many of them are missing");
    assert!(found == expected, "some came more often than others");
}

/// Each datagram of `sent` so many times, from whatever address.
#[track_caller]
fn assert_times(found: &[Received], sent: &[Received], times: usize) {
    let (found, sent) = (counts(found), counts(sent));
    let wrong = sent.iter().filter(|(id, count)| found.get(*id) != Some(&(times * **count))).count();
    assert_eq!(
        (found.len(), wrong),
        (sent.len(), 0),
        "kinds of datagrams, and how many came another number of times"
    );
}

fn service(lab: &Lab, v6: bool) -> String {
    match v6 {
        false => format!("udp:{PORT}-{}:{PORT}", lab.target().v4()),
        true => format!("udp:{PORT}-[{}]:{PORT}", lab.target().v6()),
    }
}

fn is_in_sample(client: &SocketAddr, percent: f64) -> bool {
    u64::from(flow_hash(FLOW_SEED, &from_std(client.ip()), client.port())) < sample_threshold(percent)
}

struct World {
    lab: Lab,
    online: Server,
    target: Server,
}

fn world() -> Result<World> {
    let lab = Lab::up(Plan::default())?;
    let online = Server::start(lab.online(), PORT, "online")?;
    let target = Server::start(lab.target(), PORT, "target")?;
    Ok(World { lab, online, target })
}

/// No answer of the target came to a client, and none comes.
fn assert_silent(sockets: &[UdpSocket]) {
    for socket in sockets {
        socket.set_nonblocking(true).unwrap();
        let more = socket.recv(&mut [0; 10]);
        assert!(more.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock), "{more:?}");
    }
}

#[test]
fn every_datagram_arrives_once_from_its_clients_address() -> Result<()> {
    for v6 in [false, true] {
        let World { lab, online, target } = world()?;
        // TCP at the same port: two services.
        let mut streams = StreamPair::start(&lab, PORT)?;
        let tcp = format!("{PORT}-{}:{PORT}", lab.target().v4());
        let replay =
            Replay::start_services(&lab, &[service(&lab, v6), tcp], lab.assistant().v4().into(), &[])?;
        let server: IpAddr = if v6 { lab.online().v6().into() } else { lab.online().v4().into() };
        let sockets = ask(&lab, SocketAddr::new(server, PORT), EACH)?;
        let load = format!(
            "--connect {}:{PORT} --connections 5 --per-connection 10 --requests 50",
            lab.online().v4()
        );
        let summary = replayer_tests::clients::Load::run(&lab, "streams", &load)?;
        assert_eq!((summary.responses, summary.errors), (50, 0), "{summary:?}");
        let (sent, arrived) = (online.ledger(ALL as usize), target.ledger(ALL as usize));
        assert_eq!(sent.len() as u64, ALL);
        assert_same(arrived, sent);
        streams.ensure_equal(50)?;
        assert_silent(&sockets);
        let (report, assistant) = replay.stop()?;
        assert_eq!(report.counter("packets_datagrams"), ALL, "{:?}", report.counters);
        assert_eq!(report.counter("datagrams_sent"), ALL);
        assert_eq!(report.counter("datagram_responses"), ALL, "{:?} {assistant}", report.counters);
        assert_eq!(report.counter("datagram_flows"), CLIENTS as u64);
        assert_eq!(report.counter("packets_unparsable"), 0);
    }
    Ok(())
}

#[test]
fn b041_b044_copies_and_samples() -> Result<()> {
    let World { lab, online, target } = world()?;
    let to = SocketAddr::new(lab.online().v4().into(), PORT);
    let services = [service(&lab, false)];
    let replay =
        Replay::start_services(&lab, &services, lab.assistant().v4().into(), &["-n", "3", "-c", POOL_V4])?;
    ask(&lab, to, EACH)?;
    let before = online.ledger(ALL as usize);
    let arrived = target.ledger(3 * ALL as usize);
    assert_times(&arrived, &before, 3);
    assert!(arrived.iter().all(|(from, _)| from.ip().to_string().starts_with("172.29.")));
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("datagrams_sent"), 3 * ALL);
    assert_eq!(report.counter("datagram_responses"), 3 * ALL, "{:?}", report.counters);

    let replay = Replay::start_services(&lab, &services, lab.assistant().v4().into(), &["-r", "20"])?;
    ask(&lab, to, EACH)?;
    let all = online.ledger(2 * ALL as usize).split_off(before.len());
    let expected: Vec<Received> = all.into_iter().filter(|(from, _)| is_in_sample(from, 20.0)).collect();
    let sampled = target.ledger(arrived.len() + expected.len()).split_off(arrived.len());
    assert_same(sampled, expected.clone());
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("datagrams_sent"), expected.len() as u64);
    Ok(())
}

#[test]
fn only_datagrams_of_chosen_clients_are_copied_in_every_way() -> Result<()> {
    for way in WAYS {
        let lab = way.lab(Plan { clients: 2, offloads: false, ..Plan::default() }, 1)?;
        let online = Server::start(lab.online(), PORT, "online")?;
        let target = Server::start(lab.target(), PORT, "target")?;
        let service = |online: IpAddr, target: IpAddr| {
            format!("udp:{}-{}", SocketAddr::new(online, PORT), SocketAddr::new(target, PORT))
        };
        let services = [
            service(lab.online().v4().into(), lab.target().v4().into()),
            service(lab.online().v6().into(), lab.target().v6().into()),
        ];
        // All of the first client's network but one address that is nobody's, nothing of the second's.
        let choice =
            ["--clients", "172.28.1.0/24,fd00:28:0:1::/64", "--exclude-clients", "172.28.1.99,172.28.0.0/16"];
        let replay = way.start_services(&lab, &services, &choice)?;
        for to in
            [SocketAddr::new(lab.online().v4().into(), PORT), SocketAddr::new(lab.online().v6().into(), PORT)]
        {
            for host in [lab.client(), lab.host("client2")] {
                ask_from(host, to, EACH)?;
            }
        }
        let sent = online.ledger(4 * ALL as usize);
        assert_eq!(sent.len() as u64, 4 * ALL);
        let first = [IpAddr::from(lab.client().v4()), lab.client().v6().into()];
        let expected: Vec<Received> =
            sent.into_iter().filter(|(from, _)| first.contains(&from.ip())).collect();
        assert_eq!(expected.len() as u64, 2 * ALL);
        assert_same(target.ledger(expected.len()), expected);
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("packets_datagrams"), 2 * ALL, "{way:?}");
        assert_eq!(way.verdict(&report, "client_not_chosen")?, 2 * ALL, "{way:?}");
    }
    Ok(())
}

#[test]
fn b044_a_ramp_grows_to_the_sample_and_keeps_whom_it_has() -> Result<()> {
    const RAMP: Duration = Duration::from_secs(3);
    let World { lab, online, target } = world()?;
    let arguments = ["-r", "60", "-g", "3"];
    let assistant = lab.assistant().v4().into();
    let replay = Replay::start_services(&lab, &[service(&lab, false)], assistant, &arguments)?;
    // It began a little earlier, so after this time it is over.
    let began = Instant::now();
    let sockets = clients(lab.client(), SocketAddr::new(lab.online().v4().into(), PORT))?;
    let mut rounds = 0;
    loop {
        let over = began.elapsed() > RAMP;
        ask_once(&sockets, rounds)?;
        rounds += 1;
        if over {
            break;
        }
        // The rounds are spread over the ramp.
        std::thread::sleep(RAMP / 10);
    }
    let asked = online.ledger(rounds * CLIENTS);
    let (report, _) = replay.stop()?;
    let sent = report.counter("datagrams_sent");
    let arrived = target.ledger(sent as usize);
    assert_eq!(arrived.len() as u64, sent);
    let of_round = |round: usize| -> BTreeSet<SocketAddr> {
        let asked_in =
            |payload: &[u8]| payload.split(|&b| b == b' ').nth(1) == Some(round.to_string().as_bytes());
        arrived.iter().filter(|(_, payload)| asked_in(payload)).map(|(from, _)| *from).collect()
    };
    let members: Vec<BTreeSet<SocketAddr>> = (0..rounds).map(of_round).collect();
    for pair in members.windows(2) {
        assert!(pair[0].is_subset(&pair[1]), "who was in it is in it: {pair:?}");
    }
    let sample: BTreeSet<SocketAddr> =
        asked.iter().map(|(from, _)| *from).filter(|from| is_in_sample(from, 60.0)).collect();
    assert_eq!(members[rounds - 1], sample);
    assert!(
        members[0].len() < sample.len(),
        "it grows: {:?}",
        members.iter().map(BTreeSet::len).collect::<Vec<_>>()
    );
    Ok(())
}

#[test]
fn every_way_captures_every_datagram_with_one_worker_and_with_two() -> Result<()> {
    for way in WAYS {
        for workers in [1, 2] {
            let lab = way.lab(Plan::default(), workers)?;
            let online = Server::start(lab.online(), PORT, "online")?;
            let target = Server::start(lab.target(), PORT, "target")?;
            let service = format!("udp:{}", way.service(&lab, PORT));
            let replay = way.start_services(&lab, &[service], &["--workers", &workers.to_string()])?;
            let sockets = ask(&lab, SocketAddr::new(lab.online().v4().into(), PORT), EACH)?;
            let (sent, arrived) = (online.ledger(ALL as usize), target.ledger(ALL as usize));
            assert_same(arrived, sent);
            assert_silent(&sockets);
            let (report, assistant) = replay.stop()?;
            let counts = ["packets_datagrams", "datagrams_sent", "datagram_responses"]
                .map(|name| report.counter(name));
            assert_eq!(counts, [ALL; 3], "{way:?}, {workers} workers: {:?} {assistant:#}", report.counters);
            assert_eq!(
                assistant["channel"]["records_sent"], ALL,
                "{way:?}, {workers} workers: {assistant:#}"
            );
            let idle = report.workers.iter().filter(|worker| worker.packets_captured == 0).count();
            // Which worker a packet of a mirror port comes to is the NIC's choice.
            assert!(
                report.workers.len() == usize::from(workers) && (idle == 0 || way == Way::Span),
                "{way:?}: {:?}",
                report.workers
            );
        }
    }
    Ok(())
}

#[test]
fn what_is_larger_than_a_packet_is_counted_and_a_closed_port_harms_nobody() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let online = Server::start(lab.online(), PORT, "online")?;
    let replay = Replay::start_services(&lab, &[service(&lab, false)], lab.assistant().v4().into(), &[])?;
    // Nobody listens at the target: its kernel answers with ICMP.
    let sockets = ask(&lab, SocketAddr::new(lab.online().v4().into(), PORT), 2)?;
    // A datagram that the client's kernel sends as fragments.
    sockets[0].send(&vec![b'f'; 4000])?;
    let mut buffer = vec![0; 5000];
    assert_eq!(sockets[0].recv(&mut buffer)?, 4006);
    assert_eq!(online.ledger(2 * CLIENTS + 1).len(), 2 * CLIENTS + 1);
    settled(Duration::from_millis(300), ARRIVAL, || 0);
    assert_silent(&sockets);
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("datagrams_sent"), 2 * CLIENTS as u64, "{:?}", report.counters);
    assert_eq!(report.counter("datagram_responses"), 0);
    Ok(())
}

/// Nothing listens at the target, and what its kernel says of that (ICMP) comes to nobody.
#[test]
fn b065_datagrams_that_nothing_answers_are_told_of_within_ten_seconds() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let _online = Server::start(lab.online(), PORT, "online")?;
    let mut replay = Replay::start_services(&lab, &[service(&lab, false)], lab.assistant().v4().into(), &[])?;
    ask(&lab, SocketAddr::new(lab.online().v4().into(), PORT), EACH)?;
    let said = format!("nothing of {}:{PORT} came back", lab.target().v4());
    replay.online.process.wait_for_message(&said, Duration::from_secs(10))?;
    let (report, _) = replay.stop()?;
    let [service] = report.services.as_slice() else { panic!("{:?}", report.services) };
    assert_eq!((service.datagrams_sent, service.datagrams_answered), (ALL, 0));
    Ok(())
}

/// A replay of files that must end by itself, and well; its report.
fn offline(lab: &Lab, files: &str, services: &str, arguments: &[&str]) -> Result<Report> {
    let report = lab.dir().join("offline-report.json");
    let assistant = lab.assistant().v4().to_string();
    let mut command = lab.online().command(tool("replayer")?);
    command.arg("offline").args(["-f", files, "-x", services, "-s", &assistant]).args(arguments);
    let mut process = start(lab, lab.online(), "offline", command.arg("--report").arg(&report))?;
    let status = process.wait(Duration::from_secs(60))?;
    ensure!(status.success(), "offline {arguments:?} ended with {status}:\n{}", process.errors());
    let report: Report = serde_json::from_str(&std::fs::read_to_string(&report)?)?;
    report.check_accounts()?;
    Ok(report)
}

#[test]
fn b058_b059_datagrams_of_a_file() -> Result<()> {
    let World { lab, online, target } = world()?;
    let capture = Capture::start(&lab, lab.online(), &format!("udp port {PORT}"))?;
    ask(&lab, SocketAddr::new(lab.online().v4().into(), PORT), EACH)?;
    let sent = online.ledger(ALL as usize);
    let file = capture.stop()?;
    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;

    let begun = Instant::now();
    let (file, service) = (file.to_string_lossy(), service(&lab, false));
    let report = offline(&lab, &file, &service, &[])?;
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let arrived = target.ledger(ALL as usize);
    assert_same(arrived.clone(), sent.clone());
    assert_eq!(report.counter("datagrams_sent"), ALL);
    assert_eq!(report.counter("datagram_responses"), ALL, "{:?}", report.counters);

    let report = offline(&lab, &file, &service, &["--loop", "3", "-n", "2", "--speed", "max"])?;
    assert_eq!(report.counter("datagram_responses"), 6 * ALL, "{:?}", report.counters);
    let more = target.ledger(7 * ALL as usize).split_off(arrived.len());
    assert_times(&more, &sent, 6);
    Ok(())
}

#[test]
fn what_was_recorded_over_ipv4_and_ipv6_is_replayed_in_every_loop() -> Result<()> {
    let World { lab, online, target } = world()?;
    let (v4, v6) = (lab.online().v4(), lab.online().v6());
    let prefix = lab.dir().join("recorded");
    let mut command = lab.online().command(tool("replayer")?);
    command
        .args(["record", "-i", NIC, "-x", &format!("udp:{PORT}"), "--file-size", "0.1", "-w"])
        .arg(&prefix);
    let mut record = start(&lab, lab.online(), "record", &mut command)?;
    record.wait_for_message("record ready", Duration::from_secs(15))?;
    ask(&lab, SocketAddr::new(v4.into(), PORT), EACH)?;
    ask(&lab, SocketAddr::new(v6.into(), PORT), EACH)?;
    let sent = online.ledger(2 * ALL as usize);
    ensure!(record.stop()?.success(), "{}", record.errors());
    let recorded = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "pcapng");
    let files: Vec<PathBuf> =
        std::fs::read_dir(lab.dir())?.flatten().map(|entry| entry.path()).filter(recorded).collect();
    assert!(files.len() > 3, "{files:?}");
    let files = files.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>().join(",");

    let _assistant = Role::assistant(&lab, lab.assistant(), &[])?;
    let (target_v4, target_v6) = (lab.target().v4(), lab.target().v6());
    let services = format!("udp:{v4}:{PORT}-{target_v4}:{PORT},udp:[{v6}]:{PORT}-[{target_v6}]:{PORT}");
    let report = offline(&lab, &files, &services, &["--loop", "2", "--speed", "max"])?;
    let arrived = target.ledger(4 * ALL as usize);
    assert_times(&arrived, &sent, 2);
    for of_v6 in [false, true] {
        let count = arrived.iter().filter(|(from, _)| from.is_ipv6() == of_v6).count();
        assert_eq!(count as u64, 2 * ALL, "datagrams over {}", if of_v6 { "IPv6" } else { "IPv4" });
    }
    assert_eq!(report.counter("datagrams_sent"), 4 * ALL);
    assert_eq!(report.counter("datagram_responses"), 4 * ALL, "{:?}", report.counters);
    Ok(())
}
