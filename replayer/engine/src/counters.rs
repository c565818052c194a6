//! Where every captured packet, every client byte and every session ends: exactly one counter each.
//!
//! The identities that must hold are computed by [`Counters::identities`]; `docs/engine.md` lists them.

/// Defines the counters once: variant, name in reports, the kind of what it counts if it has one, what it counts.
macro_rules! counters {
    ($($variant:ident $name:literal $($kind:ident)? $what:literal,)*) => {
        /// A counter of the engine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Counter {
            $(#[doc = what!($($kind)? $what)] $variant,)*
        }

        impl Counter {
            /// All counters, in the order of the reports.
            pub const ALL: &'static [Counter] = &[$(Counter::$variant,)*];

            /// The name in reports.
            pub const fn name(self) -> &'static str {
                match self { $(Counter::$variant => $name,)* }
            }

            /// What it counts, for a person.
            pub const fn what(self) -> &'static str {
                match self { $(Counter::$variant => what!($($kind)? $what),)* }
            }

            /// The kind of what it counts, if it is one of these.
            pub const fn kind(self) -> Option<Kind> {
                match self { $(Counter::$variant => kind!($($kind)?),)* }
            }

            /// Whether it says that something of the traffic was not replayed.
            pub const fn is_loss(self) -> bool {
                matches!(self.kind(), Some(Kind::NotReplayed | Kind::NotOpened | Kind::NotDelivered))
            }
        }
    };
}

/// What a counter counts, for a person: begins with its kind.
macro_rules! what {
    (NotReplayed $what:literal) => {
        concat!("not replayed: ", $what)
    };
    (NotOpened $what:literal) => {
        concat!("not opened: ", $what)
    };
    (NotDelivered $what:literal) => {
        concat!("bytes not delivered: ", $what)
    };
    (Ended $what:literal) => {
        concat!("ended: ", $what)
    };
    ($what:literal) => {
        $what
    };
}

macro_rules! kind {
    () => {
        None
    };
    ($kind:ident) => {
        Some(Kind::$kind)
    };
}

/// The kind of what a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Captured, and not given to a session or sent.
    NotReplayed,
    /// A session that the traffic asked for.
    NotOpened,
    /// Given to a session, and not acknowledged by its target.
    NotDelivered,
    /// A session that was opened.
    Ended,
}

