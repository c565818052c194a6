//! Replayer.

pub mod afxdp;
pub mod mirror;
pub mod net;
pub mod netns;
