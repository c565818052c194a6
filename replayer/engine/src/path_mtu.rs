//! The path's MTU where nobody tells it. ICMP "fragmentation needed" and "packet too big" go to a segment's source address, which
//! is a client's: they never reach us. So a path that became narrower looks like one on which large segments vanish (RFC 2923 section
//! 2.1), and is found as RFC 4821 and RFC 8899 do it: where large segments are lost again and again while the target answers small
//! ones, smaller ones are tried, and what gets through is kept for the service's other sessions.

use crate::config::timing;
use crate::engine::Engine;
use crate::output::Output;
use crate::sender::Piece;
use crate::session::MIN_MSS;
use crate::slab::NONE;
use crate::timer::{Tick, tick, ticks};
use crate::wire::payload_limit;
use replayer_common::addr::is_v4;
use replayer_common::packet::flags;

/// What is tried: what every IPv6 path carries (RFC 8200 section 5), and what every IPv4 host takes (RFC 1122 section 3.3.2).
const NARROWER: [u16; 2] = [1280, 576];

/// Timeouts of the same data after which its size is suspected, as with Linux (`tcp_retries1`).
const SUSPECT_AFTER: u8 = 3;

impl Engine {
    /// The largest IP packet to the service's target, as far as is known.
    pub(crate) fn path_mtu(&self, service: u16, now: Tick) -> u16 {
        let service = &self.services[usize::from(service)];
        let link = service.template.as_ref().map_or(1500, |template| template.mtu);
        match service.narrow_path {
            Some((mtu, since)) if now.wrapping_sub(since) < timing::PATH_MTU_AGE => link.min(mtu),
            _ => link,
        }
    }

    /// Data timed out: asks the target whether it lives, and makes the session's segments smaller if it does and nothing else helped.
    pub(crate) fn suspect_path<O: Output>(&mut self, now_ns: u64, s: u32, out: &mut O) {
        let session = &self.sessions[s];
        if session.tries + 1 < SUSPECT_AFTER || session.una_segment == NONE {
            return;
        }
        let stored = &self.store[session.una_segment];
        let wanted = stored.len - session.snd_una.wrapping_sub(stored.seq);
        let service = &self.services[usize::from(session.service)];
        let limit = |mtu| payload_limit(mtu, &service.target, session.timestamps).max(MIN_MSS);
        let narrower = NARROWER
            .into_iter()
            .filter(|&mtu| mtu >= 1280 || is_v4(&service.target.ip))
            .find(|&mtu| limit(mtu) < session.mss && u32::from(limit(mtu)) < wanted);
        let Some(mtu) = narrower else { return };
        // The target answered somebody since the timeout before this one.
        let waited = ticks(u64::from(session.rto_us_after(session.tries - 1)) * 1000);
        let lives = tick(now_ns).wrapping_sub(service.heard_at) < waited;
        if session.tries >= SUSPECT_AFTER && lives {
            let mss = limit(mtu);
            let (session, trouble) = self.sessions.in_trouble(s);
            session.mss = mss;
            trouble.narrowed_to = mtu;
        } else if session.first_alone {
            // A target that has seen nothing of the connection yet resets it at an old number; the first byte it acknowledges.
            let seq = session.snd_una;
            let piece = Piece { segment: session.una_segment, offset: seq.wrapping_sub(stored.seq), len: 1 };
            self.send_data(now_ns, s, false, seq, piece, out, &mut None);
        } else {
            // An old number is answered by an acknowledgment (RFC 9293 section 3.10.7.4).
            let seq = session.snd_una.wrapping_sub(1);
            self.send(now_ns, s, flags::ACK, seq, None, out, &mut None);
        }
    }

    /// Data was acknowledged: if it did not get through before its segments were made smaller, that holds for the service's other sessions.
    pub(crate) fn narrower_path_found(&mut self, now: Tick, s: u32) {
        let (session, trouble) = self.sessions.in_trouble(s);
        let mtu = core::mem::take(&mut trouble.narrowed_to);
        if mtu == 0 {
            return;
        }
        let number = session.service;
        // Of many sessions that find it at the same time the first one tells the others: that takes a walk through all.
        let is_news = self.path_mtu(number, now) > mtu;
        self.services[usize::from(number)].narrow_path = Some((mtu, now));
        if is_news {
            self.narrow(number, mtu);
        }
    }
}