counters! {
    // Packets: `packets_captured` is the sum of the other packets_*.
    PacketsCaptured "packets_captured" "packets taken from the capture",
    PacketsSyn "packets_syn" "SYNs that opened a connection",
    PacketsSynRepeated "packets_syn_repeated" "SYNs seen again",
    PacketsData "packets_data" "packets with new client bytes that were accepted",
    PacketsEnd "packets_end" "FINs without new bytes, and RSTs, of a known connection",
    PacketsAck "packets_ack" "acknowledgments without data",
    PacketsDuplicate "packets_duplicate" "packets whose bytes had all been seen",
    PacketsDatagrams "packets_datagrams" "datagrams to UDP services, given to their targets",
    PacketsUnparsable "packets_unparsable" NotReplayed "not TCP over IP (nor UDP, where that is replayed), a fragment, truncated or malformed",
    PacketsNotService "packets_not_service" NotReplayed "not for a service",
    PacketsSampledOut "packets_sampled_out" NotReplayed "the connection is outside the sample",
    PacketsMidstream "packets_midstream" NotReplayed "of a connection that was open before, not yet at the start of a turn, or left out by -O",
    PacketsNoConnection "packets_no_connection" "FIN, RST or ACK of a connection that is unknown or over: there is nothing in it to replay",
    PacketsAfterEnd "packets_after_end" NotReplayed "after the connection's FIN or RST",
    PacketsTls "packets_tls" NotReplayed "of a TLS connection, which no other server can decrypt",
    PacketsOutOfWindow "packets_out_of_window" NotReplayed "sequence number far from the stream",
    PacketsDoubtful "packets_doubtful" "SYNs and RSTs inside an open connection, such as a server answers by a challenge ACK (RFC 5961): what its client sends next shows whether they were its own",
    PacketsLimit "packets_limit" NotReplayed "a limit on connections or held bytes was reached",
    PacketsNoSession "packets_no_session" NotReplayed "the rest of a turn whose sessions had ended",
    PacketsStopping "packets_stopping" NotReplayed "captured after the stop began",

    // Bytes as captured: `bytes_captured` is the sum of the other bytes_*, plus what waits for a hole to be filled.
    BytesCaptured "bytes_captured" "client bytes captured",
    BytesAccepted "bytes_accepted" "client bytes given to sessions",
    BytesDatagrams "bytes_datagrams" "bytes of datagrams given to the targets of UDP services",
    BytesDuplicate "bytes_duplicate" "client bytes seen before",
    BytesUnparsable "bytes_unparsable" NotReplayed "the capture had cut the packet short",
    BytesNotService "bytes_not_service" NotReplayed "not for a service",
    BytesSampledOut "bytes_sampled_out" NotReplayed "outside the sample",
    BytesMidstream "bytes_midstream" NotReplayed "before the first turn of a connection that was open before, or left out by -O",
    BytesAfterEnd "bytes_after_end" NotReplayed "after the connection's FIN or RST",
    BytesTls "bytes_tls" NotReplayed "of a TLS connection, which no other server can decrypt",
    BytesOutOfWindow "bytes_out_of_window" NotReplayed "sequence number far from the stream",
    BytesGap "bytes_gap" NotReplayed "behind a hole in the capture that was not filled in time",
    BytesLimit "bytes_limit" NotReplayed "a limit on connections or held bytes was reached",
    BytesNoSession "bytes_no_session" NotReplayed "the rest of a turn whose sessions had ended",
    BytesStopping "bytes_stopping" NotReplayed "captured after the stop began, or waiting for order when it came",

    // Bytes as replayed, summed over copies: offered = delivered + lost by reason + pending.
    ReplayBytesOffered "replay_bytes_offered" "client bytes given to sessions, times copies",
    ReplayBytesDelivered "replay_bytes_delivered" "bytes that the target acknowledged",
    LostTargetClosed "lost_bytes_target_closed" NotDelivered "the target closed in the middle of a turn",
    LostTargetReset "lost_bytes_target_reset" NotDelivered "the target reset the connection",
    LostRefused "lost_bytes_refused" NotDelivered "the target refused the connection",
    LostHandshakeTimeout "lost_bytes_handshake_timeout" NotDelivered "the target did not answer the SYN",
    LostRetransmitTimeout "lost_bytes_retransmit_timeout" NotDelivered "the target stopped acknowledging",
    LostClientReset "lost_bytes_client_reset" NotDelivered "the client reset its connection",
    LostGap "lost_bytes_gap" NotDelivered "a hole in the capture",
    LostLimit "lost_bytes_limit" NotDelivered "shed at a limit",
    LostTls "lost_bytes_tls" NotDelivered "the connection turned out to be TLS",
    LostFinTimeout "lost_bytes_fin_timeout" NotDelivered "the target did not finish closing",
    LostStopped "lost_bytes_stopped" NotDelivered "the replayer was stopped",

    // Sessions: wanted = opened + refused by reason; opened = ended by reason + live.
    SessionsWanted "sessions_wanted" "sessions that the traffic asked for",
    SessionsOpened "sessions_opened" "sessions opened: a SYN was sent",
    SessionsRefusedLimit "sessions_refused_limit" NotOpened "the limit on sessions was reached",
    SessionsRefusedPool "sessions_refused_pool" NotOpened "no identity was free",
    SessionsRefusedFamily "sessions_refused_family" NotOpened "client and target are not of one address family; give addresses of the target's with -c",
    SessionsRefusedUnanswered "sessions_refused_unanswered" NotOpened "the target is silent and too many SYNs wait for its answer",
    SessionsRefusedTargetDown "sessions_refused_target_down" NotOpened "the target refuses connections or is silent; it is probed",
    SessionsCompleted "sessions_completed" Ended "both sides closed",
    SessionsTargetClosed "sessions_target_closed" Ended "the target closed first",
    SessionsTargetReset "sessions_target_reset" Ended "the target reset the connection",
    SessionsRefused "sessions_refused" Ended "the target refused the connection",
    SessionsHandshakeTimeout "sessions_handshake_timeout" Ended "the target did not answer the SYN",
    SessionsRetransmitTimeout "sessions_retransmit_timeout" Ended "the target stopped acknowledging",
    SessionsClientReset "sessions_client_reset" Ended "the client reset its connection",
    SessionsGap "sessions_gap" Ended "a hole in the capture",
    SessionsLimit "sessions_limit" Ended "shed at a limit",
    SessionsTls "sessions_tls" Ended "the connection turned out to be TLS, nothing was sent",
    SessionsFinTimeout "sessions_fin_timeout" Ended "the target did not finish closing",
    SessionsStopped "sessions_stopped" Ended "the replayer was stopped",

    // Datagrams, summed over copies: wanted = sent + not sent by reason.
    DatagramsWanted "datagrams_wanted" "datagrams captured, times copies and targets",
    DatagramsSent "datagrams_sent" "datagrams sent to targets",
    DatagramsTooLarge "datagrams_too_large" NotReplayed "larger than the path's MTU, and datagrams are not cut",
    DatagramsRefusedPool "datagrams_refused_pool" NotReplayed "no identity was free",
    DatagramsRefusedLimit "datagrams_refused_limit" NotReplayed "the limit on sessions was reached",
    DatagramsRefusedFamily "datagrams_refused_family" NotReplayed "client and target are not of one address family; give addresses of the target's with -c",
    DatagramsNoLink "datagrams_no_link" NotReplayed "no route or next hop to the target",
    DatagramsNoFrame "datagrams_no_frame" NotReplayed "no free frame or no room in the transmit ring",
    DatagramBytesSent "datagram_bytes_sent" "bytes of datagrams sent to targets",
    DatagramFlows "datagram_flows" "clients' addresses and ports that sent datagrams to a service",
    DatagramResponses "datagram_responses" "datagrams that the targets answered with",
    DatagramResponseBytes "datagram_response_bytes" "bytes of datagrams that the targets answered with",

    // Turns and what drove them.
    TurnsSent "turns_sent" "turns (requests) of which the first byte was sent",
    TurnsReleasedByBytes "turns_released_by_bytes" "turns that went after as many response bytes as online",
    TurnsReleasedByQuiet "turns_released_by_quiet" "turns that went after a response of another size had ended",
    TurnsReleasedByHoldLimit "turns_released_by_hold_limit" "turns that went because the hold limit was reached",
    TurnsReleasedEarly "turns_released_early" "turns released by bytes or quiet, after which the target still sent what it had begun before",
    ConnectionsJoined "connections_joined" "connections joined in the middle",
    ConnectionsTls "connections_tls" "connections that speak TLS: not replayed",

    // Segments sent and received.
    SegmentsSent "segments_sent" "segments sent to targets",
    SegmentsRetransmitted "segments_retransmitted" "of these, sent again",
    SegmentsNoLink "segments_no_link" "segments not sent: no route or next hop to the target",
    SegmentsNoFrame "segments_no_frame" "segments not sent: no free frame or no room in the transmit ring",
    ResponsesReceived "responses_received" "header records received",
    ResponsesUnknown "responses_unknown" "of these, for no live session",
    ResponseBytes "response_bytes" "response bytes that the targets sent",
}

