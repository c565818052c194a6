//! The engine, exchange by exchange: what is captured, what the target answers, and exactly what is sent.

#[path = "../lab/mod.rs"]
mod lab;

mod doubt;
mod ends;
mod files;
mod frames;
mod handshake;
mod identities;
mod limits;
mod protocols;
mod sending;
mod stream;
mod turns;
