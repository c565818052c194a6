//! Segments that somebody else sends in a client's name: what the online server leaves alone (RFC 5961) ends no session.
//!
//! Root only; each test has a lab of its own.

use anyhow::{Context, Result, ensure};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use replayer_tests::clients::counter;
use replayer_tests::conversation::Conversation;
use replayer_tests::lab::{Lab, NIC, Plan};
use replayer_tests::packet::{FRAME_LIMIT, Frames, PacketSocket};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::Replay;
use replayer_tests::stream::{End, RequestHeader};
use replayer_tests::wait::wait_for;

const STREAM: u16 = 9000;

/// Who listens to a client and sends in its name.
struct Stranger<'a> {
    lab: &'a Lab,
    socket: PacketSocket,
    port: u16,
    /// The number after the client's last byte, and what its last segment acknowledged.
    next: u32,
    acknowledged: u32,
}

impl Stranger<'_> {
    fn beside<'a>(lab: &'a Lab, connection: &Conversation) -> Result<Stranger<'a>> {
        let socket = lab.client().namespace().enter(|| PacketSocket::open(NIC, Frames::Both))??;
        let local: std::net::SocketAddrV4 = connection.local()?.parse()?;
        Ok(Stranger { lab, socket, port: local.port(), next: 0, acknowledged: 0 })
    }

    /// Looks at what the client has sent by now.
    fn listen(&mut self) -> Result<()> {
        let mut buffer = vec![0; FRAME_LIMIT];
        while let Some(length) = self.socket.receive(&mut buffer)? {
            let Ok(packet) = SlicedPacket::from_ethernet(&buffer[..length]) else { continue };
            let Some(TransportSlice::Tcp(tcp)) = packet.transport else { continue };
            if (tcp.source_port(), tcp.destination_port()) == (self.port, STREAM) && !tcp.syn() && !tcp.rst()
            {
                self.next = tcp.sequence_number().wrapping_add(tcp.payload().len() as u32);
                self.acknowledged = tcp.acknowledgment_number();
            }
        }
        ensure!(self.next != 0, "nothing was heard of the client");
        Ok(())
    }

    /// Sends a segment of the client's to the online server. Flags are letters: S, F, R, P, A.
    fn send(&self, flags: &str, seq: u32, ack: u32, payload: &[u8]) -> Result<()> {
        let (client, online) = (self.lab.client(), self.lab.online());
        let mut tcp = PacketBuilder::ethernet2(mac(&client.mac())?, mac(&online.mac())?)
            .ipv4(client.v4().octets(), online.v4().octets(), 64)
            .tcp(self.port, STREAM, seq, 64_240);
        for flag in flags.chars() {
            tcp = match flag {
                'S' => tcp.syn(),
                'F' => tcp.fin(),
                'R' => tcp.rst(),
                'P' => tcp.psh(),
                _ => tcp.ack(ack),
            };
        }
        let mut frame = Vec::new();
        tcp.write(&mut frame, payload)?;
        self.socket.send(&frame).context("sending in the client's name")
    }
}

fn mac(text: &str) -> Result<[u8; 6]> {
    let bytes: Vec<u8> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("a MAC address has six bytes")
}

