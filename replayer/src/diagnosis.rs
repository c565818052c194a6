//! What is wrong with the set-up around a running role, seen in its figures: said while it runs, with the remedy, and once only until it is
//! over. What a role can see before its start it refuses there.

use crate::cli::ServiceArg;
use crate::replay::ReplayArgs;
use crate::report::Figures;
use replayer_common::addr::to_std;
use replayer_common::packet::Protocol;
use replayer_engine::counters::Counter;
use std::time::Duration;

/// How often a role is to be looked at.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Sessions were opened for so long and the target sent nothing at all: by then a lost SYN or SYN-ACK was repeated twice (RFC 6298 section 2).
const SILENT_AFTER: Duration = Duration::from_secs(4);
/// Nothing was captured for so long after the start.
const UNSEEN_AFTER: Duration = Duration::from_secs(8);
/// A trouble of which nothing was seen for so long is over.
const OVER_AFTER: Duration = Duration::from_secs(5);

/// What may be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No packet was captured.
    NothingCaptured,
    /// No packet was captured, for those that came in are of clients that were not chosen.
    NobodyChosen,
    /// The target's answers do not come back.
    NoResponse,
    /// The target refuses connections.
    Refused,
    /// There is no way to the target.
    NoLink,
}

/// What the figures were like before.
#[derive(Debug)]
pub struct Diagnosis {
    /// Whether packets are captured here, and their absence would be told.
    captures: bool,
    /// What was said of a capture without packets.
    said_unseen: Option<Trouble>,
    /// Responses at the last look, and since when sessions were opened without a further one.
    responses: u64,
    opened: u64,
    waiting_since: Option<Duration>,
    said_no_response: bool,
    refused: Growth,
    no_link: Growth,
}

/// A counter that should not grow.
#[derive(Debug, Default)]
struct Growth {
    value: u64,
    /// When it grew last, if its trouble was told and is not over.
    told: Option<Duration>,
}

impl Growth {
    /// True when it has begun to grow.
    fn begins(&mut self, now: Duration, value: u64) -> bool {
        let grew = value > self.value;
        self.value = value;
        let begins = grew && self.told.is_none();
        if grew {
            self.told = Some(now);
        } else if self.told.is_some_and(|last| now >= last + OVER_AFTER) {
            self.told = None;
        }
        begins
    }
}

impl Diagnosis {
    /// Of a role that captures packets, or takes them from files.
    pub fn new(captures: bool) -> Diagnosis {
        Diagnosis {
            captures,
            said_unseen: None,
            responses: 0,
            opened: 0,
            waiting_since: None,
            said_no_response: false,
            refused: Growth::default(),
            no_link: Growth::default(),
        }
    }

    /// What is to be said now, `now` after the start. To be called every [`INTERVAL`]. `left_out`: clients' packets that came in and were not
    /// to be captured, or could not; `not_chosen`: those of clients that were not chosen, which are not among them.
    pub fn look(&mut self, now: Duration, figures: &Figures, left_out: u64, not_chosen: u64) -> Vec<Trouble> {
        let c = &figures.counters;
        let mut troubles = Vec::new();
        if self.captures && now >= UNSEEN_AFTER && c[Counter::PacketsCaptured] + left_out == 0 {
            let unseen = if not_chosen > 0 { Trouble::NobodyChosen } else { Trouble::NothingCaptured };
            if self.said_unseen.replace(unseen) != Some(unseen) {
                troubles.push(unseen);
            }
        }

        let (responses, opened) = (c[Counter::ResponsesReceived], c[Counter::SessionsOpened]);
        if responses > self.responses {
            (self.waiting_since, self.said_no_response) = (None, false);
        } else if opened > self.opened && self.waiting_since.is_none() {
            self.waiting_since = Some(now);
        }
        (self.responses, self.opened) = (responses, opened);
        let (up, all) = figures.assistants();
        let no_link = c[Counter::SegmentsNoLink] + c[Counter::DatagramsNoLink];
        let no_link_begins = self.no_link.begins(now, no_link);
        // Without a way to the target, or for the answers to come back, silence is no wonder, and its cause was told.
        let explained = self.no_link.told.is_some() || up < all;
        if !self.said_no_response
            && !explained
            && self.waiting_since.is_some_and(|since| now >= since + SILENT_AFTER)
        {
            self.said_no_response = true;
            troubles.push(Trouble::NoResponse);
        }
        if no_link_begins {
            troubles.push(Trouble::NoLink);
        }
        if self.refused.begins(now, c[Counter::SessionsRefused]) {
            troubles.push(Trouble::Refused);
        }
        troubles
    }
}

