//! What is wrong with the set-up around a running role, seen in its figures: said while it runs, of the targets that it concerns, with the
//! remedy, and once only until it is over. What a role can see before its start it refuses there.

use crate::capture::verdicts::Place;
use crate::cli::{ReplayArgs, ServiceArg};
use crate::figures::Figures;
use replayer_common::addr::{Endpoint, to_std};
use replayer_common::packet::Protocol;
use replayer_engine::counters::{Counter, ServiceCounters};
use serde_json::{Value, json};
use std::time::Duration;

/// How often a role is to be looked at.
pub const INTERVAL: Duration = Duration::from_secs(1);
/// Sessions were opened, or datagrams sent, for so long, and the target sent nothing at all: by then a lost SYN or SYN-ACK was repeated twice
/// (RFC 6298 section 2).
const SILENT_AFTER: Duration = Duration::from_secs(4);
/// So many datagrams have to be without an answer: nobody sends a lost one again.
const DATAGRAMS_UNANSWERED: u64 = 3;
/// Nothing was captured for so long after the start.
const UNSEEN_AFTER: Duration = Duration::from_secs(8);
/// A trouble of which nothing was seen for so long is over.
const OVER_AFTER: Duration = Duration::from_secs(5);
/// The same of packets that found no room in the capture, where bursts come and go.
const ROOM_AFTER: Duration = Duration::from_secs(60);

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// No packet was captured.
    NothingCaptured,
    /// No packet was captured, for those that came in are of clients that were not chosen.
    NobodyChosen,
    /// Packets are lost between the interface and the workers.
    CaptureLoses {
        /// How many within the last second, by where they were lost.
        lost: Vec<(Place, u64)>,
        /// Not one has got through so far.
        all: bool,
    },
    /// Targets' answers do not come back.
    NoResponse {
        /// Of TCP or of UDP.
        protocol: Protocol,
        /// Whose.
        targets: Vec<Endpoint>,
        /// Assistants that cannot be reached, and how many there are.
        unreachable: (usize, usize),
    },
    /// These targets refuse connections.
    Refused(Vec<Endpoint>),
    /// There is no way to these targets.
    NoLink(Vec<Endpoint>),
}

/// What the figures were like before.
#[derive(Debug)]
pub struct Diagnosis {
    /// Whether packets are captured here, and their absence would be told.
    captures: bool,
    /// What was said of a capture without packets.
    said_unseen: Option<Trouble>,
    lost: Vec<(Place, u64)>,
    losing: Growth,
    targets: Vec<Target>,
}

/// A target: several services may have it.
#[derive(Debug)]
struct Target {
    protocol: Protocol,
    endpoint: Endpoint,
    /// Its services' numbers.
    services: Vec<usize>,
    /// At the last look.
    counters: ServiceCounters,
    /// Since when something was asked of it and nothing came, and how much had been asked before.
    waiting: Option<(Duration, u64)>,
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
    /// True when it has begun to grow: for the first time, or after it has not for so long.
    fn begins(&mut self, now: Duration, value: u64, over_after: Duration) -> bool {
        let grew = value > self.value;
        self.value = value;
        if self.told.is_some_and(|last| now >= last + over_after) {
            self.told = None;
        }
        let begins = grew && self.told.is_none();
        if grew {
            self.told = Some(now);
        }
        begins
    }
}

/// What begins at a target, each once.
#[derive(Debug, Default)]
struct Begins {
    no_response: bool,
    refused: bool,
    no_link: bool,
}

