//! A cable that delays, loses, duplicates and reorders frames on purpose, in one direction.
//!
//! It stands between two NICs of the lab's switch and passes on, as they are, all frames but those it was told to harm.
//! For labs without offloads: a frame must fit the MTU and carry its whole checksum.
//!
//! The standard output has a line for each frame that was lost or diverted: the bytes of data in it.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::{Parser, ValueEnum};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use replayer_tests::load::Random;
use replayer_tests::packet::{FRAME_LIMIT, Frames, PacketSocket};

/// Passes frames between two NICs and harms some of those that go from the first to the second.
#[derive(Debug, Parser)]
struct Arguments {
    /// NIC whose frames are harmed.
    #[arg(long)]
    from: String,
    /// NIC that they go to.
    #[arg(long)]
    to: String,
    /// Which TCP segments over IPv4 may be harmed.
    #[arg(long, value_enum, default_value_t = Only::All)]
    only: Only,
    /// Pass these on so much later.
    #[arg(long, value_name = "MS", default_value_t = 0)]
    delay_ms: u64,
    /// Share of these that is lost.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    loss: f64,
    /// Share of these that is passed on twice.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    duplicate: f64,
    /// Share of these that later ones overtake.
    #[arg(long, value_name = "PERCENT", default_value_t = 0.0)]
    reorder: f64,
    /// Lose only so many.
    #[arg(long, value_name = "COUNT", default_value_t = u64::MAX)]
    lose_at_most: u64,
    /// Harm only the N-th segment with data of each connection, counted from 1.
    #[arg(long, value_name = "N")]
    nth_data: Option<u64>,
    /// What is lost goes to this NIC instead: a host that has another end of it gets it past a capture on the first.
    #[arg(long, value_name = "NIC")]
    divert: Option<String>,
    /// Seed of what is chosen.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    /// Every TCP segment.
    All,
    /// SYN without ACK.
    Syn,
    /// SYN with ACK.
    SynAck,
    /// Segments with neither SYN nor RST.
    Established,
}

/// How much later a frame goes that others overtake: longer than it takes a burst to pass.
const REORDER_DELAY: Duration = Duration::from_millis(3);
/// Percentages are drawn as integers below this.
const WHOLE: u32 = 1_000_000;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let sockets = [
        PacketSocket::open(&arguments.from, Frames::Arriving)?,
        PacketSocket::open(&arguments.to, Frames::Arriving)?,
    ];
    let mut poll = Poll::new()?;
    for (index, socket) in sockets.iter().enumerate() {
        poll.registry().register(
            &mut SourceFd(&socket.as_fd().as_raw_fd()),
            Token(index),
            Interest::READABLE,
        )?;
    }
    let aside = arguments.divert.as_ref().map(|nic| PacketSocket::open(nic, Frames::Arriving)).transpose()?;
    eprintln!("impair: ready");
    let mut harm = Harm::new(arguments);
    // Frames to be passed on later: when, in which order, what.
    let mut later: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>> = BinaryHeap::new();
    let mut order = 0;
    let mut events = Events::with_capacity(8);
    let mut buffer = vec![0; FRAME_LIMIT];
    loop {
        let pause = later.peek().map(|Reverse((at, ..))| at.saturating_duration_since(Instant::now()));
        match poll.poll(&mut events, pause) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            other => other?,
        }
        while let Some(length) = sockets[1].receive(&mut buffer)? {
            pass(&sockets[0], &buffer[..length]);
        }
        while let Some(length) = sockets[0].receive(&mut buffer)? {
            let frame = &buffer[..length];
            let copies = harm.decide(frame);
            if copies.is_empty() {
                println!("{}", sender_of_data(frame).map_or(0, |(_, length)| length));
            }
            if let Some(aside) = aside.as_ref().filter(|_| copies.is_empty()) {
                pass(aside, frame);
            }
            for delay in copies {
                if delay.is_zero() {
                    pass(&sockets[1], frame);
                } else {
                    order += 1;
                    later.push(Reverse((Instant::now() + delay, order, frame.to_vec())));
                }
            }
        }
        while later.peek().is_some_and(|Reverse((at, ..))| *at <= Instant::now()) {
            if let Some(Reverse((_, _, frame))) = later.pop() {
                pass(&sockets[1], &frame);
            }
        }
    }
}

struct Harm {
    arguments: Arguments,
    random: Random,
    lost: u64,
    /// Segments with data by source address and port, where that matters.
    data_segments: HashMap<[u8; 6], u64>,
}

impl Harm {
    fn new(arguments: Arguments) -> Self {
        Self { random: Random::new(arguments.seed), lost: 0, data_segments: HashMap::new(), arguments }
    }

