//! A client connection as it was captured: its stream put in order, and where its turns begin. What its sessions do with the
//! stream is not decided here.

use crate::config::timing;
use crate::doubt::NEAR;
use crate::slab::{Column, Frontier, NONE, Slab};
use crate::timer::Tick;
use alloc::vec::Vec;
use replayer_common::addr::{Endpoint, is_v4_of};
use replayer_common::hash::pair_hash;
use replayer_common::packet::TcpSegment;
use replayer_common::tcp_options::TcpOptions;

/// How the client's stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has not.
    Open,
    /// FIN; `need` response bytes were read since the turn before.
    Fin { need: u32 },
    /// RST.
    Reset { need: u32 },
}

/// What is known of the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Open before capture began (or lost to a hole): waits for the first segment that surely starts a turn.
    Watching,
    /// Open before capture began, and known to be between two turns: the next data starts one.
    BetweenTurns,
    /// In step with the client: `next_seq` is the next byte.
    Following,
    /// TLS: seen, counted, not replayed.
    Encrypted,
    /// Nothing: the connection is over and its place is free.
    Forgotten,
}

/// Whose the packets of its addresses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its own.
    Current,
    /// Those of another connection, whose SYN came inside this one; but a segment with the next bytes of this stream would show that the
    /// SYN was not its client's.
    Earlier,
    /// Others': it is not in the client table any more, only its sessions still need it.
    Detached,
}

/// What ends the stream behind a hole, if nothing else comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EarlyEnd {
    /// Its sequence number.
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    /// RST, not FIN: a server believes it only if it has what is missing here (RFC 5961 section 3.2).
    pub(crate) is_reset: bool,
}

/// Where a stream that is watched was before it was seen further on: with a hole between, or that was not its client's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    /// The next number there.
    pub(crate) seq: u32,
    /// Where what was seen further on begins: up to there a hole may be filled late.
    pub(crate) until: u32,
    /// What the data just before `seq` acknowledges, if it came since.
    pub(crate) ack: Option<u32>,
}

impl Left {
    /// Before a hole: its first number, and the one after.
    pub(crate) fn before((seq, until): (u32, u32)) -> Left {
        Left { seq, until, ack: None }
    }

    /// Whether little is missing there, and nothing came since.
    pub(crate) fn is_narrow(&self) -> bool {
        self.ack.is_none() && self.until.wrapping_sub(self.seq) < NEAR
    }

    /// Whether this number is near there, and nothing was seen at it, as far as is known.
    pub(crate) fn has(&self, seq: u32) -> bool {
        seq.wrapping_sub(self.seq) < self.until.wrapping_sub(self.seq).min(NEAR)
    }
}

/// What a client's SYN says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Syn {
    pub(crate) isn: u32,
    mss: u16,
    window_scale: u8,
    sack_permitted: bool,
    timestamps: bool,
    ts_offset: u32,
}

impl Syn {
    pub(crate) fn new(isn: u32, options: &TcpOptions, now_ns: u64) -> Syn {
        let (timestamps, ts_offset) = clock(options, now_ns);
        Syn {
            isn,
            mss: options.mss.unwrap_or(536),
            window_scale: options.window_scale.map_or(NO_SCALE, |shift| shift.min(14)),
            sack_permitted: options.sack_permitted,
            timestamps,
            ts_offset,
        }
    }
}

/// Whether the client sends timestamps, and what makes a TSval of our milliseconds.
fn clock(options: &TcpOptions, now_ns: u64) -> (bool, u32) {
    let offset = options.timestamps.map(|(value, _)| value.wrapping_sub(crate::sender::millis(now_ns)));
    (offset.is_some(), offset.unwrap_or(0))
}

