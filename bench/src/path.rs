//! The whole way of a captured packet: a veth pair, its far end's RX ring, the engine, the TX ring of another veth pair.
//!
//! One thread sends as fast as the other takes, so that nothing is lost and every stream stays whole. Beside it stand the
//! same rings without an engine (what arrives is sent on as it is), and the TX ring alone. What the replayer does with the target's
//! acknowledgments is measured with it.

use crate::Options;
use crate::report::{Figure, Wanted};
use crate::wire::{Cable, Replayer, alone, bare_transmit, rate, send, write_packet};
use anyhow::{Result, ensure};
use replayer::afxdp::{Port, Received};
use replayer_engine::BATCH;
use replayer_engine::counters::Counter;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the subject measures.
pub const WHAT: &str = "RX ring to TX ring, one core; 64-byte frames of 1000 connections, over veth";

const CONNECTIONS: u32 = 1000;
/// Packets under way between the two threads.
const UNDER_WAY: u64 = 1024;
/// What is under way arrives within this time, or it was lost.
const ARRIVAL: Duration = Duration::from_secs(2);

/// Measures all of it.
pub fn run(options: Options) -> Result<Vec<Figure>> {
    alone(move || {
        let (mut input, output) = (Cable::new()?, Cable::new()?);
        let mut source = input.sender()?;
        let mut port = input.forwarder(&output)?;
        let duration = Duration::from_millis(if options.quick { 100 } else { 1000 });
        let (mut bare, mut whole, mut alone) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..if options.quick { 1 } else { 5 } {
            alone.push(bare_transmit(&mut port, duration) / 1e3);
            bare.push(forwarded(&mut source, &mut port, None, duration)? / 1e3);
            let mut replayer = Replayer::new(CONNECTIONS, 1);
            whole.push(forwarded(&mut source, &mut port, Some(&mut replayer), duration)? / 1e3);
        }
        let bare = Figure::median("bare forwarder, RX ring to TX ring", bare, "kpps");
        let alone = Figure::median("bare TX ring", alone, "kpps");
        let whole = Figure::median("replayer", whole, "kpps").beside("bare forwarder", bare.value);
        let share =
            Figure::new("replayer, as a share of the bare forwarder", 100.0 * whole.value / bare.value, "%")
                .wanted(Wanted::AtLeast(95.0));
        Ok(vec![whole, share, bare, alone])
    })
}

/// Packets a second that come in and go out, through the engine or without one.
fn forwarded(
    source: &mut Port,
    port: &mut Port,
    mut replayer: Option<&mut Replayer>,
    duration: Duration,
) -> Result<f64> {
    let (taken, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| generate(source, &taken, &stop));
        let mut received: Vec<Received> = Vec::with_capacity(BATCH);
        let mut step = |port: &mut Port| {
            let count = port.receive(&mut received) as u64;
            for packet in received.drain(..) {
                match &mut replayer {
                    Some(replayer) => replayer.capture(packet.frame, packet.len as usize),
                    None => {
                        send(port, packet.frame, packet.len);
                    }
                }
            }
            match &mut replayer {
                Some(replayer) => replayer.turn(port),
                None => {
                    port.flush();
                    port.reclaim();
                }
            }
            taken.fetch_add(count, Ordering::Release);
            if count == 0 {
                std::thread::yield_now();
            }
            count
        };
        // The handshakes, and the caches as they will be.
        rate(duration / 5, || step(port));
        let rate = rate(duration, || step(port));
        stop.store(true, Ordering::Release);
        let stopped = Instant::now();
        while !sender.is_finished() && stopped.elapsed() < ARRIVAL {
            step(port);
        }
        ensure!(sender.is_finished(), "packets were lost on the way in: the figure would be wrong");
        let sent = sender.join().unwrap_or_default();
        if let Some(replayer) = replayer {
            let data = replayer.counters()[Counter::PacketsData];
            ensure!(data + u64::from(CONNECTIONS) == sent, "{data} data packets replayed of {sent} packets");
            replayer.ensure_sent()?;
        }
        Ok(rate)
    })
}

/// Sends a SYN of each connection, then data of each in turn, until told to stop and all has been taken; returns how many packets.
fn generate(port: &mut Port, taken: &AtomicU64, stop: &AtomicBool) -> u64 {
    let mut sent = 0u64;
    loop {
        let under_way = sent - taken.load(Ordering::Acquire);
        let stopping = stop.load(Ordering::Acquire) && sent >= u64::from(CONNECTIONS);
        if stopping && under_way == 0 {
            return sent;
        }
        if stopping || under_way + BATCH as u64 > UNDER_WAY {
            std::thread::yield_now();
            continue;
        }
        for _ in 0..BATCH {
            let Some(mut frame) = port.allocate() else { break };
            let len = write_packet(port.frame_mut(&mut frame), sent as u32, CONNECTIONS);
            // One that finds no room is made again.
            sent += u64::from(send(port, frame, len as u32));
        }
        port.flush();
        port.reclaim();
    }
}
