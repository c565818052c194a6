//! Questions to the kernel: routes, neighbours, devices, connections.
//!
//! Needs root. Each test makes network namespaces of its own, without names, so that whatever it makes in
//! there is gone with it.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use replayer::assistant::host;
use replayer::net::{Link, Monitor, NetError, Network, Snapshot, Watch};
use replayer::netns::Namespace;
use replayer::server_connections::{self, Connection};
use replayer_common::addr::Endpoint;

const DEADLINE: Duration = Duration::from_secs(5);
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const PEER_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Runs `f` in a namespace with a device `out`, whose other end is in a namespace of its own, the argument of
/// `f`. This side has 10.1.0.1 and fd00:1::1, the other one 10.1.0.2, 10.1.0.3 and fd00:1::2.
fn in_lab(f: impl FnOnce(&Namespace) + Send) {
    assert!(nix::unistd::geteuid().is_root(), "needs root: run `cargo xtask test`");
    let lab = Namespace::anonymous().expect("a namespace");
    let peer = Namespace::anonymous().expect("a namespace");
    let peer_path = format!("/proc/{}/fd/{}", std::process::id(), peer.as_fd().as_raw_fd());
    let body = || {
        ip("link set lo up");
        ip("link add out address 02:00:00:00:00:01 type veth peer name peer address 02:00:00:00:00:02");
        ip(&format!("link set peer netns {peer_path}"));
        ip("addr add 10.1.0.1/24 dev out");
        ip("addr add fd00:1::1/64 dev out nodad");
        ip("link set out up");
        let other_side = || {
            ip("addr add 10.1.0.2/24 dev peer");
            ip("addr add 10.1.0.3/24 dev peer");
            ip("addr add fd00:1::2/64 dev peer nodad");
            ip("link set peer up");
        };
        peer.run(other_side).expect("enter the other namespace");
        f(&peer);
    };
    lab.run(body).expect("enter the namespace");
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("run ip");
    assert!(status.success(), "ip {arguments}");
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn resolve(target: &str, output: Option<&str>) -> Result<Link, NetError> {
    Network::open().expect("netlink").resolve(address(target), output, DEADLINE)
}

#[track_caller]
fn error_of(target: &str, output: Option<&str>) -> String {
    let mut network = Network::open().expect("netlink");
    network.resolve(address(target), output, Duration::from_millis(100)).unwrap_err().to_string()
}

/// The next hop is asked for its MAC address when it is not known, for both families, with and without a
/// router between.
#[test]
fn the_way_to_a_target() {
    in_lab(|_| {
        let mut network = Network::open().expect("netlink");
        let out = network.device("out").expect("the device");
        assert_eq!(out.kind.as_deref(), Some("veth"));
        assert!(out.up && out.carrier);
        let direct =
            Link { ifindex: out.ifindex, src_mac: HOST_MAC, dst_mac: PEER_MAC, mtu: 1500, vlan: [None; 2] };
        assert_eq!(resolve("10.1.0.2", None).expect("a neighbour"), direct);
        assert_eq!(resolve("10.1.0.2", Some("out")).expect("a neighbour"), direct);
        assert_eq!(resolve("fd00:1::2", None).expect("a neighbour"), direct);

        ip("route add 198.51.100.0/24 via 10.1.0.3 mtu 1400 src 10.1.0.1");
        ip("route add 2001:db8::/32 via fd00:1::2 mtu 1300");
        ip("route add 203.0.113.0/24 via inet6 fd00:1::2");
        assert_eq!(resolve("198.51.100.7", None).expect("a route"), Link { mtu: 1400, ..direct });
        assert_eq!(resolve("2001:db8::7", None).expect("a route"), Link { mtu: 1300, ..direct });
        assert_eq!(resolve("203.0.113.7", None).expect("a route"), direct);
        let route = network.route(address("198.51.100.7"), None).expect("a route");
        assert_eq!((route.gateway, route.source), (Some(address("10.1.0.3")), Some(address("10.1.0.1"))));
    });
}

/// Errors say what is wrong and what to do.
#[test]
fn b009_network_errors_name_cause_and_remedy() {
    in_lab(|_| {
        let cases = [
            (error_of("192.0.2.1", None), ["no route to 192.0.2.1", "ip route add"]),
            (error_of("2001:db8::1", None), ["no route to 2001:db8::1", "ip route add"]),
            (error_of("10.1.0.1", None), ["10.1.0.1 is an address of this host", "another host"]),
            (error_of("10.1.0.255", None), ["10.1.0.255", "not the address of a host"]),
            (error_of("10.1.0.2", Some("eth7")), ["no interface eth7", "lo, out"]),
            (
                error_of("10.1.0.99", None),
                ["10.1.0.99, the next hop to 10.1.0.99, does not answer on out", "ip neigh"],
            ),
        ];
        for (error, parts) in cases {
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
        ip("link set out down");
        let error = error_of("10.1.0.2", Some("out"));
        assert!(error.contains("no route") || error.contains("ip link set out up"), "{error}");
    });
}

/// By the source address if there is one, else by the route.
#[test]
fn the_capture_interface() {
    in_lab(|_| {
        let mut network = Network::open().expect("netlink");
        let target = address("10.1.0.2");
        let mut find = |source: Option<&str>| network.find_capture_interface(source.map(address), target);
        assert_eq!(find(None).expect("by the route").name, "out");
        assert_eq!(find(Some("127.0.0.1")).expect("by the address").name, "lo");
        assert_eq!(find(Some("fd00:1::1")).expect("by the address").name, "out");
        let error = find(Some("192.0.2.1")).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1") && error.contains("10.1.0.1") && error.contains("-i"), "{error}");
    });
}

#[test]
fn b065_a_host_that_forwards_is_no_assistant_in_either_family() {
    in_lab(|_| {
        let is_refused = |settings: &[&str]| {
            let error = host::refuse_forwarding("out").map_err(|error| error.to_string());
            assert_eq!(host::forwarding("out"), settings);
            match error {
                Ok(()) => assert!(settings.is_empty()),
                Err(says) => assert!(says.contains(&format!("`sysctl -w {}`", settings.join(" "))), "{says}"),
            }
        };
        let set = |setting: &str, value| {
            std::fs::write(format!("/proc/sys/net/{setting}/forwarding"), value).expect("set");
        };
        is_refused(&[]);
        // Of one interface only.
        set("ipv6/conf/out", "1");
        is_refused(&["net.ipv6.conf.out.forwarding=0"]);
        // Of all.
        set("ipv6/conf/all", "1");
        is_refused(&["net.ipv6.conf.all.forwarding=0", "net.ipv6.conf.out.forwarding=0"]);
        set("ipv6/conf/all", "0");
        set("ipv4/conf/out", "1");
        is_refused(&["net.ipv4.conf.out.forwarding=0"]);
    });
}

#[track_caller]
fn wait_for(watch: &mut Watch, what: &str, condition: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    let start = Instant::now();
    let mut last = None;
    loop {
        if let Some(snapshot) = watch.changed() {
            if condition(&snapshot) {
                return snapshot;
            }
            last = Some(snapshot);
        }
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}; {last:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What changes in the kernel reaches a worker, and nothing else does.
#[test]
fn the_monitor_publishes_changes() {
    in_lab(|peer| {
        let monitor = Monitor::start(vec![address("10.1.0.2")], None, Vec::new()).expect("a monitor");
        let mut watch = monitor.watch();
        let mtu = |snapshot: &Snapshot| snapshot.links[0].as_ref().map(|link| link.mtu).ok();
        let first = wait_for(&mut watch, "the neighbour", |snapshot| mtu(snapshot) == Some(1500));
        assert!(first.addresses.contains(&address("fd00:1::1")));
        assert!(watch.changed().is_none());

        ip("link set out mtu 1400");
        wait_for(&mut watch, "the device's MTU", |snapshot| mtu(snapshot) == Some(1400));
        ip("route add 10.1.0.2/32 dev out mtu 1300");
        wait_for(&mut watch, "the route's MTU", |snapshot| mtu(snapshot) == Some(1300));
        ip("addr add 10.1.0.77/24 dev out");
        wait_for(&mut watch, "an address", |snapshot| snapshot.addresses.contains(&address("10.1.0.77")));

        ip("link set out down");
        wait_for(&mut watch, "the link is down", |snapshot| snapshot.links[0].is_err());
        ip("link set out up");
        wait_for(&mut watch, "the link is up", |snapshot| snapshot.links[0].is_ok());

        // A next hop that comes back with another MAC address.
        let exchange = || {
            ip("link set peer down");
            ip("link set peer address 02:00:00:00:00:22");
            ip("link set peer up");
        };
        peer.run(exchange).expect("enter the other namespace");
        let mac = |snapshot: &Snapshot| snapshot.links[0].as_ref().map(|link| link.dst_mac).ok();
        wait_for(&mut watch, "the new MAC address", |snapshot| mac(snapshot) == Some([2, 0, 0, 0, 0, 0x22]));
    });
}

/// The one connection from `client`.
#[track_caller]
fn connection(port: u16, client: &TcpStream) -> Connection {
    let client = client.local_addr().expect("an address");
    let expected = Endpoint::from(client);
    let connections = server_connections::established(&[port]).expect("socket diagnostics");
    let mut found = connections.into_iter().filter(|connection| connection.client == expected);
    let connection = found.next().expect("the connection");
    assert!(found.next().is_none());
    connection
}

#[track_caller]
fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A connection is between turns until its client says something, and again when the server has answered;
/// over IPv4, IPv6, and IPv4 on an IPv6 socket.
#[test]
fn b013_connections_and_their_turns() {
    in_lab(|_| {
        for (listen, target) in [("127.0.0.1", "127.0.0.1"), ("[::]", "[::1]"), ("[::]", "127.0.0.1")] {
            let listener = TcpListener::bind(format!("{listen}:0")).expect("a listener");
            let port = listener.local_addr().expect("an address").port();
            let mut client = TcpStream::connect(format!("{target}:{port}")).expect("a connection");
            let (mut server, _) = listener.accept().expect("the connection");
            let between = || connection(port, &client).between_turns;
            let fresh = connection(port, &client);
            assert_eq!(fresh.server, Endpoint::from(client.peer_addr().expect("an address")));
            assert!(fresh.between_turns);

            (&client).write_all(b"half a req").expect("send");
            wait_until("unread data", || !between());
            server.read_exact(&mut [0; 10]).expect("receive");
            // Read, but not answered. More than a tick of the kernel's clock, within which it counts as
            // answered, has to be between the two: the client's next bytes come when the first are old enough
            // to tell.
            let pause = Instant::now();
            while pause.elapsed() < Duration::from_millis(20) {
                std::thread::yield_now();
            }
            (&client).write_all(b"uest").expect("send");
            server.read_exact(&mut [0; 4]).expect("receive");
            assert!(!between());

            server.write_all(b"an answer").expect("send");
            wait_until("answered", between);

            client.shutdown(Shutdown::Write).expect("FIN");
            client.read_exact(&mut [0; 9]).expect("receive");
            let established = || server_connections::established(&[port]).expect("socket diagnostics");
            wait_until("no longer established", || established().is_empty());
        }
        assert!(server_connections::established(&[1]).expect("socket diagnostics").is_empty());
    });
}