/// One cache line: all that a packet with the next data of its stream reads and changes, and an acknowledgment of it. What else there is of
/// a connection is in its [`Origin`] and its [`Rarity`].
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Connection {
    pub(crate) client: Endpoint,
    /// Which of the known servers its server is, see [`Servers`].
    known_server: u8,
    pub(crate) ack_known: bool,
    // These four side by side: see `goes_on`.
    pub(crate) phase: Phase,
    pub(crate) place: Place,
    /// Data was appended.
    pub(crate) any_data: bool,
    /// Its stream has a hole, an end, a SYN inside it, or another place where it may go on.
    interrupted: bool,
    /// The client sends timestamps.
    pub(crate) timestamps: bool,
    /// What its SYN offered, for sessions opened later: `NO_SCALE` if it was none.
    window_scale: u8,
    pub(crate) mss: u16,
    /// The sessions that it wants, of all its services.
    wanted: u16,
    /// Its sessions that take data: they are not cut.
    pub(crate) takers: u16,
    /// Watching: the end of the last data seen. Following: the next byte in order.
    pub(crate) next_seq: u32,
    /// The highest ACK number on data (before data: on the handshake's last ACK).
    pub(crate) last_ack: u32,
    pub(crate) last_seen: Tick,
    pub(crate) first_session: u32,
    /// Held segments in order, oldest first.
    pub(crate) head: u32,
    pub(crate) tail: u32,
    /// Places of the store that the held segments take, those behind a hole too.
    pub(crate) held_places: u32,
    /// What makes a TSval of the engine's milliseconds: the same for all sessions of the connection, so that one that is opened again
    /// goes on where its predecessor was (RFC 7323 section 5, RFC 6191).
    ts_offset: u32,
}

/// How a connection began: read when its client sends another SYN, and when sessions are opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// The number of the client's SYN, where it is known to have `BEGAN_WITH_SYN`.
    isn: u32,
    /// The place of the connection's [`Rarity`], or `NONE`.
    rarity: u32,
    /// Copies wanted of each of its services.
    copies: u16,
    /// What is so of it, in bits: there are a million connections.
    so: u8,
}

impl Origin {
    /// It began with a SYN that was captured.
    const BEGAN_WITH_SYN: u8 = 1;
    /// HTTP/2: responses do not alternate with requests.
    pub(crate) const MULTIPLEXED: u8 = 2;
    /// It was counted that its address does not fit a target's.
    pub(crate) const FAMILY_COUNTED: u8 = 4;
    /// Its SYN did not permit SACK.
    const SACK_REFUSED: u8 = 8;

    pub(crate) fn has(&self, what: u8) -> bool {
        self.so & what != 0
    }

    pub(crate) fn set(&mut self, what: u8, so: bool) {
        self.so = if so { self.so | what } else { self.so & !what };
    }

    /// The number of its SYN, if it began with one that was captured.
    pub(crate) fn isn(&self) -> Option<u32> {
        self.has(Origin::BEGAN_WITH_SYN).then_some(self.isn)
    }

    pub(crate) fn sack_permitted(&self) -> bool {
        !self.has(Origin::SACK_REFUSED)
    }

    /// Copies wanted of each of its services.
    pub(crate) fn copies(&self) -> u16 {
        self.copies
    }
}

/// What few connections have: a hole in the stream, an end, a SYN inside it, another place where it may go on, or a server that is not among those
/// known. There only while one of them is so.
#[derive(Clone, Copy, Debug)]
struct Rarity {
    /// Whose it is; `NONE`: nobody's, the place is free.
    connection: u32,
    end: End,
    /// Held segments behind a hole, sorted: the first and the last.
    out_of_order: u32,
    out_of_order_tail: u32,
    early_end: Option<EarlyEnd>,
    /// A SYN of another number than its own, which its client may not have sent.
    syn_inside: Option<Syn>,
    /// Watching: where it may go on as well.
    left: Option<Left>,
    /// Since when there is a hole.
    gap_since: Tick,
    /// The stream has gone on before it since then.
    goes_on: bool,
    /// Steps through the held segments behind it that are not made up for yet.
    walked: u32,
    /// The held segment to which the last of these walks led, or `NONE`.
    walked_to: u32,
    /// Where its number is `UNKNOWN`.
    server: Endpoint,
}

// Whoever needs more has to look for what is not needed any more: a million of them are read at random.
const _: () = assert!(size_of::<Connection>() == 64 && size_of::<Origin>() == 12);

/// A connection that is about to have a place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewConnection {
    pub(crate) connection: Connection,
    pub(crate) server: Endpoint,
    origin: Origin,
}

/// The servers that connections were made to, each known by a number in the connection's first cache line. There are few; if there are
/// more at once, the rest have none, and are compared in full.
#[derive(Debug)]
pub(crate) struct Servers {
    known: Vec<Endpoint>,
    /// Connections with each number: without any, it may become another server's.
    connections: [u32; KNOWN_SERVERS],
}

