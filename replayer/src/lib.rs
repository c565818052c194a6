//! Replayer.