    /// How much later each of the copies of a frame goes; none when it is lost.
    fn decide(&mut self, frame: &[u8]) -> Vec<Duration> {
        if !is_meant(frame, self.arguments.only) || !self.is_nth(frame) {
            return vec![Duration::ZERO];
        }
        if self.lost < self.arguments.lose_at_most && self.draw(self.arguments.loss) {
            self.lost += 1;
            return Vec::new();
        }
        let mut delay = Duration::from_millis(self.arguments.delay_ms);
        if self.draw(self.arguments.reorder) {
            delay += REORDER_DELAY;
        }
        vec![delay; if self.draw(self.arguments.duplicate) { 2 } else { 1 }]
    }

    /// Whether a segment is the one of its connection that is to be harmed.
    fn is_nth(&mut self, frame: &[u8]) -> bool {
        let Some(wanted) = self.arguments.nth_data else { return true };
        let Some((sender, _)) = sender_of_data(frame) else { return false };
        let count = self.data_segments.entry(sender).or_default();
        *count += 1;
        *count == wanted
    }

    fn draw(&mut self, percent: f64) -> bool {
        f64::from(self.random.within(&(0..=WHOLE - 1))) < percent / 100.0 * f64::from(WHOLE)
    }
}

/// Whether a frame is a TCP segment over IPv4 of the kind that is to be harmed.
fn is_meant(frame: &[u8], only: Only) -> bool {
    const IPV4: [u8; 2] = [0x08, 0x00];
    let Some(header_length) = frame.get(14).map(|byte| usize::from(byte & 0x0f) * 4) else { return false };
    if frame.get(12..14) != Some(&IPV4[..]) || frame.get(23) != Some(&6) {
        return false;
    }
    let Some(flags) = frame.get(14 + header_length + 13) else { return false };
    let (syn, rst, ack) = (flags & 0x02 != 0, flags & 0x04 != 0, flags & 0x10 != 0);
    match only {
        Only::All => true,
        Only::Syn => syn && !ack,
        Only::SynAck => syn && ack,
        Only::Established => !syn && !rst,
    }
}

/// Source address and port of a TCP segment over IPv4 that carries data, and how many bytes of it.
fn sender_of_data(frame: &[u8]) -> Option<([u8; 6], usize)> {
    let ip = frame.get(14..)?;
    let header_length = usize::from(ip.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
    let tcp = ip.get(header_length..)?;
    let data_offset = usize::from(tcp.get(12)? >> 4) * 4;
    let mut sender = [0; 6];
    sender[..4].copy_from_slice(ip.get(12..16)?);
    sender[4..].copy_from_slice(tcp.get(..2)?);
    let length = total.checked_sub(header_length + data_offset)?;
    (length > 0).then_some((sender, length))
}

fn pass(socket: &PacketSocket, frame: &[u8]) {
    // What a cable cannot carry is lost, as on a cable.
    let _ = socket.send(frame);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(flags: u8) -> Vec<u8> {
        let mut frame = vec![0; 54];
        frame[12..14].copy_from_slice(&[0x08, 0x00]);
        frame[14] = 0x45;
        frame[17] = 40;
        frame[23] = 6;
        frame[46] = 0x50;
        frame[47] = flags;
        frame
    }

    #[test]
    fn one_segment_of_each_connection_is_lost() {
        let arguments = Arguments::parse_from(["impair", "--from=a", "--to=b", "--loss=100", "--nth-data=2"]);
        let mut harm = Harm::new(arguments);
        let from = |port: u8, data: u8| {
            let mut frame = segment(0x10);
            frame[17] += data;
            frame[35] = port;
            frame.resize(frame.len() + usize::from(data), 0);
            frame
        };
        let passed = |frame: Vec<u8>, harm: &mut Harm| harm.decide(&frame).len();
        let sent = [(1, 5), (1, 0), (2, 5), (1, 5), (1, 5), (2, 5)];
        let copies: Vec<usize> =
            sent.iter().map(|&(port, data)| passed(from(port, data), &mut harm)).collect();
        assert_eq!(copies, [1, 1, 1, 0, 1, 0]);
    }

    #[test]
    fn segments_are_told_apart() {
        assert!(is_meant(&segment(0x02), Only::Syn) && !is_meant(&segment(0x12), Only::Syn));
        assert!(is_meant(&segment(0x12), Only::SynAck) && !is_meant(&segment(0x10), Only::SynAck));
        assert!(is_meant(&segment(0x18), Only::Established) && !is_meant(&segment(0x04), Only::Established));
        assert!(!is_meant(&segment(0x18)[..40], Only::All));
    }

    #[test]
    fn shares_are_kept() {
        let arguments =
            Arguments::parse_from(["impair", "--from=a", "--to=b", "--loss=10", "--duplicate=50"]);
        let mut harm = Harm::new(arguments);
        let copies: Vec<usize> = (0..10_000).map(|_| harm.decide(&segment(0x10)).len()).collect();
        let count = |wanted| copies.iter().filter(|&&copies| copies == wanted).count();
        assert!((900..1100).contains(&count(0)), "{}", count(0));
        assert!((4200..4800).contains(&count(2)), "{}", count(2));
    }
}