/// So many are known.
const KNOWN_SERVERS: usize = 64;
const UNKNOWN: u8 = u8::MAX;
/// An acknowledgment that is behind another by no more than the largest window (RFC 7323 section 2.3) is older. Any other is further on, for a
/// client may read more than 2 GiB between two requests.
const LARGEST_WINDOW: u32 = 1 << 30;
/// No shift is above 14 (RFC 7323 section 2.3).
const NO_SCALE: u8 = u8::MAX;

impl Servers {
    pub(crate) fn new() -> Servers {
        Servers { known: Vec::with_capacity(KNOWN_SERVERS), connections: [0; KNOWN_SERVERS] }
    }

    /// The server's number, for another connection to it; to be given back by [`Servers::leave`].
    fn join(&mut self, server: &Endpoint) -> u8 {
        let known = self.known.iter().position(|known| known == server);
        let free = || self.connections[..self.known.len()].iter().position(|&connections| connections == 0);
        let number = match known.or_else(free) {
            Some(number) => number,
            None if self.known.len() == KNOWN_SERVERS => return UNKNOWN,
            None => {
                self.known.push(*server);
                self.known.len() - 1
            }
        };
        self.known[number] = *server;
        self.connections[number] += 1;
        number as u8
    }

    fn leave(&mut self, number: u8) {
        if let Some(connections) = self.connections.get_mut(usize::from(number)) {
            *connections -= 1;
        }
    }
}

/// Both ends of a segment over IPv4, the client's first. The bytes of addresses are as they are in memory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PlainEnds {
    pub(crate) src: u32,
    pub(crate) dst: u32,
    pub(crate) src_port: u16,
    pub(crate) dst_port: u16,
}

impl NewConnection {
    pub(crate) fn new(client: Endpoint, server: Endpoint, phase: Phase, now: Tick) -> NewConnection {
        let connection = Connection {
            client,
            known_server: UNKNOWN,
            interrupted: false,
            phase,
            place: Place::Current,
            any_data: false,
            next_seq: 0,
            last_ack: 0,
            ack_known: false,
            wanted: 0,
            takers: 0,
            first_session: NONE,
            head: NONE,
            tail: NONE,
            held_places: 0,
            last_seen: now,
            mss: 1460,
            window_scale: 7,
            timestamps: false,
            ts_offset: 0,
        };
        let origin = Origin { isn: 0, rarity: NONE, copies: 0, so: 0 };
        NewConnection { connection, server, origin }
    }

    /// It begins with this SYN.
    pub(crate) fn set_syn(&mut self, syn: &Syn) {
        self.origin.isn = syn.isn;
        self.origin.set(Origin::BEGAN_WITH_SYN, true);
        self.origin.set(Origin::SACK_REFUSED, !syn.sack_permitted);
        let connection = &mut self.connection;
        connection.next_seq = syn.isn.wrapping_add(1);
        (connection.mss, connection.window_scale) = (syn.mss, syn.window_scale);
        (connection.timestamps, connection.ts_offset) = (syn.timestamps, syn.ts_offset);
    }

    /// The same client's, of whose connection `old` a part was not seen.
    pub(crate) fn beside(old: &Connection, server: Endpoint, origin: &Origin, now: Tick) -> NewConnection {
        let mut new = NewConnection::new(old.client, server, Phase::Watching, now);
        new.origin.copies = origin.copies;
        new.origin.so = origin.so & !Origin::BEGAN_WITH_SYN;
        let connection = &mut new.connection;
        (connection.mss, connection.window_scale) = (old.mss, old.window_scale);
        (connection.timestamps, connection.ts_offset) = (old.timestamps, old.ts_offset);
        new
    }

    /// How many copies it wants of each of its services, if that is known.
    pub(crate) fn copies(&self) -> Option<u16> {
        (self.origin.copies > 0).then_some(self.origin.copies)
    }

    /// How many copies it wants of each of so many services.
    pub(crate) fn set_copies(&mut self, copies: u16, services: usize) {
        self.origin.copies = copies;
        self.connection.wanted = u16::try_from(usize::from(copies) * services).unwrap_or(u16::MAX);
    }
}

impl Connection {
    /// Takes the client's clock over, if it sends timestamps.
    pub(crate) fn set_timestamps(&mut self, options: &TcpOptions, now_ns: u64) {
        (self.timestamps, self.ts_offset) = clock(options, now_ns);
    }

