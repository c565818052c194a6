//! The assistant: the black hole for the target's responses.

pub mod early;
pub mod routing;