impl Target {
    /// `cut_off`: no assistant can be reached, which was told.
    fn look(&mut self, now: Duration, counters: ServiceCounters, cut_off: bool) -> Begins {
        let asked = |c: &ServiceCounters| c.sessions_opened + c.datagrams_sent;
        let no_link = self.no_link.begins(now, counters.packets_no_link, OVER_AFTER);
        // Without a way to the target, or for the answers to come back, silence is no wonder, and its cause was told.
        let explained = self.no_link.told.is_some() || cut_off;
        if counters.heard != self.counters.heard {
            (self.waiting, self.said_no_response) = (None, false);
        } else if explained {
            self.waiting = None;
        } else if asked(&counters) > asked(&self.counters) && self.waiting.is_none() {
            self.waiting = Some((now, asked(&self.counters)));
        }
        let enough = if self.protocol == Protocol::Udp { DATAGRAMS_UNANSWERED } else { 1 };
        let silent = self.waiting.is_some_and(|(since, before)| {
            now >= since + SILENT_AFTER && asked(&counters) - before >= enough
        });
        let no_response = silent && !self.said_no_response;
        self.said_no_response |= silent;
        let refused = self.refused.begins(now, counters.sessions_refused, OVER_AFTER);
        self.counters = counters;
        Begins { no_response, refused, no_link }
    }
}

impl Diagnosis {
    /// Of a role that captures packets, or takes them from files.
    pub fn new(captures: bool, services: &[ServiceArg]) -> Diagnosis {
        let mut targets: Vec<Target> = Vec::new();
        for (number, &ServiceArg { protocol, service }) in services.iter().enumerate() {
            let same =
                |target: &&mut Target| (target.protocol, target.endpoint) == (protocol, service.target);
            match targets.iter_mut().find(same) {
                Some(target) => target.services.push(number),
                None => targets.push(Target {
                    protocol,
                    endpoint: service.target,
                    services: vec![number],
                    counters: ServiceCounters::default(),
                    waiting: None,
                    said_no_response: false,
                    refused: Growth::default(),
                    no_link: Growth::default(),
                }),
            }
        }
        Diagnosis { captures, said_unseen: None, lost: Vec::new(), losing: Growth::default(), targets }
    }

    /// What is to be said now, `now` after the start. To be called every [`INTERVAL`]. `left_out`: clients' packets that came in and were not
    /// to be captured; `not_chosen`: those of clients that were not chosen, which are not among them.
    pub fn look(&mut self, now: Duration, figures: &Figures, left_out: u64, not_chosen: u64) -> Vec<Trouble> {
        let mut troubles = Vec::new();
        let captured = figures.counters[Counter::PacketsCaptured];
        let lost = figures.lost_in_capture();
        if self.losing.begins(now, lost, ROOM_AFTER) {
            let before =
                |place| self.lost.iter().find(|(other, _)| *other == place).map_or(0, |&(_, count)| count);
            let grown = figures
                .lost_by_place
                .iter()
                .map(|&(place, count)| (place, count.saturating_sub(before(place))));
            let lost = grown.filter(|&(_, count)| count > 0).collect();
            troubles.push(Trouble::CaptureLoses { lost, all: captured == 0 });
        }
        self.lost.clone_from(&figures.lost_by_place);
        // That some came in and were lost has just been told.
        if self.captures && now >= UNSEEN_AFTER && captured + left_out + lost == 0 {
            let unseen = if not_chosen > 0 { Trouble::NobodyChosen } else { Trouble::NothingCaptured };
            if self.said_unseen.as_ref() != Some(&unseen) {
                self.said_unseen = Some(unseen.clone());
                troubles.push(unseen);
            }
        }

        let (up, all) = figures.assistants();
        let (mut silent, mut refused, mut no_link) = ([const { Vec::new() }; 2], Vec::new(), Vec::new());
        for target in &mut self.targets {
            let mut counters = ServiceCounters::default();
            for service in target.services.iter().filter_map(|&number| figures.services.get(number)) {
                counters.add(&service.counters);
            }
            let begins = target.look(now, counters, up == 0 && all > 0);
            for (begins, list) in [
                (begins.no_response, &mut silent[usize::from(target.protocol == Protocol::Udp)]),
                (begins.refused, &mut refused),
                (begins.no_link, &mut no_link),
            ] {
                // A target of both protocols is one to a person.
                if begins && !list.contains(&target.endpoint) {
                    list.push(target.endpoint);
                }
            }
        }
        for (protocol, targets) in [Protocol::Tcp, Protocol::Udp].into_iter().zip(silent) {
            troubles.push(Trouble::NoResponse { protocol, targets, unreachable: (all - up, all) });
        }
        troubles.extend([Trouble::NoLink(no_link), Trouble::Refused(refused)]);
        troubles.retain(|trouble| trouble.targets().is_none_or(|targets| !targets.is_empty()));
        troubles
    }
}