    /// The TSval of its sessions.
    #[inline]
    pub(crate) fn ts_value(&self, now_ns: u64) -> u32 {
        self.ts_offset.wrapping_add(crate::sender::millis(now_ns))
    }

    /// Asks for the cache line that data needs, so that it is there when it comes.
    #[inline]
    pub(crate) fn read_ahead(&self) {
        replayer_prefetch::line(&self.client);
    }

    /// The window scale that its SYN offered.
    #[inline]
    pub(crate) fn window_scale(&self) -> Option<u8> {
        (self.window_scale != NO_SCALE).then_some(self.window_scale)
    }

    /// How far beyond the last acknowledgment a session's target may send, bytes: what every segment of ours says (RFC 7323 section 2.3).
    pub(crate) fn receive_window(&self) -> u32 {
        u32::from(crate::sender::WINDOW) << self.window_scale().unwrap_or(0)
    }

    /// The sessions that it wants, of all its services.
    #[inline]
    pub(crate) fn wanted(&self) -> u32 {
        u32::from(self.wanted)
    }

    /// Whether its stream is followed, has begun, and nothing interrupts it; nor has a new SYN taken its place.
    #[inline(always)]
    pub(crate) fn goes_on(&self) -> bool {
        // One comparison of four bytes.
        let so = [self.phase as u8, self.place as u8, self.any_data as u8, self.interrupted as u8];
        u32::from_ne_bytes(so) == u32::from_ne_bytes([Phase::Following as u8, Place::Current as u8, 1, 0])
    }

    /// Whether packets of its addresses are others' for good.
    pub(crate) fn is_detached(&self) -> bool {
        self.place == Place::Detached
    }

    /// Whether the client has been heard of since the SYN with which it began.
    pub(crate) fn is_known(&self) -> bool {
        self.any_data || self.ack_known || self.phase != Phase::Following
    }

    /// Whether its stream has neither a hole nor an end, nor a SYN inside it, nor another place where it may go on.
    #[inline]
    pub(crate) fn is_uninterrupted(&self) -> bool {
        !self.interrupted
    }

    /// How long nothing may be captured of it until it is forgotten, ticks. `crowded`: whether others may soon need its place.
    pub(crate) fn idle_limit(&self, crowded: bool) -> u32 {
        match self.phase {
            Phase::Watching | Phase::Encrypted if self.first_session == NONE => timing::WATCHED_IDLE,
            _ if self.place == Place::Earlier && self.first_session == NONE => timing::WATCHED_IDLE,
            _ if !self.is_known() => timing::HALF_OPEN_IDLE,
            // One whose place another has taken is likely to be over.
            _ if crowded || self.place != Place::Current => timing::CROWDED_IDLE,
            _ => timing::CONNECTION_IDLE,
        }
    }

    /// Whether `ack` says that the client has read more of the response than `last_ack` says.
    pub(crate) fn ack_advances(&self, ack: u32) -> bool {
        self.ack_known && acknowledges_more(self.last_ack, ack)
    }
}

/// Whether who acknowledges `ack` has read more than who acknowledged `before`.
pub(crate) fn acknowledges_more(before: u32, ack: u32) -> bool {
    before.wrapping_sub(ack) > LARGEST_WINDOW
}

/// The connections, by place: each in its cache line, and what it has besides in places that data does not touch.
#[derive(Debug)]
pub(crate) struct Connections {
    connections: Slab<Connection>,
    origins: Column<Origin>,
    rarities: Slab<Rarity>,
    servers: Servers,
}

impl Connections {
    /// Room for `capacity` connections.
    pub(crate) fn new(capacity: usize) -> Connections {
        Connections {
            connections: Slab::new(capacity),
            origins: Column::new(capacity),
            rarities: Slab::new(capacity),
            servers: Servers::new(),
        }
    }

    /// How far connections are filled, and how they began.
    pub(crate) fn frontiers(&self) -> [Frontier; 2] {
        [self.connections.frontier(), self.origins.frontier()]
    }

    /// Connections that are not forgotten.
    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Whether there is no room for another.
    pub(crate) fn is_full(&self) -> bool {
        self.connections.is_full()
    }

    /// One past the highest place that was ever in use.
    pub(crate) fn high_water(&self) -> u32 {
        self.connections.high_water()
    }