impl Trouble {
    /// Its name, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Trouble::NothingCaptured => "nothing_captured",
            Trouble::NobodyChosen => "nobody_chosen",
            Trouble::NoResponse => "no_response",
            Trouble::Refused => "refused",
            Trouble::NoLink => "no_link",
        }
    }

    /// The cause and the remedy, for people. `interface`: where packets are captured.
    pub fn describe(self, services: &[ServiceArg], replay: &ReplayArgs, interface: &str) -> String {
        let list = |names: Vec<String>| {
            let mut names = names;
            names.dedup();
            names.join(", ")
        };
        let targets = list(
            services
                .iter()
                .filter(|service| self == Trouble::NoLink || service.protocol == Protocol::Tcp)
                .map(|service| service.service.target.to_string())
                .collect(),
        );
        let online = list(services.iter().map(ServiceArg::online_name).collect());
        match self {
            Trouble::NothingCaptured => format!(
                "nothing was captured on {interface} so far: no packet to {online} came in there. If clients are active, they come by another \
                 interface (`ip -br address`; -i names it) or to another address or port (-x)"
            ),
            Trouble::NobodyChosen => format!(
                "nothing was captured on {interface} so far: all packets to {online} are of clients that --clients and --exclude-clients leave \
                 out. What comes through a proxy or a load balancer may have its address (`ss -tn` shows the clients' as this host sees them)"
            ),
            Trouble::NoResponse => {
                let client = match replay.pool.first() {
                    Some(range) => to_std(&range.0.first).to_string(),
                    None => "CLIENT".to_owned(),
                };
                format!(
                    "sessions were opened for {} s, and nothing of {targets} came back. On the target, `ip route get {client}` has to lead to \
                     the assistant (`ip route add NETWORK via ASSISTANT`), the server has to listen, and neither a firewall nor rp_filter may \
                     drop what seems to come from clients; the assistant has to be on the interface (-i) that the target's packets reach",
                    SILENT_AFTER.as_secs()
                )
            }
            Trouble::Refused => {
                format!(
                    "connections to {targets} are refused: nothing listens there; they are copied again as soon as something does"
                )
            }
            Trouble::NoLink => format!(
                "packets to {targets} cannot be sent, for there is no route or the next hop does not answer: see `ip route get`, `ip neigh` and \
                 `ip -br link` on this host; copying goes on as soon as there is a way"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look each second at figures that a test changes.
    struct Looks {
        diagnosis: Diagnosis,
        figures: Figures,
        left_out: u64,
        not_chosen: u64,
        second: u64,
    }

    impl Looks {
        fn new(captures: bool) -> Looks {
            Looks {
                diagnosis: Diagnosis::new(captures),
                figures: Figures::default(),
                left_out: 0,
                not_chosen: 0,
                second: 0,
            }
        }

        /// Counts one more and looks, a second later.
        fn with(&mut self, counters: &[Counter]) -> Vec<Trouble> {
            for &counter in counters {
                self.figures.counters[counter] += 1;
            }
            self.second += 1;
            self.diagnosis.look(
                Duration::from_secs(self.second),
                &self.figures,
                self.left_out,
                self.not_chosen,
            )
        }

        /// The seconds at which something was said, and what, while the same is counted again and again.
        fn for_seconds(&mut self, seconds: u64, counters: &[Counter]) -> Vec<(u64, Trouble)> {
            (0..seconds)
                .flat_map(|_| {
                    let said = self.with(counters);
                    let second = self.second;
                    said.into_iter().map(move |trouble| (second, trouble))
                })
                .collect()
        }
    }

    #[test]
    fn b065_a_target_that_never_answers_is_named_once_within_ten_seconds() {
        let mut looks = Looks::new(true);
        let syns = [Counter::PacketsCaptured, Counter::SessionsOpened];
        assert_eq!(looks.for_seconds(60, &syns), [(5, Trouble::NoResponse)]);
        // One answer, and the next silence is another one.
        assert_eq!(looks.with(&[Counter::ResponsesReceived]), []);
        assert_eq!(looks.for_seconds(20, &syns), [(66, Trouble::NoResponse)]);
    }

    #[test]
    fn a_target_without_new_sessions_may_be_silent_and_one_that_answers_may_be_slow() {
        let mut looks = Looks::new(true);
        let all = [Counter::PacketsCaptured, Counter::SessionsOpened, Counter::ResponsesReceived];
        assert_eq!(looks.for_seconds(20, &all), []);
        assert_eq!(looks.for_seconds(100, &[]), []);
        looks.with(&[Counter::SessionsOpened]);
        assert_eq!(looks.for_seconds(3, &[]), []);
        assert_eq!(looks.with(&[Counter::ResponsesReceived]), []);
        assert_eq!(looks.for_seconds(100, &[]), []);
    }

    #[test]
    fn b065_a_capture_that_sees_nothing_is_named_once_within_ten_seconds() {
        assert_eq!(Looks::new(true).for_seconds(60, &[]), [(8, Trouble::NothingCaptured)]);
        assert_eq!(Looks::new(false).for_seconds(60, &[]), []);
        // With a small sample, or at the beginning of a ramp, clients that are there may be outside of it.
        let mut looks = Looks::new(true);
        looks.left_out = 1;
        assert_eq!(looks.for_seconds(60, &[]), []);
        // Clients may come later, and none of those that were chosen.
        let mut looks = Looks::new(true);
        assert_eq!(looks.for_seconds(20, &[]), [(8, Trouble::NothingCaptured)]);
        looks.not_chosen = 1;
        assert_eq!(looks.for_seconds(20, &[]), [(21, Trouble::NobodyChosen)]);
    }

    #[test]
    fn b065_a_target_that_refuses_and_a_missing_way_are_named_when_they_begin() {
        let mut looks = Looks::new(false);
        for (counter, trouble) in
            [(Counter::SessionsRefused, Trouble::Refused), (Counter::SegmentsNoLink, Trouble::NoLink)]
        {
            let begins = looks.second + 1;
            assert_eq!(looks.for_seconds(30, &[counter]), [(begins, trouble)]);
            assert_eq!(looks.for_seconds(10, &[]), []);
            assert_eq!(looks.with(&[counter]), [trouble], "it was over");
        }
    }

    #[test]
    fn without_a_way_to_the_target_its_silence_is_explained() {
        let mut looks = Looks::new(false);
        let said = looks.for_seconds(30, &[Counter::SessionsOpened, Counter::SegmentsNoLink]);
        assert_eq!(said, [(1, Trouble::NoLink)]);
    }
}
