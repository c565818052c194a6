//! Clients that are made up: what they send, when, and how it is cut into segments.

use crate::lab::wire::Segment;
use crate::lab::{MS, S};
use crate::network::Random;
use crate::streams::{Answer, Arrivals, CapturePath, Ending, Stream, Turn};
use replayer_common::addr::Endpoint;
use replayer_common::packet::flags;

/// What kind of protocol a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Habit {
    /// Requests and responses.
    Requests,
    /// A few requests at once.
    Pipelined,
    /// The server greets first.
    Greeted,
    /// Both sides send when they like.
    Streaming,
    /// The first request travels in the SYN (RFC 7413).
    FastOpen,
}

/// How clients of a world behave.
#[derive(Clone, Debug)]
pub struct Shape {
    pub server: Endpoint,
    pub path: CapturePath,
    /// Receive offload: the capture sees packets larger than the MSS.
    pub offload: bool,
    /// 802.1Q tags on the captured side.
    pub tags: usize,
    /// The longest request, bytes.
    pub longest: u32,
    pub requests: u32,
}

const TIMEOUT: u64 = 200 * MS;

struct Client<'a> {
    shape: &'a Shape,
    arrivals: Arrivals<'a>,
    stream: Stream,
    online_isn: u32,
    mss: usize,
    timestamps: bool,
    sack: bool,
    /// Response bytes that the client has read.
    read: u32,
}

/// A client's connection, from its SYN at `begin` on.
pub fn make(
    client: Endpoint,
    isn: u32,
    begin: u64,
    habit: Habit,
    end: Ending,
    shape: &Shape,
    random: &mut Random,
) -> Stream {
    let mut choices = Random::new(random.draw());
    let online_isn = choices.draw() as u32;
    let mut this = Client {
        shape,
        online_isn,
        mss: 500 + choices.below(960) as usize,
        timestamps: choices.chance(500),
        sack: choices.chance(700),
        read: 0,
        arrivals: Arrivals::new(shape.path, random),
        stream: Stream {
            client,
            server: shape.server,
            isn,
            bytes: Vec::new(),
            answers: Vec::new(),
            pushes: None,
            turns: Vec::new(),
            packets: Vec::new(),
            end,
        },
    };
    this.live(begin, habit, &mut choices);
    let mut stream = this.stream;
    stream.packets = this.arrivals.finish();
    stream
}