    /// A place for a connection, or `None` when all are taken.
    pub(crate) fn insert(&mut self, new: NewConnection) -> Option<u32> {
        let NewConnection { mut connection, server, origin } = new;
        if self.connections.is_full() {
            return None;
        }
        connection.known_server = self.servers.join(&server);
        let c = self.connections.insert(connection)?;
        self.origins.set(c, origin);
        if connection.known_server == UNKNOWN {
            self.change(c, |rarity| rarity.server = server);
        }
        Some(c)
    }

    /// Gives the place back.
    pub(crate) fn remove(&mut self, c: u32) {
        let connection = &mut self.connections[c];
        (connection.phase, connection.interrupted) = (Phase::Forgotten, false);
        self.servers.leave(connection.known_server);
        self.connections.remove(c);
        self.drop_rarity(c);
    }

    pub(crate) fn origin(&self, c: u32) -> &Origin {
        &self.origins[c]
    }

    pub(crate) fn origin_mut(&mut self, c: u32) -> &mut Origin {
        &mut self.origins[c]
    }

    fn rarity(&self, c: u32) -> Option<&Rarity> {
        match self.origins[c].rarity {
            NONE => None,
            place => Some(&self.rarities[place]),
        }
    }

    /// What interrupts its stream, if anything does: most often said without a look at any other line than its own.
    #[inline]
    fn interruption(&self, c: u32) -> Option<&Rarity> {
        if self.connections[c].interrupted { self.rarity(c) } else { None }
    }

    /// Changes what is rare of it. There is a place for every connection.
    fn change(&mut self, c: u32, change: impl FnOnce(&mut Rarity)) {
        let (connection, origin) = (&mut self.connections[c], &mut self.origins[c]);
        if origin.rarity == NONE {
            let rarity = Rarity {
                connection: c,
                end: End::Open,
                out_of_order: NONE,
                out_of_order_tail: NONE,
                early_end: None,
                syn_inside: None,
                left: None,
                gap_since: 0,
                goes_on: false,
                walked: 0,
                walked_to: NONE,
                server: connection.client,
            };
            origin.rarity = self.rarities.insert(rarity).unwrap_or(NONE);
        }
        let rarity = &mut self.rarities[origin.rarity];
        change(rarity);
        connection.interrupted = rarity.end != End::Open
            || rarity.out_of_order != NONE
            || rarity.early_end.is_some()
            || rarity.syn_inside.is_some()
            || rarity.left.is_some();
        if !connection.interrupted && connection.known_server != UNKNOWN {
            self.drop_rarity(c);
        }
    }

    fn drop_rarity(&mut self, c: u32) {
        let place = core::mem::replace(&mut self.origins[c].rarity, NONE);
        if place != NONE {
            self.rarities[place].connection = NONE;
            self.rarities.remove(place);
        }
    }

    /// The server that the client connected to.
    #[inline]
    pub(crate) fn server(&self, c: u32) -> &Endpoint {
        let connection = &self.connections[c];
        match self.servers.known.get(usize::from(connection.known_server)) {
            Some(server) => server,
            None => self.rarity(c).map_or(&connection.client, |rarity| &rarity.server),
        }
    }

    /// Whether it is in the client table and this is one of its segments.
    #[inline]
    pub(crate) fn is_of(&self, c: u32, segment: &TcpSegment) -> bool {
        let (connection, server) = (&self.connections[c], self.server(c));
        connection.client.ip == segment.src
            && server.ip == segment.dst
            && (connection.client.port, server.port) == (segment.src_port, segment.dst_port)
            && connection.place == Place::Current
    }

    /// The same of a segment over IPv4, but for whether the connection is in the table: [`Connection::goes_on`] says so.
    #[inline(always)]
    pub(crate) fn is_of_plain(&self, c: u32, ends: &PlainEnds) -> bool {
        let (connection, server) = (&self.connections[c], self.server(c));
        let is = |end: &Endpoint, ip: u32, port: u16| is_v4_of(&end.ip, ip) && end.port == port;
        is(&connection.client, ends.src, ends.src_port) && is(server, ends.dst, ends.dst_port)
    }

    /// Its place in the client table.
    pub(crate) fn hash(&self, c: u32, seed: u64) -> u32 {
        let (client, server) = (&self.connections[c].client, self.server(c));
        pair_hash(seed, &client.ip, client.port, &server.ip, server.port)
    }

    /// Whether it waits for a hole to be filled.
    pub(crate) fn has_hole(&self, c: u32) -> bool {
        self.interruption(c).is_some_and(|rare| rare.out_of_order != NONE || rare.early_end.is_some())
    }