const COUNT: usize = Counter::ALL.len();

/// The values.
#[derive(Clone, Copy, Debug)]
pub struct Counters([u64; COUNT]);

impl Default for Counters {
    fn default() -> Counters {
        Counters([0; COUNT])
    }
}

impl core::ops::Index<Counter> for Counters {
    type Output = u64;
    #[inline]
    fn index(&self, counter: Counter) -> &u64 {
        &self.0[counter as usize]
    }
}

impl core::ops::IndexMut<Counter> for Counters {
    #[inline]
    fn index_mut(&mut self, counter: Counter) -> &mut u64 {
        &mut self.0[counter as usize]
    }
}

/// What became of one service's sessions and datagrams. Counted where they begin and end: a packet in between changes nothing here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ServiceCounters {
    /// Sessions opened.
    pub sessions_opened: u64,
    /// Of these, those whose SYN the target answered by its own.
    pub sessions_established: u64,
    /// Ended: the target refused the connection.
    pub sessions_refused: u64,
    /// Ended: the target did not answer the SYN, or stopped acknowledging.
    pub sessions_unanswered: u64,
    /// Ended, for whatever reason.
    pub sessions_ended: u64,
    /// Datagrams sent to the target.
    pub datagrams_sent: u64,
    /// Datagrams that the target answered with.
    pub datagrams_answered: u64,
    /// Packets not sent: no route or next hop to the target.
    pub packets_no_link: u64,
    /// Changes when something of the target came, and means nothing else.
    pub heard: u64,
}

