//! What the online and the offline role have in common: the flags that say what is replayed to where, the checks of what clap cannot see,
//! and the engine's configuration that comes of them.

use super::values::{CopiesArg, PercentArg, PoolArg, STATS, ServiceArg, StatsFormat, VlanArg};
use crate::channel::assistants::Named;
use crate::clients::ClientArgs;
use crate::net::VlanTag;
use crate::report;
use anyhow::{Result, bail};
use clap::Args;
use replayer_common::addr::{is_v4, to_std};
use replayer_common::packet::Protocol;
use replayer_engine::config::{Config, Limits, Service};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Flags of both roles.
#[derive(Clone, Debug, Args)]
pub struct ReplayArgs {
    /// What to copy, and to where: what clients send to, then the target. IPv6 addresses in brackets; udp: in front for UDP; the same source may
    /// have several targets.
    #[arg(
        display_order = 0,
        short = 'x',
        long = "service",
        value_name = "[udp:][SRC_IP:]SRC_PORT-DST_IP:DST_PORT",
        required = true,
        value_delimiter = ','
    )]
    pub services: Vec<ServiceArg>,

    /// Send on this interface [default: by the route to the target].
    #[arg(display_order = 3, short = 'o', long = "output-interface", value_name = "IFACE")]
    pub output_interface: Option<String>,

    /// Send with this VLAN tag, or with two, the outer one (802.1ad) first [default: the tags of the VLAN interfaces on the route]. The target, or
    /// the router on the way to it, has to be known to the output interface itself (`ip neigh`).
    #[arg(long, value_name = "ID|OUTER.ID")]
    pub vlan: Option<VlanArg>,

    /// Use these source addresses, with ports 1024 to 65535, instead of the clients' own.
    #[arg(
        short = 'c',
        long = "client-pool",
        alias = "pool",
        value_name = "IP|CIDR|FIRST-LAST",
        value_delimiter = ','
    )]
    pub pool: Vec<PoolArg>,

    /// Copies of each connection; a fraction is exact over time.
    #[arg(short = 'n', long = "copies", value_name = "COPIES", default_value = "1")]
    pub copies: CopiesArg,

    /// Whose requests.
    #[command(flatten)]
    pub whose: ClientArgs,

    /// The share of connections to replay: always the same ones.
    #[arg(short = 'r', long = "sample", value_name = "PERCENT", default_value = "100")]
    pub sample: PercentArg,

    /// The assistants' port.
    #[arg(short = 'p', long = "assistant-port", value_name = "PORT", default_value_t = crate::channel::limits::DEFAULT_PORT,
        value_parser = clap::value_parser!(u16).range(1..))]
    pub assistant_port: u16,

    /// Leave out connections whose beginning was not captured.
    #[arg(short = 'O', long = "new-connections-only")]
    pub new_connections_only: bool,

    /// Send each request when it is due instead of waiting for the response to the one before.
    #[arg(short = 'W', long = "no-wait")]
    pub no_wait: bool,

    /// The longest that a request waits for the response to the one before, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    pub hold_limit: f64,

    /// How long a hole in a captured stream may stay open, in seconds (with files: of the file's time).
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub gap_timeout: f64,

    /// The most sessions at once.
    #[arg(long, value_name = "COUNT", default_value_t = 1 << 20)]
    pub max_sessions: usize,

    /// The most client data held at once, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    pub max_held: usize,

    /// The key that the assistants were started with. From the environment it does not show in the list of processes.
    #[arg(
        long,
        value_name = "KEY",
        env = "REPLAYER_KEY",
        hide_env_values = true,
        default_value = "",
        hide_default_value = true
    )]
    pub key: String,

    /// Write all counters to this file as JSON at the end, and on SIGHUP.
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,

    /// Serve the figures to Prometheus at this address, as http://IP:PORT/metrics.
    #[arg(long, value_name = "IP:PORT")]
    pub metrics: Option<SocketAddr>,

    /// Print a line of figures this often, in seconds.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(STATS))]
    pub stats: Option<u32>,

    /// How that line looks.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub stats_format: StatsFormat,
}

impl ReplayArgs {
    /// The tags of `--vlan`.
    pub fn tags(&self) -> &[VlanTag] {
        self.vlan.as_ref().map_or(&[], |vlan| &vlan.0)
    }

    /// The services of `-x`, in the order of their numbers: those of TCP, then those of UDP.
    pub fn services(&self) -> Vec<ServiceArg> {
        let mut services = self.services.clone();
        services.sort_by_key(|service| service.protocol);
        services
    }

    /// Copies of a connection at most.
    pub fn most_copies(&self) -> u64 {
        self.copies.0.div_ceil(1_000_000)
    }

    /// Keys of `--config` that a running role takes over ([`ReplayArgs::adopt`]).
    pub const LIVE: [&str; 6] = ["assistant", "assistant-port", "key", "report", "stats", "stats-format"];