    /// How its stream ended.
    #[inline]
    pub(crate) fn end(&self, c: u32) -> End {
        self.interruption(c).map_or(End::Open, |rarity| rarity.end)
    }

    /// The first segment behind a hole, or `NONE`.
    pub(crate) fn out_of_order(&self, c: u32) -> u32 {
        self.interruption(c).map_or(NONE, |rarity| rarity.out_of_order)
    }

    /// The last segment behind a hole, where there is one.
    pub(crate) fn out_of_order_tail(&self, c: u32) -> u32 {
        self.interruption(c).map_or(NONE, |rarity| rarity.out_of_order_tail)
    }

    /// What ends the stream behind a hole.
    pub(crate) fn early_end(&self, c: u32) -> Option<EarlyEnd> {
        self.interruption(c)?.early_end
    }

    /// A SYN inside the stream.
    pub(crate) fn syn_inside(&self, c: u32) -> Option<Syn> {
        self.interruption(c)?.syn_inside
    }

    pub(crate) fn set_syn_inside(&mut self, c: u32, syn: Option<Syn>) {
        if self.syn_inside(c) != syn {
            self.change(c, |rarity| rarity.syn_inside = syn);
        }
    }

    /// Where else the stream may go on.
    pub(crate) fn left(&self, c: u32) -> Option<Left> {
        self.interruption(c)?.left
    }

    pub(crate) fn set_left(&mut self, c: u32, left: Option<Left>) {
        if self.left(c) != left {
            self.change(c, |rarity| rarity.left = left);
        }
    }

    pub(crate) fn set_end(&mut self, c: u32, end: End) {
        self.change(c, |rarity| rarity.end = end);
    }

    pub(crate) fn set_out_of_order(&mut self, c: u32, first: u32) {
        if self.out_of_order(c) != first {
            // Whatever is held no longer was the first before.
            self.change(c, |rarity| (rarity.out_of_order, rarity.walked_to) = (first, NONE));
        }
    }

    /// To be called where there is a first one.
    pub(crate) fn set_out_of_order_tail(&mut self, c: u32, last: u32) {
        self.change(c, |rarity| rarity.out_of_order_tail = last);
    }

    /// What is held ends with `last`, which was not the last one.
    pub(crate) fn cut_out_of_order(&mut self, c: u32, last: u32) {
        self.change(c, |rarity| (rarity.out_of_order_tail, rarity.walked_to) = (last, NONE));
    }

    pub(crate) fn set_early_end(&mut self, c: u32, end: Option<EarlyEnd>) {
        if self.early_end(c) != end {
            self.change(c, |rarity| rarity.early_end = end);
        }
    }

    /// The held segment to which the last walk led, or `NONE`: none yet, or not since the first one is another.
    pub(crate) fn walked_to(&self, c: u32) -> u32 {
        self.interruption(c).map_or(NONE, |rarity| rarity.walked_to)
    }

    /// Takes note of `steps` through the held segments, which led `to` one of them, for the sake of a segment that makes up for `free` steps;
    /// how many were too many so far.
    pub(crate) fn walk(&mut self, c: u32, steps: u32, to: u32, free: u32) -> u32 {
        self.change(c, |rarity| {
            rarity.walked = (rarity.walked + steps).saturating_sub(free);
            rarity.walked_to = to;
        });
        self.walked(c)
    }

    /// Steps that were too many so far.
    pub(crate) fn walked(&self, c: u32) -> u32 {
        self.rarity(c).map_or(0, |rarity| rarity.walked)
    }

    /// Forgets them: nothing is held yet.
    pub(crate) fn forget_walk(&mut self, c: u32) {
        if self.rarity(c).is_some_and(|rarity| rarity.walked > 0) {
            self.change(c, |rarity| rarity.walked = 0);
        }
    }

    /// Its hole is open since `since`. Returns the hole's number, which is another's when it is filled.
    pub(crate) fn open_hole(&mut self, c: u32, since: Tick) -> u32 {
        self.change(c, |rarity| (rarity.gap_since, rarity.goes_on) = (since, false));
        self.origins[c].rarity
    }

    /// Takes note that the stream goes on before its hole.
    pub(crate) fn go_on_before_hole(&mut self, c: u32) {
        self.change(c, |rarity| rarity.goes_on = true);
    }