impl ServiceCounters {
    /// The counts: name in reports, what is counted, how many.
    pub const fn named(&self) -> [(&'static str, &'static str, u64); 8] {
        [
            ("sessions_opened", "sessions opened: a SYN was sent", self.sessions_opened),
            ("sessions_established", "of these, those that the target accepted", self.sessions_established),
            ("sessions_refused", "ended: the target refused the connection", self.sessions_refused),
            (
                "sessions_unanswered",
                "ended: the target did not answer the SYN, or stopped acknowledging",
                self.sessions_unanswered,
            ),
            ("sessions_ended", "ended, for whatever reason", self.sessions_ended),
            ("datagrams_sent", "datagrams sent to the target", self.datagrams_sent),
            ("datagrams_answered", "datagrams that the target answered with", self.datagrams_answered),
            ("packets_no_link", "packets not sent: no route or next hop to the target", self.packets_no_link),
        ]
    }

    /// A session has ended.
    pub(crate) fn ended(&mut self, reason: EndReason) {
        self.sessions_ended += 1;
        match reason {
            EndReason::Refused => self.sessions_refused += 1,
            EndReason::HandshakeTimeout | EndReason::RetransmitTimeout => self.sessions_unanswered += 1,
            _ => {}
        }
    }

    /// Adds those of another worker, or of another service with the same target.
    pub fn add(&mut self, other: &ServiceCounters) {
        self.sessions_opened += other.sessions_opened;
        self.sessions_established += other.sessions_established;
        self.sessions_refused += other.sessions_refused;
        self.sessions_unanswered += other.sessions_unanswered;
        self.sessions_ended += other.sessions_ended;
        self.datagrams_sent += other.datagrams_sent;
        self.datagrams_answered += other.datagrams_answered;
        self.packets_no_link += other.packets_no_link;
        self.heard = self.heard.wrapping_add(other.heard);
    }
}

/// What is neither delivered nor lost yet, measured by walking all sessions and connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Sessions that have not ended.
    pub sessions: u64,
    /// Bytes given to sessions and not acknowledged.
    pub replay_bytes: u64,
    /// Captured bytes that wait for a hole to be filled.
    pub out_of_order_bytes: u64,
}

impl Counters {
    /// Adds another worker's values.
    pub fn add(&mut self, other: &Counters) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    pub(crate) fn sum(&self, from: Counter, to: Counter) -> u64 {
        self.0[from as usize..=to as usize].iter().sum()
    }

