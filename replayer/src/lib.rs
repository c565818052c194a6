//! Replayer.

pub mod afxdp;
pub mod assistant;
pub mod channel;
pub mod connections;
pub mod mirror;
pub mod net;
pub mod netns;
pub mod programs;
