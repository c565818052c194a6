//! Behaviours 13, 14 and 17: connections that were there before the replayer, at the online server or at the target.
//!
//! Root only; each test has a lab of its own.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Result;
use replayer_tests::clients::Load;
use replayer_tests::conversation::{Conversation, bytes_of};
use replayer_tests::lab::{Lab, Plan};
use replayer_tests::pairs::{ARRIVAL, StreamPair};
use replayer_tests::replay::{Replay, Role, service};
use replayer_tests::stream::{Record, RequestHeader};
use replayer_tests::wait::wait_for;

const STREAM: u16 = 9000;

fn request(id: u64, body: u32) -> RequestHeader {
    RequestHeader { id, body, response: 100, delay_ms: 0 }
}

/// Ids by the client's address and port.
fn ids_by_peer(record: &Record) -> BTreeSet<(String, Vec<u64>)> {
    record.connections.iter().map(|it| (it.peer.clone(), it.ids.clone())).collect()
}

#[test]
fn b013_each_idle_connection_is_joined_at_its_next_request() -> Result<()> {
    for only_new in [false, true] {
        let lab = Lab::up(Plan::default())?;
        let mut streams = StreamPair::start(&lab, STREAM)?;
        let server = (lab.online().v4(), STREAM).into();
        let mut connections: Vec<Conversation> =
            (0..100).map(|_| Conversation::open(lab.client(), server)).collect::<Result<_>>()?;
        for (id, connection) in (1..).zip(&mut connections) {
            connection.ask(request(id, 2000))?;
        }
        let arguments: &[&str] = if only_new { &["-O"] } else { &[] };
        let replay = Replay::start(&lab, &[STREAM], arguments)?;
        for (id, connection) in (1001..).zip(&mut connections) {
            connection.ask(request(id, 5000))?;
            connection.ask(request(id + 1000, 0))?;
        }
        let mut new = Conversation::open(lab.client(), server)?;
        new.ask(request(1, 10))?;

        let mut expected = BTreeSet::from([(new.local()?, vec![1])]);
        if !only_new {
            for (id, connection) in (1001..).zip(&connections) {
                expected.insert((connection.local()?, vec![id, id + 1000]));
            }
        }
        let requests = if only_new { 1 } else { 201 };
        let target = streams.target.record_of(requests, ARRIVAL)?;
        assert_eq!(ids_by_peer(&target), expected, "only new connections: {only_new}");
        assert!(target.connections.iter().all(|it| it.at_boundary && it.mismatch.is_none()), "{target:?}");
        let (report, _) = replay.stop()?;
        assert_eq!(report.counter("connections_joined"), if only_new { 0 } else { 100 });
    }
    Ok(())
}

#[test]
fn b014_a_request_that_had_begun_is_left_out_whole() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut connection = Conversation::open(lab.client(), (lab.online().v4(), STREAM).into())?;
    let upload = bytes_of(request(1, 1 << 20));
    let (before, after) = upload.split_at(upload.len() / 2);
    connection.send(before)?;
    wait_for("the first half at the online server", ARRIVAL, || {
        streams.online.record().is_ok_and(|record| record.bytes() == before.len() as u64)
    })?;
    let replay = Replay::start(&lab, &[STREAM], &[])?;
    connection.send(after)?;
    connection.expect_answer(1)?;
    connection.ask(request(2, 3000))?;
    connection.ask(request(3, 0))?;

    let target = streams.target.record_of(2, ARRIVAL)?;
    assert_eq!(ids_by_peer(&target), BTreeSet::from([(connection.local()?, vec![2, 3])]));
    assert!(target.connections[0].mismatch.is_none(), "{target:?}");
    let (report, _) = replay.stop()?;
    assert!(report.counter("bytes_midstream") >= after.len() as u64, "{:?}", report.counters);
    Ok(())
}

#[test]
fn b017_connections_that_the_target_still_holds_make_room_for_new_ones() -> Result<()> {
    let lab = Lab::up(Plan::default())?;
    let mut streams = StreamPair::start(&lab, STREAM)?;
    let mut replay = Replay::start(&lab, &[STREAM], &[])?;
    // Each run uses the same ports, which a reset frees at once.
    let run = |first_id: u32| {
        format!(
            "--connect {}:{STREAM} --source-port 26000 --connections 10 --per-connection 20 --requests 200 --rate 200 \
             --body 1-3000 --first-id {first_id} --close rst",
            lab.online().v4()
        )
    };
    let mut first = Load::start(&lab, lab.client(), "first", &run(1))?;
    wait_for("ten connections at the target", ARRIVAL, || {
        streams
            .target
            .record()
            .is_ok_and(|it| it.connections.iter().filter(|it| !it.ids.is_empty()).count() == 10)
    })?;
    // Killed, it ends nothing: the target holds ten connections whose client is gone.
    replay.online.process.kill()?;
    assert_eq!(first.finish()?.errors, 0);
    let services = [service(STREAM, lab.target().v4(), STREAM)];
    replay.online = Role::online(&lab, lab.online(), &services, lab.assistant().v4().into(), &[])?;

    let second = Load::run(&lab, "second", &run(1001))?;
    assert_eq!((second.errors, second.responses), (0, 200), "{second:?}");
    let arrived = |record: &Record| {
        record.connections.iter().flat_map(|it| it.ids.iter()).filter(|&&id| id > 1000).count()
    };
    wait_for("all requests of the second run", Duration::from_secs(4), || {
        streams.target.record().is_ok_and(|record| arrived(&record) == 200)
    })?;
    let (online, target) = (streams.online.record()?, streams.target.record()?);
    let of_second = |record: &Record| -> BTreeSet<(String, Vec<u64>)> {
        ids_by_peer(record).into_iter().filter(|(_, ids)| ids.iter().any(|&id| id > 1000)).collect()
    };
    assert_eq!(of_second(&target), of_second(&online));
    replay.stop()?;
    Ok(())
}
