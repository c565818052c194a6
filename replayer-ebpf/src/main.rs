//! The programs that run in the kernel.
//!
//! - [`select`]: which packets are to be replayed, the same for the next three
//! - [`mirror`]: tcx ingress on the production interface; clones what is to be replayed, changes nothing
//! - [`ring`]: the same, but copies it into ring buffers
//! - [`span`]: XDP on the NIC of a mirror port; hands what is to be replayed to an AF_XDP socket
//! - [`capture`]: XDP on the mirror's far end; hands every frame to an AF_XDP socket
//! - [`responses`]: XDP on the assistant; takes the target's segments off the wire
//! - [`maps`]: what the programs share with user space
//! - [`frame`]: checked reads of a packet, the only place where one is dereferenced
//!
//! What a program decides is a pure function of the packet and the maps; what it does about it is in the entry points.
#![no_std]
#![no_main]

/// One log line per verdict with the feature `log`, nothing without it.
macro_rules! log_verdict {
    ($context:expr, $program:literal, $verdict:expr) => {
        #[cfg(feature = "log")]
        aya_log_ebpf::debug!($context, "{}: verdict {}", $program, $verdict.index());
    };
}

mod capture;
mod frame;
mod maps;
mod mirror;
mod responses;
mod ring;
mod select;
mod span;

/// The helpers in use ask for no particular licence; the kernel wants to be told one.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo) -> ! {
    // Never linked in: the verifier refuses a program that could get here.
    loop {}
}
