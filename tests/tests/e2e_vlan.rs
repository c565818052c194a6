//! Behaviour 11: requests that a mirror port brings with VLAN tags, and a target that is reached with tags, one (802.1Q) or two (QinQ).
//!
//! Root only; each test has a lab of its own.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use replayer_tests::clients::{Load, Watch};
use replayer_tests::lab::{Host, Lab, NIC, Plan};
use replayer_tests::packet::{FRAME_LIMIT, Frames, PacketSocket};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::servers::second_entrance;

const STREAM: u16 = 9000;

/// Copies what a host sends to another port of the switch, with tags in it.
struct MirrorPort {
    stop: Arc<AtomicBool>,
    copier: JoinHandle<Result<u64>>,
}

impl MirrorPort {
    fn start(lab: &Lab, host: &Host, to: &str, tags: &'static [u8]) -> Result<Self> {
        let open = |port: &str| lab.switch().enter(|| PacketSocket::open(port, Frames::Arriving))?;
        let (from, to) = (open(host.name())?, open(to)?);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let copier = std::thread::spawn(move || {
            let (mut copied, mut buffer) = (0, vec![0; FRAME_LIMIT]);
            while !stopped.load(Ordering::Acquire) {
                while let Some(length) = from.receive(&mut buffer)? {
                    // Tags stand between the addresses and the type of what follows.
                    let (addresses, rest) = buffer[..length].split_at(12);
                    to.send(&[addresses, tags, rest].concat())?;
                    copied += 1;
                }
                poll(&mut [PollFd::new(from.as_fd(), PollFlags::POLLIN)], PollTimeout::from(20u8))?;
            }
            Ok(copied)
        });
        Ok(Self { stop, copier })
    }

    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Release);
        self.copier.join().map_err(|_| anyhow!("the mirror port's thread panicked"))?
    }
}

#[test]
fn b011_tagged_packets_of_a_mirror_port_are_replayed() -> Result<()> {
    let [one, two] = [&[0x81, 0, 0, 7][..], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 7]];
    let ways = ["mirror", "ring", "span"].into_iter().flat_map(|way| [(way, one), (way, two)]);
    for (way, tags) in ways {
        let lab = Lab::up(Plan { offloads: false, ..Plan::default() })?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let entrance = second_entrance(&lab, lab.online())?;
        // Room for a full packet and its tags.
        lab.switch().ip(&format!("link set {entrance} mtu 1508\n"))?;
        lab.online().namespace().ip("link set aside mtu 1508\n")?;
        let mirror_port = MirrorPort::start(&lab, lab.client(), &entrance, tags)?;
        let mut assistant = Role::assistant(&lab, lab.assistant(), &[])?;
        let services = [format!("{}:{}", lab.online().v4(), service(STREAM, lab.target().v4(), STREAM))];
        let assistants = [lab.assistant().v4().into()];
        let mut online =
            Role::online_at(&lab, lab.online(), "aside", &services, &assistants, &["--capture", way])?;
        twenty_connections(&lab, &mut streams)?;
        assert!(mirror_port.stop()? > 1000);
        let report = online.stop_online()?;
        assert_eq!(report.counter("sessions_completed"), 20, "{:?}", report.counters);
        assistant.stop::<serde_json::Value>()?;
    }
    Ok(())
}

/// 20 connections of 25 requests each; what they sent arrives at the target as it was.
fn twenty_connections(lab: &Lab, streams: &mut StreamPair) -> Result<()> {
    let load = format!(
        "--connect {}:{STREAM} --connections 20 --per-connection 25 --requests 500 --rate 1000 --body 1-8000 \
         --response 1-8000",
        lab.online().v4()
    );
    let summary = Load::run(lab, "load", &load)?;
    assert_eq!((summary.responses, summary.errors), (500, 0), "{summary:?}");
    streams.ensure_equal(500)?;
    streams.target.ended_record_of(500, ARRIVAL)?;
    Ok(())
}

/// Puts a host into a VLAN, as far as a port is concerned: packets to it must have the tags, which nft's `tagged` says.
///
/// A tag with the number 0 belongs to no VLAN, and the kernel takes such a packet as one without (net/core/dev.c, `__netif_receive_skb_core()`): so
/// the numbers are taken out, which needs no VLAN devices.
fn put_into_vlan(host: &Host, port: u16, tagged: &str) -> Result<()> {
    // The numbers are in the two bytes 14 bytes behind the beginning, and 18; nft has a name for one of them only.
    let second = if tagged.contains("8021ad") { "@ll,144,16 set 0" } else { "" };
    host.namespace().nft(&format!(
        "table netdev tags {{\nchain arriving {{ type filter hook ingress device {NIC} priority 1;\n\
         {tagged} {second} @ll,112,16 set 0 accept\ntcp dport {port} drop\n}}\n}}\n"
    ))
}

#[test]
fn b011_a_target_in_a_vlan_gets_every_packet_with_its_tags() -> Result<()> {
    for (tags, tagged) in [
        ("7", "ether type 8021q vlan id 7"),
        ("100.7", "ether type 8021ad vlan id 100 vlan type 8021q vlan id 7"),
    ] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let watch = Watch::arriving(lab.target(), &[("tagged", tagged)])?;
        put_into_vlan(lab.target(), STREAM, tagged)?;
        let replay = Replay::start(&lab, &[STREAM], &["--vlan", tags])?;
        twenty_connections(&lab, &mut streams)?;
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("sessions_completed"), 20, "{:?}", report.counters);
        let sent: u64 = report.workers.iter().map(|worker| worker.packets_transmitted).sum();
        assert_eq!(watch.packets()?["tagged"], sent, "{:?}", report.counters);
    }
    Ok(())
}
