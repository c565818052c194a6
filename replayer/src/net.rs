//! What the kernel knows about the network.

pub(crate) mod netlink;