impl Client<'_> {
    fn live(&mut self, begin: u64, habit: Habit, choices: &mut Random) {
        let first = if habit == Habit::FastOpen { self.request(400, choices) } else { 0..0 };
        let syn_data = self.slice(first);
        let arrived = self.send(begin, self.stream.isn, flags::SYN, &syn_data, S);
        // A round trip later.
        let mut now = arrived + 6 * MS;
        let isn = self.stream.isn;
        if habit == Habit::Greeted {
            let bytes = 20 + choices.below(200) as usize;
            self.stream.answers.push(Answer { after: 0, bytes });
            now = self.send(now, isn.wrapping_add(1), flags::ACK, &[], TIMEOUT) + 6 * MS;
            self.read += bytes as u32;
        }
        let first_byte = isn.wrapping_add(1).wrapping_add(syn_data.len() as u32);
        now = self.send(now, first_byte, flags::ACK, &[], TIMEOUT);
        if habit == Habit::FastOpen {
            self.read += self.stream.answers.last().map_or(0, |answer| answer.bytes as u32);
            now += 5 * MS;
        }
        let push_begin = now;
        if habit == Habit::Streaming {
            let count = 20 + choices.below(60);
            let every = 5 + u64::from(choices.below(20));
            self.stream.pushes = Some((every, 50 + choices.below(800) as usize, count));
        }
        for _ in 0..1 + choices.below(self.shape.requests) {
            now += u64::from(choices.below(40)) * MS;
            if let Some((every, bytes, count)) = self.stream.pushes {
                let pushed = ((now - push_begin) / (every * MS)).min(u64::from(count)) as u32;
                self.read = pushed * bytes as u32;
            }
            let from = self.stream.bytes.len();
            let before = self.stream.answers.len();
            for _ in 0..if habit == Habit::Pipelined { 1 + choices.below(6) } else { 1 } {
                let longest = if choices.chance(100) { self.shape.longest } else { 900 };
                self.request(longest, choices);
            }
            if habit == Habit::Streaming {
                self.stream.answers.truncate(before);
            }
            self.stream.turns.push(Turn { offset: from, read: self.read });
            now = self.send_turn(now, from, choices);
            let answered: usize = self.stream.answers[before..].iter().map(|answer| answer.bytes).sum();
            self.read += answered as u32;
            now += MS / 2;
        }
        now += 5 * MS;
        let end = self.seq(self.stream.bytes.len());
        match self.stream.end {
            Ending::Fin => {
                self.send(now, end, flags::FIN | flags::ACK, &[], TIMEOUT);
            }
            Ending::Reset => {
                self.send(now, end, flags::RST | flags::ACK, &[], TIMEOUT);
            }
            Ending::Silence => {}
        }
    }

    /// Sends what was added since `from`; when the server has it all.
    fn send_turn(&mut self, now: u64, from: usize, choices: &mut Random) -> u64 {
        let upto = self.stream.bytes.len();
        let merged = if self.shape.offload { 1 + choices.below(40) as usize } else { 1 };
        let chunk = (self.mss * merged).min(60_000);
        let mut arrived = now;
        let mut at = from;
        while at < upto {
            let end = (at + chunk).min(upto);
            let push = if end == upto { flags::PSH } else { 0 };
            let bytes = self.slice(at..end);
            let sent = now + ((at - from) / chunk) as u64 * 20_000;
            arrived = arrived.max(self.send(sent, self.seq(at), flags::ACK | push, &bytes, TIMEOUT));
            // Some are sent again, joined with what follows.
            if choices.chance(30) {
                let end = (at + 200 + choices.below(1200) as usize).min(upto);
                let bytes = self.slice(at..end);
                self.send(sent + 3 * MS, self.seq(at), flags::ACK, &bytes, TIMEOUT);
            }
            at = end;
        }
        arrived
    }

    /// Adds a request to the stream.
    fn request(&mut self, longest: u32, choices: &mut Random) -> std::ops::Range<usize> {
        let from = self.stream.bytes.len();
        let upto = from + 8 + choices.below(longest) as usize;
        // No two places of any two streams look alike for long.
        let mut byte = Random::new(u64::from(self.stream.isn) << 20 | from as u64);
        self.stream.bytes.extend((from..upto).map(|_| Some(byte.draw() as u8)));
        self.stream.answers.push(Answer { after: upto, bytes: 1 + choices.below(3000) as usize });
        from..upto
    }

    fn seq(&self, offset: usize) -> u32 {
        self.stream.isn.wrapping_add(1).wrapping_add(offset as u32)
    }

    fn slice(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        self.stream.bytes[range].iter().map(|byte| byte.unwrap()).collect()
    }

    fn send(&mut self, at: u64, seq: u32, control: u8, payload: &[u8], timeout: u64) -> u64 {
        let syn = control & flags::SYN != 0;
        let segment = Segment {
            source: self.stream.client,
            destination: self.stream.server,
            seq,
            ack: if syn { 0 } else { self.online_isn.wrapping_add(1).wrapping_add(self.read) },
            flags: control,
            window: 500,
            mss: syn.then_some(self.mss as u16),
            window_scale: syn.then_some(7),
            sack_permitted: syn && self.sack,
            timestamps: self.timestamps.then_some((7_000_000u32.wrapping_add((at / MS) as u32), 5)),
            payload: payload.to_vec(),
        };
        let mut bytes = segment.to_bytes();
        for _ in 0..self.shape.tags {
            bytes.splice(12..12, [0x81, 0x00, 0x00, 0x07]);
        }
        self.arrivals.send(at, timeout, &bytes)
    }
}