    /// Takes over what can change while the role runs; the assistants' names are the role's.
    pub fn adopt(&mut self, new: ReplayArgs) {
        self.assistant_port = new.assistant_port;
        self.key = new.key;
        self.report = new.report;
        self.stats = new.stats;
        self.stats_format = new.stats_format;
    }

    /// How often a line of figures is printed, or would be.
    pub fn stats_interval(&self) -> Duration {
        Duration::from_secs(self.stats.unwrap_or(1).into())
    }

    /// The assistants called `names`.
    pub fn named<'a>(&'a self, names: &'a [String]) -> Named<'a> {
        Named { names, port: self.assistant_port, key: &self.key }
    }

    /// Contradictions between the flags.
    ///
    /// # Errors
    /// When there is one; with the remedy.
    pub fn check(&self) -> Result<()> {
        let services = self.services();
        for (at, service) in services.iter().enumerate() {
            if services[..at].contains(service) {
                bail!(
                    "-x names {} to {} twice; for more copies use -n",
                    service.online_name(),
                    service.service.target
                );
            }
            let target = service.service.target;
            let other_family = |range: &&PoolArg| is_v4(&range.0.first) != is_v4(&target.ip);
            if let Some(range) = self.pool.iter().find(other_family) {
                bail!(
                    "-c {} and the target {target} are not of one address family; give addresses of the target's",
                    to_std(&range.0.first)
                );
            }
            if self.pool.iter().any(|range| range.contains(&target.ip)) {
                bail!("-c: {} is the target's own address; leave it out", to_std(&target.ip));
            }
            let same = |other: &&ServiceArg| {
                (other.protocol, other.service.online) == (service.protocol, service.service.online)
            };
            let targets = services.iter().filter(same).count() as u64;
            let copies = self.most_copies();
            if copies * targets > u64::from(u16::MAX) {
                bail!(
                    "-n {copies} for {targets} targets of {}: a connection can have at most {} sessions; give fewer copies",
                    service.online_name(),
                    u16::MAX
                );
            }
        }
        for (at, range) in self.pool.iter().enumerate() {
            // Two sessions would have one identity.
            let common = |other: &PoolArg| {
                [range.0.first, other.0.first].into_iter().find(|ip| range.contains(ip) && other.contains(ip))
            };
            if let Some(twice) = self.pool[..at].iter().find_map(common) {
                bail!("-c names {} twice; give each address once", to_std(&twice));
            }
        }
        if self.max_sessions == 0 || self.max_sessions > 1 << 24 {
            bail!("--max-sessions {}: give 1 to {}", self.max_sessions, 1 << 24);
        }
        if self.max_held == 0 || self.max_held > 1 << 17 {
            bail!("--max-held {}: give 1 to {} MiB", self.max_held, 1 << 17);
        }
        self.whose.chosen()?;
        self.hold_limit_ns()?;
        self.gap_timeout_ns()?;
        report::check_writable(self.report.as_deref())
    }

    /// `--hold-limit`.
    ///
    /// # Errors
    /// When it is out of range.
    pub fn hold_limit_ns(&self) -> Result<u64> {
        nanoseconds(self.hold_limit, "--hold-limit", 0.001, 3600.0)
    }

    fn gap_timeout_ns(&self) -> Result<u64> {
        nanoseconds(self.gap_timeout, "--gap-timeout", 0.001, 3600.0)
    }

    /// What an engine is told, where `workers` of them share sessions and memory. Its seed, its number, its sample and its frames are the
    /// role's.
    ///
    /// # Errors
    /// When a time is out of range.
    pub fn engine_config(&self, workers: usize) -> Result<Config> {
        let of = |protocol: Protocol| -> Vec<Service> {
            let services = self.services();
            services.iter().filter(|s| s.protocol == protocol).map(|s| s.service).collect()
        };
        let mut config = Config::new(of(Protocol::Tcp));
        config.udp_services = of(Protocol::Udp);
        config.copies_millionths = self.copies.0;
        config.pool = self.pool.iter().map(|range| range.0).collect();
        config.wait_for_responses = !self.no_wait;
        config.new_connections_only = self.new_connections_only;
        config.hold_limit_ns = self.hold_limit_ns()?;
        config.gap_timeout_ns = self.gap_timeout_ns()?;
        config.workers = workers as u32;
        let sessions = self.max_sessions.div_ceil(workers);
        config.limits = Limits { sessions, connections: sessions, ..Limits::default() }
            .with_held((self.max_held << 20).div_ceil(workers));
        Ok(config)
    }
}

/// Seconds as nanoseconds.
///
/// # Errors
/// When they are not between `least` and `most`.
pub(crate) fn nanoseconds(value: f64, flag: &str, least: f64, most: f64) -> Result<u64> {
    if !(least..=most).contains(&value) {
        bail!("{flag} {value}: give {least} to {most} seconds");
    }
    Ok((value * 1e9) as u64)
}
