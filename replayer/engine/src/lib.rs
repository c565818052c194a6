#![no_std]
#![forbid(unsafe_code)]
//! The session engine.
