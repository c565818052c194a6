//! Replayer: replays the live requests of a production server, TCP and UDP, to a target server.
//!
//! What a person starts:
//!
//! - [`cli`]: the command line; [`configuration`]: the file that adds to it; [`reload`]: what SIGHUP asks a running role to take over
//! - [`online`]: the role on the production server: puts the parts together
//! - [`offline`]: the same with capture files instead of a live host
//! - [`assistant`]: the role that takes the target's responses off the wire
//! - [`record`]: writes what is captured to files; [`inspect`]: says what capture files hold
//! - [`top`]: shows what running roles are doing
//!
//! The way of a request, from the wire to the target:
//!
//! - [`bpf`]: the BPF programs, their maps and their counts
//! - [`capture`]: how requests get to the workers: by mirror, ring, or span
//! - [`worker`]: the thread that moves packets between capture, engine, output device and return channels
//! - [`afxdp`]: the AF_XDP port
//! - [`channel`]: the return channel between workers and assistants
//! - [`pcap`]: capture files
//!
//! What is decided around it:
//!
//! - [`clients`]: whose requests are taken
//! - [`placement`]: how many workers there are, and where they run
//! - [`sizing`]: whether there are identities enough
//! - [`growth`]: memory for more sessions, before they come
//! - [`moderation`]: when to pause, so that one wake-up serves many packets
//! - [`targets`]: the way to the targets
//! - [`net`]: routes, neighbours, devices; [`netns`]: network namespaces
//! - [`server_connections`]: the connections that a server has open
//!
//! What is told of it:
//!
//! - [`figures`]: the figures of a run; [`report`]: where they are written; [`metrics`]: the same for Prometheus
//! - [`diagnosis`]: what is wrong with the set-up, seen in them
//! - [`say`]: messages to people
//!
//! What every role needs of the system: [`clock`], [`privileges`], [`signals`].

pub mod afxdp;
pub mod assistant;
pub mod bpf;
pub mod capture;
pub mod channel;
pub mod cli;
pub mod clients;
pub mod clock;
pub mod configuration;
pub mod diagnosis;
pub mod figures;
pub mod growth;
pub mod inspect;
pub mod metrics;
pub mod moderation;
pub mod net;
pub mod netns;
pub mod offline;
pub mod online;
pub mod pcap;
pub mod placement;
pub mod privileges;
pub mod record;
pub mod reload;
pub mod report;
pub mod say;
pub mod server_connections;
pub mod signals;
pub mod sizing;
pub mod targets;
pub mod top;
pub mod worker;