#[test]
fn b035_resets_and_syns_that_the_online_server_does_not_take_end_no_session() -> Result<()> {
    const ROUNDS: u32 = 20;
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    let mut connection = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
    let mut stranger = Stranger::beside(&lab, &connection)?;
    let request = |id: u32| RequestHeader { id: id.into(), body: 1000, response: 100, delay_ms: 0 };
    connection.ask(request(1))?;
    for round in 0..ROUNDS {
        stranger.listen()?;
        let Stranger { next, acknowledged, .. } = stranger;
        // In the window but not the next: one too far, one back, far ahead with an acknowledgment that fits.
        stranger.send("R", next.wrapping_add(1), 0, &[])?;
        stranger.send("R", next.wrapping_sub(1), 0, &[])?;
        stranger.send("RA", next.wrapping_add(20_000), acknowledged, &[])?;
        // A SYN by itself, and the beginning of a whole connection: a little after the client's numbers, as its host would choose
        // them, and anywhere.
        let isn = if round % 2 == 0 { next.wrapping_add(5_000_000) } else { round.wrapping_mul(0x9e37_79b9) };
        stranger.send("S", isn.wrapping_add(77), 0, &[])?;
        stranger.send("S", isn, 0, &[])?;
        stranger.send("A", isn.wrapping_add(1), round, &[])?;
        stranger.send("PA", isn.wrapping_add(1), round, b"not the client's")?;
        connection.ask(request(2 + round)).with_context(|| format!("the online server, round {round}"))?;
    }
    // That was really sent, and really left alone.
    let challenged = counter(lab.online(), "TcpExt:", "TCPSYNChallenge")?;
    assert_eq!(challenged, 2 * u64::from(ROUNDS));
    assert!(counter(lab.online(), "TcpExt:", "TCPChallengeACK")? > 0);

    let expected: Vec<u64> = (1..=u64::from(ROUNDS) + 1).collect();
    let local = connection.local()?;
    let online = streams.online.record_of(expected.len(), ARRIVAL)?;
    assert_eq!((online.connections.len(), &online.connections[0].ids), (1, &expected));
    let target = streams.target.record_of(expected.len(), ARRIVAL)?;
    let same: Vec<_> = target.connections.iter().filter(|it| it.peer == local).collect();
    assert_eq!(same.len(), 1, "{target:#?}");
    assert_eq!((&same[0].ids, same[0].end), (&expected, End::Open), "{:#?}", same[0]);
    assert_eq!(same[0].hash, online.connections[0].hash);

    // At the very number both servers see the end.
    stranger.listen()?;
    stranger.send("R", stranger.next, 0, &[])?;
    wait_for("the end of both connections", ARRIVAL, || {
        let over = |record: Result<replayer_tests::stream::Record>| {
            record.is_ok_and(|it| it.connections.iter().any(|it| it.peer == local && it.end != End::Open))
        };
        over(streams.online.record()) && over(streams.target.record())
    })?;
    let (report, _) = replay.stop()?;
    assert_eq!(report.counter("sessions_client_reset"), 1, "{:?}", report.counters);
    assert!(report.counter("packets_doubtful") >= 4 * u64::from(ROUNDS), "{:?}", report.counters);
    Ok(())
}

#[test]
fn b035_data_and_fins_that_the_online_server_does_not_take_end_no_session() -> Result<()> {
    const ROUNDS: u32 = 6;
    const STRANGE: &[u8] = b"not the client's";
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let replay = Replay::start(&lab, &[STREAM], &["--gap-timeout", "0.2"])?;
    let mut connection = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
    let mut stranger = Stranger::beside(&lab, &connection)?;
    let request = |id: u32| RequestHeader { id: id.into(), body: 1000, response: 100, delay_ms: 0 };
    connection.ask(request(1))?;
    for round in 0..ROUNDS {
        stranger.listen()?;
        let Stranger { next, acknowledged, .. } = stranger;
        // Beyond any window, and in it with an acknowledgment of what was never sent.
        match round % 3 {
            0 => stranger.send("PA", next.wrapping_add(200_000_000), acknowledged, STRANGE)?,
            1 => stranger.send("PA", next.wrapping_add(100), acknowledged.wrapping_add(1 << 30), STRANGE)?,
            _ => stranger.send("FPA", next.wrapping_add(200_000_000), acknowledged, STRANGE)?,
        }
        // The client is silent until what was held is dropped.
        let dropped = u64::from(round + 1) * STRANGE.len() as u64;
        wait_for("the end of the hole's time", ARRIVAL, || {
            let stats = replay.online.stats();
            stats.is_some_and(|stats| stats.not_replayed.get("bytes_gap") == Some(&dropped))
        })?;
        connection.ask(request(2 + round)).with_context(|| format!("the online server, round {round}"))?;
    }
    let expected: Vec<u64> = (1..=u64::from(ROUNDS) + 1).collect();
    let local = connection.local()?;
    let online = streams.online.record_of(expected.len(), ARRIVAL)?;
    assert_eq!((online.connections.len(), &online.connections[0].ids), (1, &expected));
    let target = streams.target.record_of(expected.len(), ARRIVAL)?;
    assert_eq!(target.connections.len(), 1, "{target:#?}");
    let same = &target.connections[0];
    assert_eq!((&same.peer, &same.ids, same.end), (&local, &expected, End::Open), "{same:#?}");
    assert_eq!(same.hash, online.connections[0].hash);
    let (report, _) = replay.stop()?;
    let ended = ["sessions_gap", "connections_joined"].map(|name| report.counter(name));
    assert_eq!(ended, [0, 0], "{:?}", report.counters);
    Ok(())
}
