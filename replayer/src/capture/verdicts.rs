//! What the programs of a back end counted, and what it means for the requests: captured, left out, or lost.

use std::fmt;

use replayer_common::counters::{CaptureVerdict, MirrorVerdict, Refusal, RingVerdict, SpanVerdict};
use serde::{Serialize, Serializer};

use crate::bpf::{Counts, Verdict};

/// What the programs of a back end counted, as far as it could be read.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "capture_by", rename_all = "lowercase")]
pub enum Verdicts {
    /// Of the mirror.
    Mirror {
        /// The program that clones into it.
        #[serde(serialize_with = "either")]
        mirror: Result<Counts<MirrorVerdict>, Unreadable>,
        /// The program at its far end.
        #[serde(serialize_with = "either")]
        capture: Result<Counts<CaptureVerdict>, Unreadable>,
        /// Clones that the veth pair between them dropped.
        #[serde(serialize_with = "either")]
        mirror_device_dropped: Result<u64, String>,
    },
    /// Of the rings.
    Ring {
        /// The program that copies into them.
        #[serde(serialize_with = "either")]
        ring: Result<Counts<RingVerdict>, Unreadable>,
    },
    /// Of a mirror port.
    Span {
        /// The program on it.
        #[serde(serialize_with = "either")]
        span: Result<Counts<SpanVerdict>, Unreadable>,
    },
}

/// Why a program's counts are missing.
#[derive(Clone, Debug, Serialize)]
pub struct Unreadable {
    /// The kernel's answer.
    pub error: String,
}

/// The one or the other, without a word of which.
fn either<T: Serialize, E: Serialize, S: Serializer>(
    result: &Result<T, E>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match result {
        Ok(value) => value.serialize(serializer),
        Err(error) => error.serialize(serializer),
    }
}

/// Where a packet that was to be captured is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In `mirror`.
    Mirror(MirrorVerdict),
    /// In the veth pair behind it.
    MirrorDevice,
    /// In `capture`, at the far end of that.
    Capture(CaptureVerdict),
    /// In `ring`.
    Ring(RingVerdict),
    /// In `span`.
    Span(SpanVerdict),
    /// At a worker's socket: its RX ring was full.
    SocketRingFull,
    /// At a worker's socket: there was no frame, or the packet did not fit into one.
    SocketDropped,
    /// In front of a worker that had no frames for it until the end.
    LeftAtTheEnd,
}

/// The name for people and programs.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn of<V: Verdict>(verdict: V, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{}.{}", V::PROGRAM.name(), verdict.name())
        }
        match *self {
            Place::Mirror(verdict) => of(verdict, f),
            Place::MirrorDevice => f.write_str("mirror_device_dropped"),
            Place::Capture(verdict) => of(verdict, f),
            Place::Ring(verdict) => of(verdict, f),
            Place::Span(verdict) => of(verdict, f),
            Place::SocketRingFull => f.write_str("capture_socket.rx_ring_full"),
            Place::SocketDropped => f.write_str("capture_socket.rx_dropped"),
            Place::LeftAtTheEnd => f.write_str("left_at_the_end"),
        }
    }
}

impl Verdicts {
    /// Packets that were to be captured and did not reach a worker, by where they were lost. What a worker's socket lost is not among them.
    pub fn losses(&self) -> Vec<(Place, u64)> {
        fn of<V: Verdict>(
            counts: &Result<Counts<V>, Unreadable>,
            place: fn(V) -> Place,
            losses: &[V],
        ) -> Vec<(Place, u64)> {
            let Ok(counts) = counts else { return Vec::new() };
            losses.iter().map(|&verdict| (place(verdict), counts[verdict])).collect()
        }
        match self {
            Verdicts::Mirror { mirror, capture, mirror_device_dropped } => {
                let lost = [MirrorVerdict::MirrorFull, MirrorVerdict::CloneFailed];
                let mut losses = of(mirror, Place::Mirror, &lost);
                losses.extend(of(capture, Place::Capture, &[CaptureVerdict::NoSocket]));
                losses.extend(mirror_device_dropped.as_ref().ok().map(|&count| (Place::MirrorDevice, count)));
                losses
            }
            Verdicts::Ring { ring } => {
                use RingVerdict::{CopyFailed, NoRing, RingFull, TooLarge};
                of(ring, Place::Ring, &[RingFull, TooLarge, CopyFailed, NoRing])
            }
            Verdicts::Span { span } => of(span, Place::Span, &[SpanVerdict::NoSocket]),
        }
    }

