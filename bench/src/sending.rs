//! Sending to a device: copies made by the engine, beside the TX ring alone, sendmmsg(2) on a raw socket, and tcpreplay's fastest
//! mode. The same frames into the same veth pair, whose far end drops them in XDP. A copy's time includes what the worker does with the
//! target's acknowledgment of it.

use crate::Options;
use crate::engine::counted::processor_time;
use crate::report::{Figure, Wanted};
use crate::traffic::{SMALL, SMALL_FRAME};
use crate::wire::{Cable, Replayer, alone, bare_transmit, rate, write_packet};
use anyhow::{Context, Result, ensure};
use nix::libc;
use replayer_engine::counters::Counter;
use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

/// What the subject measures.
pub const WHAT: &str = "sending 64-byte frames into a veth, one core";

const CONNECTIONS: u32 = 100;
const COPIES: u32 = 100;
/// Captured packets that are copied in a turn.
const CAPTURED: u32 = 4;
/// So many pieces of a second's measurement are compared with each other.
const PIECES: u32 = 5;
/// Messages of one sendmmsg call.
const MESSAGES: usize = 64;

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    alone(move || {
        let cable = Cable::new()?;
        let duration = Duration::from_millis(if options.quick { 100 } else { 1000 });
        // What a machine does differs from second to second more than the two differ that are compared most closely: in turn, in short pieces,
        // each with the mean of its neighbours, so that a machine which becomes faster or slower favours neither.
        let piece = duration / PIECES;
        let file = std::env::temp_dir().join(format!("replayer-bench-{}.pcap", std::process::id()));
        fs::write(&file, capture_file()).with_context(|| format!("writing {}", file.display()))?;
        let (mut samples, mut shares): ([Vec<f64>; 4], _) = (Default::default(), Vec::new());
        let measured = (0..if options.quick { 1 } else { 11 }).try_for_each(|_| {
            // A queue of the device has one AF_XDP socket at a time.
            let mut port = cable.sender()?;
            let mut amplified = Amplified::new(&mut port);
            let mut before = bare_transmit(&mut port, piece);
            for _ in 0..PIECES {
                let copies = amplified.rate(&mut port, piece);
                let after = bare_transmit(&mut port, piece);
                samples[0].push(copies / 1e3);
                samples[1].push(after / 1e3);
                shares.push(200.0 * copies / (before + after));
                before = after;
            }
            amplified.ensure_delivered()?;
            drop(port);
            samples[2].push(raw_socket(cable.mirror.near_index(), duration)? / 1e3);
            samples[3]
                .push(tcpreplay(cable.mirror.near(), &file, samples[3].last().copied(), duration)? / 1e3);
            anyhow::Ok(())
        });
        let _ = fs::remove_file(&file);
        measured?;
        let [copies, ring, raw, tcpreplay] = samples;
        let ring = Figure::median("bare TX ring", ring, "kpps");
        let raw = Figure::median("sendmmsg on a raw socket, past the qdisc", raw, "kpps");
        let tcpreplay = Figure::median("tcpreplay --topspeed --preload-pcap", tcpreplay, "kpps");
        let name = format!("replayer, {CONNECTIONS} connections x {COPIES}");
        let copies = Figure::median(name, copies, "kpps").beside("bare TX ring", ring.value);
        let share =
            Figure::median("replayer, as a share of the bare TX ring just before and after", shares, "%")
                .wanted(Wanted::AtLeast(95.0));
        let times = Figure::new("replayer, beside tcpreplay", copies.value / tcpreplay.value, "times")
            .wanted(Wanted::AtLeast(2.0));
        Ok(vec![copies, share, times, ring, raw, tcpreplay])
    })
}

/// For a profiler, and for a machine with other work: processor time of a frame of the bare TX ring and of a copy, in turn.
pub fn work() -> Result<()> {
    alone(|| {
        let cable = Cable::new()?;
        let mut port = cable.sender()?;
        let duration = Duration::from_millis(300);
        let mut amplified = Amplified::new(&mut port);
        for _ in 0..7 {
            let mut figures = [0.0; 2];
            for (figure, copies) in figures.iter_mut().zip([false, true]) {
                let (before, start) = (port.counters().transmitted, processor_time());
                if copies {
                    amplified.rate(&mut port, duration);
                } else {
                    bare_transmit(&mut port, duration);
                }
                let frames = port.counters().transmitted - before;
                *figure = (processor_time() - start) as f64 / frames as f64;
            }
            println!("ns a frame: bare TX ring {:.0}, copies {:.0}", figures[0], figures[1]);
        }
        amplified.ensure_delivered()
    })
}

/// A replayer whose captured packets have [`COPIES`] copies each.
pub(crate) struct Amplified {
    replayer: Replayer,
    captured: u32,
}

impl Amplified {
    /// Opens its sessions.
    pub(crate) fn new(port: &mut replayer::afxdp::Port) -> Amplified {
        let mut amplified = Amplified { replayer: Replayer::new(CONNECTIONS, COPIES), captured: 0 };
        for _ in 0..CONNECTIONS.div_ceil(CAPTURED) {
            amplified.turn(port);
        }
        amplified
    }

