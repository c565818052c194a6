//! The verdicts of the BPF programs, counted in the kernel.
//!
//! Each program has a per-CPU array of `u64`, indexed by its enum here. Every packet that a program sees moves exactly
//! one of them by one: together they are the packets seen. Names are stable, for reports and metrics.

/// An enum of verdicts, whose values count from 0, with the stable name of each.
macro_rules! verdicts {
    ($(#[doc = $about:literal])+ $name:ident { $(#[doc = $meaning:literal] $verdict:ident = $text:literal,)+ }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name {
            $(#[doc = $meaning] $verdict,)+
        }

        impl $name {
            /// All of them, in the order of their indices.
            pub const ALL: &[$name] = &[$($name::$verdict),+];

            /// The stable name.
            pub fn name(self) -> &'static str {
                match self {
                    $($name::$verdict => $text,)+
                }
            }

            /// Its place in the map.
            #[inline(always)]
            pub fn index(self) -> u32 {
                self as u32
            }
        }
    };
}

/// Verdicts of a program that selects requests: its own, and the reasons why a packet is none that is to be captured.
macro_rules! selecting {
    ($(#[doc = $about:literal])+ $name:ident { $($own:tt)* }) => {
        verdicts! {
            $(#[doc = $about])+
            $name {
                $($own)*
                /// For no service: another port, another address, neither TCP nor UDP, or not IP.
                Unrelated = "unrelated",
                /// For a wildcard service, but not addressed to this host (bridged, or seen in promiscuous mode).
                NotForHost = "not_for_host",
                /// Of a client that is not one of those that were chosen.
                ClientNotChosen = "client_not_chosen",
                /// Of a connection that the sample leaves out.
                NotSampled = "not_sampled",
                /// An acknowledgment without data, of which the replay makes its own.
                PureAck = "pure_ack",
                /// A fragment to a service's address, of its protocol; fragments are not replayed.
                Fragment = "fragment",
                /// Ends inside its headers.
                Truncated = "truncated",
                /// Its header fields contradict each other.
                Malformed = "malformed",
                /// More or longer IPv6 extension headers than are followed.
                ExtensionHeaders = "extension_headers",
            }
        }
        selecting!(@reasons $name Unrelated NotForHost ClientNotChosen NotSampled PureAck Fragment Truncated Malformed ExtensionHeaders);
    };
    (@reasons $name:ident $($reason:ident)+) => {
        impl $name {
            /// The verdict for a packet that is not to be captured.
            #[inline(always)]
            pub fn refused(reason: Refusal) -> $name {
                match reason {
                    $(Refusal::$reason => $name::$reason,)+
                }
            }
        }
    };
}

selecting! {
    /// Why a packet is not to be captured.
    Refusal {}
}

selecting! {
    /// What `mirror` (tcx ingress on the capture interface) did. The packet itself always goes on unchanged.
    MirrorVerdict {
        /// Cloned to the mirror.
        Mirrored = "mirrored",
        /// For a service, while mirroring was switched off (no mirror interface configured).
        Off = "off",
        /// To be mirrored, but the mirror's queue was full: captured traffic was lost.
        MirrorFull = "mirror_full",
        /// To be mirrored, but the clone failed: no memory, or the mirror is gone or down. Captured traffic was lost.
        CloneFailed = "clone_failed",
    }
}

selecting! {
    /// What `ring` (tcx ingress on the capture interface) did. The packet itself always goes on unchanged.
    RingVerdict {
        /// Copied into its worker's ring.
        Copied = "copied",
        /// For a service, while there was no ring for its worker.
        NoRing = "no_ring",
        /// To be copied, but the ring was full: captured traffic was lost.
        RingFull = "ring_full",
        /// To be copied, but larger than a record: captured traffic was lost.
        TooLarge = "too_large",
        /// To be copied, but its bytes could not be read: captured traffic was lost.
        CopyFailed = "copy_failed",
    }
}

selecting! {
    /// What `span` (XDP on a mirror port's NIC) did. What other hosts sent to each other and is not taken ends here, as it would
    /// without promiscuous mode; the rest goes on to the kernel.
    SpanVerdict {
        /// Handed to the AF_XDP socket of its queue.
        Redirected = "redirected",
        /// To be captured, but there was no AF_XDP socket on its queue: captured traffic was lost.
        NoSocket = "no_socket",
    }
}

verdicts! {
    /// What `capture` (XDP on the mirror's far end) did.
    CaptureVerdict {
        /// Handed to the AF_XDP socket of its queue.
        Redirected = "redirected",
        /// Dropped: no AF_XDP socket on its queue. Captured traffic was lost.
        NoSocket = "no_socket",
    }
}

verdicts! {
    /// What `responses` (XDP on the assistant's interface) did. Whatever is not taken goes on to the kernel unchanged.
    ResponsesVerdict {
        /// A target's segment or datagram: cut to its headers and taken.
        Cut = "cut",
        /// A target's segment or datagram: taken whole, since it could not be cut.
        Whole = "whole",
        /// From no target: another port, another address, neither TCP nor UDP, or not IP.
        Unrelated = "unrelated",
        /// From a target to this host itself.
        ToThisHost = "to_this_host",
        /// A fragment from a target's address, of its protocol: the kernel of a host that does not forward drops it.
        Fragment = "fragment",
        /// Ends inside its headers.
        Truncated = "truncated",
        /// Its header fields contradict each other.
        Malformed = "malformed",
        /// More or longer IPv6 extension headers than are followed.
        ExtensionHeaders = "extension_headers",
        /// A target's segment or datagram, dropped: no AF_XDP socket on its queue. It must not reach a real client.
        NoSocket = "no_socket",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_follow_the_list() {
        assert!(MirrorVerdict::ALL.iter().enumerate().all(|(at, verdict)| verdict.index() as usize == at));
        assert_eq!(ResponsesVerdict::NoSocket.index() as usize, ResponsesVerdict::ALL.len() - 1);
        assert_eq!(CaptureVerdict::NoSocket.name(), "no_socket");
    }
}
