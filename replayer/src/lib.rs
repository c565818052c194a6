//! Replayer: replays the live requests of a production server, TCP and UDP, to a target server.
//!
//! - [`cli`]: the command line; [`configuration`]: the file that adds to it
//! - [`replay`]: the flags that both replaying roles have, and what they mean
//! - [`online`]: the online role: puts the parts together
//! - [`clients`]: whose requests are taken
//! - [`sizing`]: whether there are identities enough
//! - [`placement`]: how many workers there are, and where they run
//! - [`offline`]: the offline role: capture files instead of a live host
//! - [`worker`]: the thread that moves packets between mirror, engine, output device and return channels
//! - [`assistant`]: the assistant role
//! - [`channel`]: the return channel between them
//! - [`afxdp`]: the AF_XDP port
//! - [`capture`]: how requests get to the workers: mirror, ring, or span
//! - [`netns`]: network namespaces
//! - [`programs`]: the BPF programs and their maps
//! - [`net`]: routes, neighbours, devices
//! - [`connections`]: the connections that a server has
//! - [`moderation`]: when to pause, so that one wake-up serves many packets
//! - [`growth`]: memory for more sessions, before they come
//! - [`pcap`]: capture files
//! - [`record`]: writes what is captured to files
//! - [`inspect`]: what capture files hold
//! - [`report`]: the figures of a run
//! - [`metrics`]: the same for Prometheus
//! - [`top`]: the same for a person who watches
//! - [`diagnosis`]: what is wrong with the set-up, seen in them
//! - [`clock`], [`privileges`], [`signals`]: what every role needs of the system; [`reload`]: what SIGHUP asks of those that replay; [`say`]: how
//!   it speaks to people

pub mod afxdp;
pub mod assistant;
pub mod capture;
pub mod channel;
pub mod cli;
pub mod clients;
pub mod clock;
pub mod configuration;
pub mod connections;
pub mod diagnosis;
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
pub mod programs;
pub mod record;
pub mod reload;
pub mod replay;
pub mod report;
pub mod say;
pub mod signals;
pub mod sizing;
pub mod top;
pub mod worker;