    /// All of them.
    pub fn lost(&self) -> u64 {
        self.losses().into_iter().map(|(_, count)| count).sum()
    }

    /// Packets that were put into a worker's ring, or given to its socket, which may have lost them still. `None`: it cannot be read.
    pub fn handed_over(&self) -> Option<u64> {
        match self {
            Verdicts::Mirror { capture, .. } => {
                capture.as_ref().ok().map(|counts| counts[CaptureVerdict::Redirected])
            }
            Verdicts::Ring { ring } => ring.as_ref().ok().map(|counts| counts[RingVerdict::Copied]),
            Verdicts::Span { span } => span.as_ref().ok().map(|counts| counts[SpanVerdict::Redirected]),
        }
    }

    /// Clients' packets to services that were not to be captured, for they are outside the sample or say nothing.
    pub fn left_out(&self) -> u64 {
        self.refused(Refusal::NotSampled) + self.refused(Refusal::PureAck)
    }

    /// Packets to services of clients that were not chosen.
    pub fn not_chosen(&self) -> u64 {
        self.refused(Refusal::ClientNotChosen)
    }

    fn refused(&self, reason: Refusal) -> u64 {
        match self {
            Verdicts::Mirror { mirror: Ok(counts), .. } => counts[MirrorVerdict::refused(reason)],
            Verdicts::Ring { ring: Ok(counts) } => counts[RingVerdict::refused(reason)],
            Verdicts::Span { span: Ok(counts) } => counts[SpanVerdict::refused(reason)],
            // What cannot be read counts for nothing here.
            _ => 0,
        }
    }

    /// Each program with its packets by verdict, both by name.
    pub fn by_program(&self) -> Vec<(&'static str, Vec<(&'static str, u64)>)> {
        fn of<V: Verdict>(
            counts: &Result<Counts<V>, Unreadable>,
        ) -> Option<(&'static str, Vec<(&'static str, u64)>)> {
            let counts = counts.as_ref().ok()?.iter().map(|(verdict, packets)| (verdict.name(), packets));
            Some((V::PROGRAM.name(), counts.collect()))
        }
        let programs = match self {
            Verdicts::Mirror { mirror, capture, .. } => [of(mirror), of(capture)],
            Verdicts::Ring { ring } => [of(ring), None],
            Verdicts::Span { span } => [of(span), None],
        };
        programs.into_iter().flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b048_what_is_lost_is_named_by_its_place_and_what_cannot_be_read_is_said() {
        let mut mirror = Counts::default();
        mirror[MirrorVerdict::Mirrored] = 9;
        mirror[MirrorVerdict::CloneFailed] = 2;
        mirror[MirrorVerdict::NotSampled] = 3;
        mirror[MirrorVerdict::PureAck] = 4;
        mirror[MirrorVerdict::ClientNotChosen] = 5;
        let verdicts = Verdicts::Mirror {
            mirror: Ok(mirror),
            capture: Err(Unreadable { error: "gone".into() }),
            mirror_device_dropped: Ok(1),
        };
        let losses = verdicts.losses().into_iter().map(|(place, count)| (place.to_string(), count));
        let named = [("mirror.mirror_full", 0), ("mirror.clone_failed", 2), ("mirror_device_dropped", 1)];
        assert!(losses.eq(named.map(|(place, count)| (place.to_owned(), count))));
        assert_eq!((verdicts.lost(), verdicts.left_out(), verdicts.not_chosen()), (3, 7, 5));
        assert_eq!(verdicts.handed_over(), None);
        let report = serde_json::to_value(&verdicts).unwrap();
        assert_eq!(report["capture_by"], "mirror");
        assert_eq!(report["mirror"]["mirrored"], 9);
        assert_eq!(report["capture"], serde_json::json!({"error": "gone"}));
        assert_eq!(report["mirror_device_dropped"], 1);
    }
}