impl Trouble {
    /// Its name, for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Trouble::NothingCaptured => "nothing_captured",
            Trouble::NobodyChosen => "nobody_chosen",
            Trouble::CaptureLoses { .. } => "capture_loses",
            Trouble::NoResponse { .. } => "no_response",
            Trouble::Refused(_) => "refused",
            Trouble::NoLink(_) => "no_link",
        }
    }

    /// What programs are told of it.
    pub fn fields(&self) -> Value {
        let mut fields = json!({"trouble": self.name()});
        if let Some(targets) = self.targets() {
            fields["targets"] = targets.iter().map(Endpoint::to_string).collect();
        }
        fields
    }

    /// Of a trouble with targets, which ones.
    pub fn targets(&self) -> Option<&[Endpoint]> {
        match self {
            Trouble::NoResponse { targets, .. } | Trouble::Refused(targets) | Trouble::NoLink(targets) => {
                Some(targets)
            }
            _ => None,
        }
    }

    /// The cause and the remedy, for people. `interface`: where packets are captured.
    pub fn describe(&self, services: &[ServiceArg], replay: &ReplayArgs, interface: &str) -> String {
        let list = |names: Vec<String>| {
            let mut names = names;
            names.dedup();
            names.join(", ")
        };
        let targets = list(self.targets().unwrap_or_default().iter().map(Endpoint::to_string).collect());
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
            Trouble::CaptureLoses { lost, all } => {
                let sum: u64 = lost.iter().map(|(_, count)| count).sum();
                let places: Vec<String> =
                    lost.iter().map(|(place, count)| format!("{place} {count}")).collect();
                let rest = if *all { "; not one has got through so far" } else { "" };
                format!(
                    "{sum} packets were lost in the capture within the last second ({}){rest}: the workers do not keep up with what comes \
                     in on {interface}. The production server has them all; requests that are not whole are not replayed. Use more workers \
                     (--workers, with a TX queue and a core for each), or replay a smaller share of the connections (-r)",
                    places.join(", ")
                )
            }
            Trouble::NoResponse { protocol, unreachable: (down, all), .. } => {
                let client = match replay.pool.first() {
                    Some(range) => to_std(&range.0.first).to_string(),
                    None => "CLIENT".to_owned(),
                };
                let (asked, whether) = match protocol {
                    Protocol::Tcp => ("sessions were opened", ""),
                    Protocol::Udp => ("datagrams were sent", ". If it is one that answers"),
                };
                let assistants = match down {
                    0 => String::new(),
                    _ => {
                        format!("; {down} of {all} assistants cannot be reached, and what goes there is lost")
                    }
                };
                let on_it = if whether.is_empty() { ". On the target" } else { ": on the target" };
                format!(
                    "{asked} for {} s, and nothing of {targets} came back{whether}{on_it}, `ip route get {client}` has to lead to \
                     the assistant (`ip route add NETWORK via ASSISTANT`), the server has to listen, and neither a firewall nor rp_filter may \
                     drop what seems to come from clients; the assistant has to be on the interface (-i) that the target's packets reach{assistants}",
                    SILENT_AFTER.as_secs()
                )
            }
            Trouble::Refused(_) => {
                format!(
                    "connections to {targets} are refused: nothing listens there; they are copied again as soon as something does"
                )
            }
            Trouble::NoLink(_) => format!(
                "packets to {targets} cannot be sent, for there is no route or the next hop does not answer: see `ip route get`, `ip neigh` and \
                 `ip -br link` on this host; copying goes on as soon as there is a way"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::counters::RingVerdict;

    /// What happens at a service within a second.
    type Event = (usize, fn(&mut ServiceCounters));

    const OPENED: Event = (0, |c| c.sessions_opened += 1);
    const HEARD: Event = (0, |c| c.heard += 1);
    const OTHER_OPENED: Event = (1, |c| c.sessions_opened += 1);
    const OTHER_HEARD: Event = (1, |c| c.heard += 1);
    const SENT: Event = (2, |c| c.datagrams_sent += 1);
    const ANSWERED: Event = (2, |c| c.heard += 1);
    const NAMES: [&str; 3] = ["192.0.2.7:80", "192.0.2.8:80", "192.0.2.8:53"];

    /// A look each second at figures that a test changes.
    struct Looks {
        diagnosis: Diagnosis,
        figures: Figures,
        left_out: u64,
        not_chosen: u64,
        second: u64,
    }

    fn services() -> Vec<ServiceArg> {
        ["80-192.0.2.7:80", "81-192.0.2.8:80", "udp:53-192.0.2.8:53"].map(|text| text.parse().unwrap()).into()
    }

    fn endpoints(names: &[&str]) -> Vec<Endpoint> {
        names.iter().map(|name| name.parse::<std::net::SocketAddr>().unwrap().into()).collect()
    }

    fn no_response(protocol: Protocol, names: &[&str]) -> Trouble {
        Trouble::NoResponse { protocol, targets: endpoints(names), unreachable: (0, 0) }
    }

    impl Looks {
        fn new(captures: bool) -> Looks {
            Looks {
                diagnosis: Diagnosis::new(captures, &services()),
                figures: Figures::of(&services()),
                left_out: 0,
                not_chosen: 0,
                second: 0,
            }
        }

        /// Something happens, and is looked at a second later.
        fn with(&mut self, events: &[Event]) -> Vec<Trouble> {
            for (service, happens) in events {
                happens(&mut self.figures.services[*service].counters);
            }
            self.second += 1;
            self.diagnosis.look(
                Duration::from_secs(self.second),
                &self.figures,
                self.left_out,
                self.not_chosen,
            )
        }

        /// The seconds at which something was said, and what, while the same happens again and again.
        fn for_seconds(&mut self, seconds: u64, events: &[Event]) -> Vec<(u64, Trouble)> {
            (0..seconds)
                .flat_map(|_| {
                    let said = self.with(events);
                    let second = self.second;
                    said.into_iter().map(move |trouble| (second, trouble))
                })
                .collect()
        }
    }

    #[test]
    fn b065_a_target_that_never_answers_is_named_once_within_ten_seconds() {
        let mut looks = Looks::new(false);
        let trouble = no_response(Protocol::Tcp, &NAMES[..1]);
        assert_eq!(looks.for_seconds(60, &[OPENED]), [(5, trouble.clone())]);
        // One answer, and the next silence is another one.
        assert_eq!(looks.with(&[HEARD]), []);
        assert_eq!(looks.for_seconds(20, &[OPENED]), [(66, trouble)]);
    }

    #[test]
    fn b065_of_several_targets_only_those_are_named_that_do_not_answer() {
        let mut looks = Looks::new(false);
        let said = looks.for_seconds(30, &[OPENED, OTHER_OPENED, OTHER_HEARD]);
        assert_eq!(said, [(5, no_response(Protocol::Tcp, &NAMES[..1]))]);
        let mut looks = Looks::new(false);
        let said = looks.for_seconds(30, &[OPENED, OTHER_OPENED]);
        assert_eq!(said, [(5, no_response(Protocol::Tcp, &NAMES[..2]))]);
        let mut looks = Looks::new(false);
        let refused: Event = (1, |c| c.sessions_refused += 1);
        let said = looks.for_seconds(30, &[OPENED, HEARD, OTHER_OPENED, OTHER_HEARD, refused]);
        assert_eq!(said, [(1, Trouble::Refused(endpoints(&NAMES[1..2])))]);
    }

    #[test]
    fn b065_datagrams_that_are_never_answered_are_named_and_a_lost_one_is_not() {
        let mut looks = Looks::new(false);
        assert_eq!(looks.with(&[SENT, SENT]), []);
        assert_eq!(looks.for_seconds(100, &[]), []);
        assert_eq!(looks.with(&[SENT]), [no_response(Protocol::Udp, &NAMES[2..])]);
        assert_eq!(looks.for_seconds(100, &[SENT]), []);
        assert_eq!(Looks::new(false).for_seconds(100, &[SENT, ANSWERED]), []);
    }

    #[test]
    fn b065_one_assistant_of_several_that_is_away_does_not_hide_a_silent_target() {
        let mut looks = Looks::new(false);
        looks.figures.connected(&[true, false]);
        let unreachable = (1, 2);
        let targets = endpoints(&NAMES[..1]);
        let trouble = Trouble::NoResponse { protocol: Protocol::Tcp, targets, unreachable };
        assert_eq!(looks.for_seconds(30, &[OPENED]), [(5, trouble)]);
        // Without any it is no wonder, nor at once when one is back.
        let mut looks = Looks::new(false);
        looks.figures.connected(&[false, false]);
        assert_eq!(looks.for_seconds(30, &[OPENED]), []);
        looks.figures.connected(&[true, true]);
        assert_eq!(looks.for_seconds(3, &[OPENED]), []);
        assert_eq!(looks.for_seconds(30, &[OPENED, HEARD]), []);
    }

    #[test]
    fn a_target_without_new_sessions_may_be_silent_and_one_that_answers_may_be_slow() {
        let mut looks = Looks::new(false);
        assert_eq!(looks.for_seconds(20, &[OPENED, HEARD]), []);
        assert_eq!(looks.for_seconds(100, &[]), []);
        looks.with(&[OPENED]);
        assert_eq!(looks.for_seconds(3, &[]), []);
        assert_eq!(looks.with(&[HEARD]), []);
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
    fn b048_a_capture_that_loses_packets_is_told_when_it_begins_with_what_it_lost_where() {
        let mut looks = Looks::new(true);
        let full = |count| (Place::Ring(RingVerdict::RingFull), count);
        let too_large = |count| (Place::Ring(RingVerdict::TooLarge), count);
        let loses = |lost: &[(Place, u64)], all| Trouble::CaptureLoses { lost: lost.to_vec(), all };
        looks.figures.lost_by_place = vec![full(5), too_large(0)];
        assert_eq!(looks.with(&[]), [loses(&[full(5)], true)]);
        // All of it was lost, which was told.
        assert_eq!(looks.for_seconds(20, &[]), []);
        looks.figures.counters[Counter::PacketsCaptured] = 1;
        looks.figures.lost_by_place = vec![full(7), too_large(1)];
        assert_eq!(looks.with(&[]), []);
        assert_eq!(looks.for_seconds(100, &[]), []);
        looks.figures.lost_by_place = vec![full(17), too_large(1)];
        assert_eq!(looks.with(&[]), [loses(&[full(10)], false)], "it was over");
    }

    #[test]
    fn b065_a_target_that_refuses_and_a_missing_way_are_named_when_they_begin() {
        let mut looks = Looks::new(false);
        let targets = endpoints(&NAMES[..1]);
        let events: [(Event, Trouble); 2] = [
            ((0, |c| c.sessions_refused += 1), Trouble::Refused(targets.clone())),
            ((0, |c| c.packets_no_link += 1), Trouble::NoLink(targets)),
        ];
        for (event, trouble) in events {
            let begins = looks.second + 1;
            assert_eq!(looks.for_seconds(30, &[event]), [(begins, trouble.clone())]);
            assert_eq!(looks.for_seconds(10, &[]), []);
            assert_eq!(looks.with(&[event]), [trouble], "it was over");
        }
    }

    #[test]
    fn without_a_way_to_the_target_its_silence_is_explained() {
        let mut looks = Looks::new(false);
        let said = looks.for_seconds(30, &[OPENED, (0, |c| c.packets_no_link += 1)]);
        assert_eq!(said, [(1, Trouble::NoLink(endpoints(&NAMES[..1])))]);
    }
}
