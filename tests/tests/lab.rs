//! The lab itself: reachability, routes and a clean end. Root only.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use replayer_tests::lab::{Host, Lab, Plan, remove};
use replayer_tests::namespace::Namespace;
use replayer_tests::process::Process;
use replayer_tests::servers::{Direction, impair};

/// One byte from `from` to a listener on `to`, and the peer's address as the listener saw it.
fn connect(from: &Host, to: &Host, address: IpAddr) -> IpAddr {
    let listener = to.namespace().enter(|| TcpListener::bind((address, 7000))).unwrap().unwrap();
    let mut stream = from
        .namespace()
        .enter(|| TcpStream::connect_timeout(&(address, 7000).into(), Duration::from_secs(5)))
        .unwrap()
        .unwrap();
    let (mut accepted, peer) = listener.accept().unwrap();
    accepted.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    peer.ip()
}

fn route(host: &Host, to: &str) -> String {
    let output = host.command("ip").args(["route", "get", to]).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn hosts_reach_each_other_and_the_target_answers_through_the_assistant() {
    for offloads in [true, false] {
        let lab = Lab::up(Plan { offloads, client_addresses: 3, ..Plan::default() }).unwrap();
        let (client, online, target, assistant) = (lab.client(), lab.online(), lab.target(), lab.assistant());
        assert_eq!(connect(client, online, online.v4().into()), client.v4());
        assert_eq!(connect(client, online, online.v6().into()), client.v6());
        connect(online, target, target.v4().into());
        connect(online, assistant, assistant.v6().into());
        for client in ["172.28.1.1", "172.29.7.7", "fd00:28:0:1::1", "fd00:29::7"] {
            let via = if client.contains(':') { "via fd00:28::31" } else { "via 172.28.0.31" };
            assert!(route(target, client).contains(via), "{}", route(target, client));
        }
        lab.down().unwrap();
    }
}

#[test]
fn a_lab_takes_its_processes_and_namespaces_along() {
    let lab = Lab::up(Plan { onlines: 2, ..Plan::default() }).unwrap();
    let (prefix, dir) = (format!("rpl-{}-", lab.id()), lab.dir());
    assert_eq!(Namespace::list(&prefix).len(), 6);
    // Detached: only the removal of the lab can end it.
    let mut sleeper =
        Process::start_detached(lab.host("online2").command("sleep").arg("60"), "sleep", &dir).unwrap();
    drop(lab);
    assert!(sleeper.wait(Duration::from_secs(5)).is_ok());
    assert!(Namespace::list(&prefix).is_empty());
    assert!(!dir.exists());
}

#[test]
fn an_impaired_cable_delays_what_it_is_told_to() {
    let lab = Lab::up(Plan { offloads: false, ..Plan::default() }).unwrap();
    let _cable = impair(&lab, lab.online(), Direction::FromHost, "--only syn-ack --delay-ms 200").unwrap();
    let before = Instant::now();
    connect(lab.client(), lab.online(), lab.online().v4().into());
    let took = before.elapsed();
    assert!(took >= Duration::from_millis(200) && took < Duration::from_millis(900), "{took:?}");
}

#[test]
fn a_persistent_lab_goes_with_its_process_until_it_is_complete() {
    let id = format!("kept{}", std::process::id());
    drop(Lab::up_persistent(&id, Plan::default()).unwrap());
    assert!(Lab::open(&id).unwrap().is_none());
    let mut lab = Lab::up_persistent(&id, Plan::default()).unwrap();
    lab.keep().unwrap();
    drop(lab);
    assert!(Lab::open(&id).unwrap().is_some());
    remove(&id).unwrap();
}
