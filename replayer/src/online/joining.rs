//! Which of the connections that are open already are between two requests, so that each is joined at its very next one.

use crate::say::caution;
use crate::server_connections::{self, Connection};
use replayer_common::addr::Endpoint;
use replayer_common::hash::{FLOW_SEED, flow_hash};
use std::collections::{HashMap, HashSet};

/// The connections to servers at these ports; that they cannot be looked up is said.
pub(super) fn open_connections(ports: &[u16]) -> Vec<Connection> {
    server_connections::established(ports).unwrap_or_else(|error| {
        caution!(
            "the open connections cannot be looked up ({error}); each is joined at its second request from now on"
        );
        Vec::new()
    })
}

/// Clients and servers.
pub(super) type Pairs = Vec<(Endpoint, Endpoint)>;

/// Those of the connections whose packets capture gives to a worker.
pub(super) fn of_worker(worker: u32, workers: u32, connections: &Pairs) -> Pairs {
    let is_its = |client: &Endpoint| flow_hash(FLOW_SEED, &client.ip, client.port) % workers == worker;
    connections.iter().filter(|(client, _)| is_its(client)).copied().collect()
}

/// The connections whose next data starts a turn. The first have received nothing between the two looks, so whatever is captured of
/// them is that next data. Of the others something arrived meanwhile, which may be the end of a request: what is captured of
/// them before the second look does not count.
pub(super) fn between_turns(earlier: &[Connection], later: &[Connection]) -> (Pairs, Pairs) {
    let earlier: HashMap<_, _> =
        earlier.iter().map(|c| ((c.client.to_std(), c.server.to_std()), c)).collect();
    let mut quiet = Vec::new();
    let mut others = Vec::new();
    for connection in later.iter().filter(|connection| connection.between_turns) {
        let before = earlier.get(&(connection.client.to_std(), connection.server.to_std()));
        let unchanged =
            before.is_some_and(|before| before.between_turns && before.received == connection.received);
        let list = if unchanged { &mut quiet } else { &mut others };
        list.push((connection.client, connection.server));
    }
    (quiet, others)
}

/// Those that were in the middle of a request at the look before, and are between two at this one.
pub(super) fn between_turns_now(before: &[Connection], now: &[Connection]) -> Pairs {
    let pair = |connection: &Connection| (connection.client, connection.server);
    let busy: HashSet<_> = before.iter().filter(|connection| !connection.between_turns).map(pair).collect();
    now.iter().filter(|connection| connection.between_turns).map(pair).filter(|c| busy.contains(c)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use replayer_common::addr::from_v4;

    #[test]
    fn only_those_are_looked_up_again_that_were_in_the_middle_of_a_request() {
        let at = |port: u16, between_turns: bool| Connection {
            client: Endpoint { ip: from_v4([192, 0, 2, 1]), port },
            server: Endpoint { ip: from_v4([192, 0, 2, 2]), port: 80 },
            between_turns,
            received: 1,
        };
        let before = [at(1, true), at(2, false), at(3, false), at(4, false)];
        let now = [at(1, true), at(2, true), at(3, false), at(5, true)];
        assert_eq!(between_turns_now(&before, &now), [(at(2, true).client, at(2, true).server)]);
    }
}
