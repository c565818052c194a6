//! What the programs counted, by verdict.

use std::marker::PhantomData;
use std::ops::{Index, IndexMut};

use replayer_common::counters::{CaptureVerdict, MirrorVerdict, ResponsesVerdict, RingVerdict, SpanVerdict};
use replayer_common::maps::names;
use serde::{Serialize, Serializer};

use super::Program;

/// The verdicts of a program.
pub trait Verdict: Copy + 'static {
    /// Whose they are.
    const PROGRAM: Program;
    /// The map in which it counts them.
    const MAP: &'static str;
    /// All of them, in the order of their indices.
    const ALL: &'static [Self];

    /// The stable name.
    fn name(self) -> &'static str;

    /// Its place in the map.
    fn index(self) -> usize;
}

macro_rules! verdicts {
    ($($verdict:ident of $program:ident in $map:ident,)+) => {
        $(impl Verdict for $verdict {
            const PROGRAM: Program = Program::$program;
            const MAP: &'static str = names::$map;
            const ALL: &'static [Self] = $verdict::ALL;

            fn name(self) -> &'static str {
                $verdict::name(self)
            }

            fn index(self) -> usize {
                $verdict::index(self) as usize
            }
        })+
    };
}

verdicts! {
    MirrorVerdict of Mirror in MIRROR_COUNTERS,
    RingVerdict of Ring in RING_COUNTERS,
    SpanVerdict of Span in SPAN_COUNTERS,
    CaptureVerdict of Capture in CAPTURE_COUNTERS,
    ResponsesVerdict of Responses in RESPONSES_COUNTERS,
}

/// Packets by verdict of a program, over all CPUs. Together they are the packets that it saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts<V> {
    packets: Vec<u64>,
    verdicts: PhantomData<V>,
}

impl<V: Verdict> Counts<V> {
    /// Of the values in the program's map, by index.
    pub(super) fn of(packets: Vec<u64>) -> Counts<V> {
        Counts { packets, verdicts: PhantomData }
    }

    /// Each verdict with its packets.
    pub fn iter(&self) -> impl Iterator<Item = (V, u64)> {
        V::ALL.iter().map(|&verdict| (verdict, self[verdict]))
    }
}

/// No packet seen.
impl<V: Verdict> Default for Counts<V> {
    fn default() -> Counts<V> {
        Counts::of(vec![0; V::ALL.len()])
    }
}

impl<V: Verdict> Index<V> for Counts<V> {
    type Output = u64;

    fn index(&self, verdict: V) -> &u64 {
        &self.packets[verdict.index()]
    }
}

impl<V: Verdict> IndexMut<V> for Counts<V> {
    fn index_mut(&mut self, verdict: V) -> &mut u64 {
        &mut self.packets[verdict.index()]
    }
}

/// By name.
impl<V: Verdict> Serialize for Counts<V> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(verdict, packets)| (verdict.name(), packets)))
    }
}