    /// Whether it has gone on since its hole was opened.
    pub(crate) fn went_on_before_hole(&self, c: u32) -> bool {
        self.interruption(c).is_some_and(|rarity| rarity.goes_on)
    }

    /// Since when its hole is open, if it has one.
    pub(crate) fn gap_since(&self, c: u32) -> Option<Tick> {
        self.has_hole(c).then(|| self.rarity(c).map_or(0, |rarity| rarity.gap_since))
    }

    /// One past the highest number that a hole ever had.
    pub(crate) fn holes(&self) -> u32 {
        self.rarities.high_water()
    }

    /// Whose hole has this number, if it is still open, and since when.
    pub(crate) fn hole(&self, number: u32) -> Option<(u32, Tick)> {
        let c = self.rarities[number].connection;
        if c == NONE { None } else { Some((c, self.gap_since(c)?)) }
    }

    /// Panics unless each rarity is that of one connection that needs it. Returns the number of its hole, if it has one.
    #[cfg(debug_assertions)]
    pub(crate) fn check(&self, c: u32) -> Option<u32> {
        let (connection, place) = (&self.connections[c], self.origins[c].rarity);
        assert_eq!(
            place != NONE,
            connection.interrupted || connection.known_server == UNKNOWN,
            "what is rare has a place: {connection:?}"
        );
        assert!(
            place == NONE || self.rarities[place].connection == c,
            "the place is its own: {connection:?}"
        );
        self.has_hole(c).then_some(place)
    }

    #[cfg(debug_assertions)]
    pub(crate) fn is_rare(&self, c: u32) -> bool {
        self.origins[c].rarity != NONE
    }

    /// Rarities that are somebody's.
    #[cfg(debug_assertions)]
    pub(crate) fn rare(&self) -> usize {
        self.rarities.len()
    }
}

impl core::ops::Index<u32> for Connections {
    type Output = Connection;
    #[inline]
    fn index(&self, c: u32) -> &Connection {
        &self.connections[c]
    }
}

impl core::ops::IndexMut<u32> for Connections {
    #[inline]
    fn index_mut(&mut self, c: u32) -> &mut Connection {
        &mut self.connections[c]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    #[test]
    fn segments_are_told_apart_by_their_server_also_where_there_are_more_than_are_known() {
        let mut connections = Connections::new(2 * KNOWN_SERVERS);
        let client = Endpoint { ip: from_v4([192, 0, 2, 1]), port: 40_000 };
        let server =
            |i: usize| Endpoint { ip: from_v4([10, 0, 0, (i / 2) as u8]), port: 80 + (i % 2) as u16 };
        for i in 0..2 * KNOWN_SERVERS {
            let new = NewConnection::new(client, server(i), Phase::Following, 0);
            assert_eq!(connections.insert(new), Some(i as u32));
        }
        assert_eq!(connections.servers.known.len(), KNOWN_SERVERS);
        let known = |connections: &Connections, c: u32| connections[c].known_server != UNKNOWN;
        assert!((0..2 * KNOWN_SERVERS as u32).all(|c| known(&connections, c) == (c < KNOWN_SERVERS as u32)));
        for i in 0..2 * KNOWN_SERVERS {
            for to in 0..2 * KNOWN_SERVERS {
                let Endpoint { ip: dst, port: dst_port } = server(to);
                let segment = TcpSegment {
                    src: client.ip,
                    dst,
                    src_port: client.port,
                    dst_port,
                    seq: 0,
                    ack: 0,
                    flags: 0,
                    window: 0,
                    ip_offset: 14,
                    tcp_offset: 34,
                    payload_offset: 54,
                    payload_len: 0,
                    is_v6: false,
                    ce: false,
                };
                assert_eq!(connections.is_of(i as u32, &segment), i == to, "connection {i}, segment to {to}");
            }
        }
        // Those to which no connection is left make room.
        connections.remove(7);
        let new = NewConnection::new(client, server(1_000), Phase::Following, 0);
        let c = connections.insert(new).unwrap();
        assert!(known(&connections, c) && *connections.server(c) == server(1_000));
        let another = NewConnection::new(client, server(8), Phase::Following, 0);
        assert!(connections.insert(another).is_none(), "no room for it, and no number taken");
        for c in 0..2 * KNOWN_SERVERS as u32 {
            connections.remove(c);
        }
        assert!(connections.servers.connections.iter().all(|&connections| connections == 0));
    }
}