    /// The accounting identities: `(name, left, right)`; each must have left equal to right.
    pub fn identities(&self, pending: &Pending) -> [(&'static str, u64, u64); 6] {
        use Counter as C;
        [
            (
                "packets captured = sum by fate",
                self[C::PacketsCaptured],
                self.sum(C::PacketsSyn, C::PacketsStopping),
            ),
            (
                "bytes captured = sum by fate + out of order",
                self[C::BytesCaptured],
                self.sum(C::BytesAccepted, C::BytesStopping) + pending.out_of_order_bytes,
            ),
            (
                "replay bytes offered = delivered + lost by reason + pending",
                self[C::ReplayBytesOffered],
                self.sum(C::ReplayBytesDelivered, C::LostStopped) + pending.replay_bytes,
            ),
            (
                "sessions wanted = opened + refused by reason",
                self[C::SessionsWanted],
                self.sum(C::SessionsOpened, C::SessionsRefusedTargetDown),
            ),
            (
                "sessions opened = ended by reason + live",
                self[C::SessionsOpened],
                self.sum(C::SessionsCompleted, C::SessionsStopped) + pending.sessions,
            ),
            (
                "datagrams wanted = sent + not sent by reason",
                self[C::DatagramsWanted],
                self.sum(C::DatagramsSent, C::DatagramsNoFrame),
            ),
        ]
    }
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// The client closed, the target closed.
    Completed,
    /// The target closed first.
    TargetClosed,
    /// RST from the target.
    TargetReset,
    /// RST from the target in answer to the SYN.
    Refused,
    /// No answer to the SYN.
    HandshakeTimeout,
    /// No acknowledgment for too long.
    RetransmitTimeout,
    /// The client sent RST.
    ClientReset,
    /// A hole in the capture.
    Gap,
    /// Shed at a limit.
    Limit,
    /// The client speaks TLS.
    Tls,
    /// The target acknowledged our FIN but never sent its own.
    FinTimeout,
    /// The replayer was stopped.
    Stopped,
}

impl EndReason {
    /// The counter of sessions that ended for this reason.
    pub const fn sessions(self) -> Counter {
        match self {
            EndReason::Completed => Counter::SessionsCompleted,
            EndReason::TargetClosed => Counter::SessionsTargetClosed,
            EndReason::TargetReset => Counter::SessionsTargetReset,
            EndReason::Refused => Counter::SessionsRefused,
            EndReason::HandshakeTimeout => Counter::SessionsHandshakeTimeout,
            EndReason::RetransmitTimeout => Counter::SessionsRetransmitTimeout,
            EndReason::ClientReset => Counter::SessionsClientReset,
            EndReason::Gap => Counter::SessionsGap,
            EndReason::Limit => Counter::SessionsLimit,
            EndReason::Tls => Counter::SessionsTls,
            EndReason::FinTimeout => Counter::SessionsFinTimeout,
            EndReason::Stopped => Counter::SessionsStopped,
        }
    }

    /// The counter of bytes that were lost for this reason. A completed session has lost none.
    pub const fn lost_bytes(self) -> Counter {
        match self {
            EndReason::Completed | EndReason::TargetClosed => Counter::LostTargetClosed,
            EndReason::TargetReset => Counter::LostTargetReset,
            EndReason::Refused => Counter::LostRefused,
            EndReason::HandshakeTimeout => Counter::LostHandshakeTimeout,
            EndReason::RetransmitTimeout => Counter::LostRetransmitTimeout,
            EndReason::ClientReset => Counter::LostClientReset,
            EndReason::Gap => Counter::LostGap,
            EndReason::Limit => Counter::LostLimit,
            EndReason::Tls => Counter::LostTls,
            EndReason::FinTimeout => Counter::LostFinTimeout,
            EndReason::Stopped => Counter::LostStopped,
        }
    }
}
