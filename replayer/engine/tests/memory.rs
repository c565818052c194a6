//! What the engine reserves at its start for its limits is not touched before traffic needs it.

use replayer_engine::Engine;
use replayer_engine::config::{Config, Service};

/// This process's resident memory, KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_million_sessions_are_reserved_without_touching_their_memory() {
    let endpoint = |text: &str| text.parse::<std::net::SocketAddr>().unwrap().into();
    let config =
        Config::new(vec![Service { online: endpoint("10.0.1.1:80"), target: endpoint("10.0.2.1:80") }]);
    let before = resident();
    let engine = Engine::new(config, 0);
    let touched = resident() - before;
    assert_eq!(engine.gauges().sessions_live, 0);
    assert!(touched < 4096, "{touched} KiB touched at the start");
}