    /// How many packets left.
    fn turn(&mut self, port: &mut replayer::afxdp::Port) -> u64 {
        let before = port.counters().transmitted;
        // A few at a time: each makes a hundred.
        for _ in 0..CAPTURED {
            let Some(mut frame) = port.allocate() else { break };
            let len = write_packet(port.frame_mut(&mut frame), self.captured, CONNECTIONS);
            self.replayer.capture(frame, len);
            self.captured += 1;
        }
        self.replayer.turn(port);
        port.counters().transmitted - before
    }

    /// Packets a second that leave.
    pub(crate) fn rate(&mut self, port: &mut replayer::afxdp::Port, duration: Duration) -> f64 {
        rate(duration, || self.turn(port))
    }

    /// Fails unless all that was captured was sent and delivered.
    pub(crate) fn ensure_delivered(&self) -> Result<()> {
        let counters = self.replayer.counters();
        let delivered = counters[Counter::ReplayBytesDelivered];
        let expected = u64::from(self.captured - CONNECTIONS) * SMALL.payload as u64 * u64::from(COPIES);
        ensure!(delivered == expected, "{delivered} bytes delivered of {expected}: {counters:?}");
        self.replayer.ensure_sent()
    }
}

/// Packets a second by sendmmsg(2) on a raw packet socket without a queueing discipline, its fastest mode.
fn raw_socket(ifindex: u32, duration: Duration) -> Result<f64> {
    let protocol = i32::from((libc::ETH_P_ALL as u16).to_be());
    // SAFETY: no memory is passed; the result is looked at.
    let socket = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, protocol) };
    ensure!(socket >= 0, "a raw socket: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    let bypass = 1i32;
    // SAFETY: pointer and length are those of a live i32.
    let set = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_QDISC_BYPASS,
            (&raw const bypass).cast(),
            size_of::<i32>() as u32,
        )
    };
    ensure!(set == 0, "PACKET_QDISC_BYPASS: {}", std::io::Error::last_os_error());
    let mut frame = [0u8; SMALL_FRAME];
    write_packet(&mut frame, 1, 1);
    // SAFETY: all-zero is a valid value of these C structures.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = ifindex as i32;
    address.sll_halen = 6;
    let mut piece = libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: SMALL_FRAME };
    // SAFETY: as above.
    let mut message: libc::mmsghdr = unsafe { std::mem::zeroed() };
    message.msg_hdr.msg_name = (&raw mut address).cast();
    message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_ll>() as u32;
    message.msg_hdr.msg_iov = &raw mut piece;
    message.msg_hdr.msg_iovlen = 1;
    let mut messages = [message; MESSAGES];
    let mut failed = None;
    let rate = rate(duration, || {
        // SAFETY: each header points to the address, the piece and the frame above, which live on.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), MESSAGES as u32, 0) };
        if sent < 0 {
            failed = Some(std::io::Error::last_os_error());
        }
        sent.max(0) as u64
    });
    match failed {
        None => Ok(rate),
        Some(error) => Err(error).context("sendmmsg on a raw socket"),
    }
}

/// Packets a second that tcpreplay says it has sent. `before`, the rate of an earlier run in thousands, tells how many are about enough.
fn tcpreplay(device: &str, file: &std::path::Path, before: Option<f64>, duration: Duration) -> Result<f64> {
    let packets = before.unwrap_or(300.0) * 1e3 * duration.as_secs_f64();
    let loops = (packets / f64::from(CONNECTIONS)).ceil().max(1.0) as u64;
    let output = Command::new("tcpreplay")
        .args(["--topspeed", "--preload-pcap", &format!("--loop={loops}"), &format!("--intf1={device}")])
        .arg(file)
        .output()
        .context("starting tcpreplay (Debian package tcpreplay)")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "tcpreplay ended with {}: {said}", output.status);
    rated(&said).with_context(|| format!("tcpreplay says no rate: {said}"))
}

/// Reads `Rated: 1234.5 Bps, 0.67 Mbps, 890.12 pps`.
fn rated(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.trim_start().starts_with("Rated:"))?;
    line.split(',').find_map(|part| part.trim().strip_suffix(" pps"))?.trim().parse().ok()
}

/// A capture file with a data packet of each connection.
fn capture_file() -> Vec<u8> {
    let mut file = Vec::new();
    // Magic number, version 2.4, no offset, longest packet, Ethernet (the header of libpcap's savefile format).
    for word in [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1] {
        file.extend(word.to_le_bytes());
    }
    for i in 0..CONNECTIONS {
        for word in [0, i, SMALL_FRAME as u32, SMALL_FRAME as u32] {
            file.extend(word.to_le_bytes());
        }
        let mut frame = [0; SMALL_FRAME];
        write_packet(&mut frame, CONNECTIONS + i, CONNECTIONS);
        file.extend(frame);
    }
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_of_tcpreplay_is_read() {
        let text = "Actual: 10 packets (600 bytes) sent in 0.01 seconds\nRated: 60000.0 Bps, 0.480 Mbps, 1000.50 pps\n";
        assert_eq!(rated(text), Some(1000.5));
        assert_eq!(rated("nothing"), None);
    }
}
