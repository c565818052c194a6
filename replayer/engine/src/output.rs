//! What the engine needs from its surroundings.

use replayer_common::addr::Endpoint;

/// Frames to write packets to, a way to send them, and the assistants to tell of identities.
///
/// A frame is a token: it is moved, never copied, so it is in exactly one place.
pub trait Output {
    /// A frame's token.
    type Frame;

    /// A free frame, or `None` when all are in use.
    fn allocate(&mut self) -> Option<Self::Frame>;
    /// The frame's bytes: all of its room, a packet begins at the first.
    fn bytes<'a>(&'a mut self, frame: &'a mut Self::Frame) -> &'a mut [u8];
    /// Gives a frame back without sending it.
    fn release(&mut self, frame: Self::Frame);
    /// Sends the first `len` bytes. False when there was no room: the frame is released, the packet is lost (and will be retransmitted).
    fn transmit(&mut self, frame: Self::Frame, len: usize) -> bool;
    /// Responses of the service to `identity` are wanted.
    fn register(&mut self, service: u16, identity: Endpoint);
    /// They are no longer wanted.
    fn unregister(&mut self, service: u16, identity: Endpoint);
}

/// The captured packet that is being handled: its frame can carry the packet that goes to the target.
pub(crate) struct InHand<F> {
    pub(crate) frame: F,
    /// Where the payload lies in the frame.
    pub(crate) payload_offset: usize,
    pub(crate) payload_len: usize,
    /// The stored segment that has the same bytes; set when it was stored whole.
    pub(crate) segment: u32,
}
